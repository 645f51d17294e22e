"""A unix socket server that speaks the sensor's side of the protocol, in a thread of its own."""

import contextlib
import json
import queue
import socket
import threading

import identity_syns as syns

from ebpf import events
from ebpf.events import Message

BOOT = "11111111-2222-3333-4444-555555555555"


def owner(handle=syns.HANDLE, **facts):
    """An owner record as the sensor makes it."""
    return {
        "handle": f"{handle:016x}",
        "host": "client",
        "pid": 4711,
        "started_ns": 1,
        "exe": "/usr/bin/psql",
        "exe_sha256": "ab" * 32,
        "argv": ["psql"],
        "uid": 1000,
        "gid": 1000,
        "comm": "psql",
        "cgroup": "/clients/backup",
        "cgroup_id": 5,
        "unit": "",
        "container": "",
        "runtime": "",
        "pod": "",
        "parents": [],
        "how": "fanotify",
    } | facts


class SpeakingSensor:
    """Answers every ASK from `answers` (a handle that is not there is UNKNOWN; None: no answer)."""

    def __init__(
        self,
        path,
        keys=(syns.KEY,),
        covers=("192.0.2.0/24", "2001:db8:1::/64"),
        boot=BOOT,
        answers=None,
    ):
        self.keys, self.covers, self.boot = list(keys), list(covers), boot
        self.answers = answers or {}
        self.asked = queue.Queue()
        self.joined = threading.Event()
        self._peers = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(4)
        self._path = path
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self):
        """Die: end every connection."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        self._path.unlink()

    def hello(self, **more):
        fields = {
            "host_id": 0x1234, "host": "client", "boot_id": self.boot, "epoch": 1,
            "mac_keys": [key.hex() for key in self.keys], "covers": self.covers,
            "version": events.VERSION,
        }  # fmt: skip
        return events.message(Message.HELLO, json.dumps(fields | more).encode())

    def say(self, data):
        """Send bytes to everyone who is connected."""
        for peer in self._peers:
            peer.sendall(data)

    def owner(self, record):
        self.say(events.message(Message.OWNER, json.dumps(record).encode()))

    def connect(self, source, target, handle=syns.HANDLE):
        family = socket.AF_INET6 if ":" in source[0] else socket.AF_INET
        ends = [events.mapped(socket.inet_pton(family, end[0])) for end in (source, target)]
        version = 6 if family == socket.AF_INET6 else 4
        event = events.Connect(
            handle,
            5,
            1,
            2,
            3,
            4711,
            4711,
            1000,
            1000,
            b"psql",
            *ends,
            source[1],
            target[1],
            version,
        )
        self.say(events.message(Message.CONNECT, event.pack()))

    def lost(self, **counters):
        self.say(events.message(Message.LOST, json.dumps(counters).encode()))

    def _accept(self):
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            self._peers.append(peer)  # before HELLO: who has read it may want us to close
            peer.sendall(self.hello())
            thread = threading.Thread(target=self._serve, args=(peer,), daemon=True)
            self._threads.append(thread)
            thread.start()
            self.joined.set()

    def _serve(self, peer):
        messages = events.Messages()
        with contextlib.suppress(OSError):
            while data := peer.recv(4096):
                for kind, body in messages.feed(data):
                    assert kind is Message.ASK
                    handle = events.handle_of(body)
                    self.asked.put(handle)
                    if handle not in self.answers:
                        peer.sendall(events.unknown(handle))
                    elif self.answers[handle] is not None:
                        record = json.dumps(self.answers[handle]).encode()
                        peer.sendall(events.message(Message.OWNER, record))
        peer.close()
