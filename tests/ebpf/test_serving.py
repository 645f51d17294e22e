"""The sensor's socket: everybody gets everything, and nobody waits for anybody."""

import json
import os
import select
import socket
import struct
import subprocess
import sys
import time

import pytest

from ebpf import events
from ebpf.events import Message
from ebpf.serving import Server

HELLO = events.message(Message.HELLO, b"{}")


class Served:
    """A server on a poll of its own; `turn` lets it work."""

    def __init__(self, folder, queue_bytes=1 << 16):
        self.path = folder / "sensor.sock"
        self.poll = select.epoll()
        self.came = []
        self.asked = []
        self.missed = []
        self.server = Server(self.path, self.poll, HELLO, self._answer, self._came, queue_bytes)
        self._clients = []

    def _came(self, pid):
        self.came.append(pid)
        return self.missed

    def _answer(self, handle):
        self.asked.append(handle)
        return [events.unknown(handle)]

    def client(self):
        made = socket.socket(socket.AF_UNIX)
        made.connect(str(self.path))
        made.settimeout(10)
        self._clients.append(made)
        count = len(self.came)
        self.until(lambda: len(self.came) > count)
        return made

    def turn(self, longest_s=0.0):
        for fd, what in self.poll.poll(longest_s):
            assert self.server.ready(fd, what)

    def until(self, condition):
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end
            self.turn(0.01)

    def heard(self, client):
        """Return the messages that reached a client by now."""
        messages, found = events.Messages(), []
        client.setblocking(False)
        for _ in range(3):
            self.turn()
            try:
                while data := client.recv(1 << 20):
                    found += messages.feed(data)
                    self.turn()
            except BlockingIOError:
                pass
        return found

    def close(self):
        for client in self._clients:
            client.close()
        self.server.close()
        self.poll.close()


@pytest.fixture
def served(tmp_path):
    made = Served(tmp_path)
    yield made
    made.close()


def piece(number, size=1000):
    return events.message(Message.OWNER, struct.pack("<I", number) + bytes(size))


def numbers(found):
    return [struct.unpack_from("<I", body)[0] for kind, body in found if kind is Message.OWNER]


def test_every_client_gets_hello_first_and_then_everything(served):
    clients = [served.client() for _ in range(3)]
    for number in range(5):
        served.server.broadcast(piece(number))
    for client in clients:
        found = served.heard(client)
        assert found[0] == (Message.HELLO, b"{}")
        assert numbers(found) == list(range(5))
    assert served.came == [os.getpid()] * 3


def test_what_a_client_missed_comes_after_hello_and_before_anything_else(served):
    served.missed = [piece(1), piece(2)]
    client = served.client()
    served.server.broadcast(piece(3))
    found = served.heard(client)
    assert found[0] == (Message.HELLO, b"{}")
    assert numbers(found) == [1, 2, 3]


def test_a_slow_client_loses_only_its_own_and_is_told_how_much(served):
    slow, quick = served.client(), served.client()
    got = numbers(served.heard(quick))
    for number in range(1000):
        served.server.broadcast(piece(number))
        if number % 20 == 0:
            got += numbers(served.heard(quick))
    got += numbers(served.heard(quick))
    assert got == list(range(1000))
    served.server.report({"connect_ring": 0})
    found = served.heard(slow)
    kept = numbers(found)
    assert kept == list(range(len(kept)))  # the oldest are kept, whole
    assert 100 < len(kept) < 1000
    losses = [json.loads(body) for kind, body in found if kind is Message.LOST]
    assert losses == [{"connect_ring": 0, "queue": 1000 - len(kept)}]
    served.server.broadcast(piece(7))
    assert numbers(served.heard(slow)) == [7]  # and it is served again
    assert Message.LOST not in [kind for kind, _ in served.heard(quick)]


def test_what_is_sent_in_parts_arrives_whole(served):
    client = served.client()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sizes = [100_000, 5, 300_000, 70_000]
    for number, size in enumerate(sizes):
        served.server.broadcast(piece(number, size))
        assert numbers(served.heard(client))[-1] == number


def test_questions_are_answered_to_who_asked(served):
    one, other = served.client(), served.client()
    one.sendall(events.ask(5) + events.ask(6)[:7])
    served.until(lambda: served.asked == [5])
    one.sendall(events.ask(6)[7:])
    served.until(lambda: served.asked == [5, 6])
    answers = [events.handle_of(b) for kind, b in served.heard(one) if kind is Message.UNKNOWN]
    assert answers == [5, 6]
    assert [kind for kind, _ in served.heard(other)] == [Message.HELLO]


@pytest.mark.parametrize(
    "junk",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(100),
        b"\xff" * 100,
        events.message(Message.OWNER, b"{}"),
        events.message(Message.ASK, b"short"),
        events.message(Message.ASK, bytes(9)),
        struct.pack("<IB", 1 << 20, Message.ASK),
    ],
)
def test_garbage_ends_the_client_that_sent_it_and_nothing_else(served, junk):
    good, bad = served.client(), served.client()
    bad.sendall(junk)
    served.until(lambda: len(served.server.clients) == 1)
    served.server.broadcast(piece(1))
    assert numbers(served.heard(good)) == [1]
    served.heard(good)
    while bad.recv(100):
        pass  # hello, and then the end


def test_a_client_that_dies_with_a_full_queue_leaves_nothing(served):
    dead, good = served.client(), served.client()
    for number in range(400):
        served.server.broadcast(piece(number))
        served.heard(good)
    dead.close()
    served.until(lambda: len(served.server.clients) == 1)
    assert served.server.dropped > 0
    served.server.broadcast(piece(1))
    assert numbers(served.heard(good)) == [1]


def test_losses_are_told_when_they_change_and_to_who_comes_later(served):
    early = served.client()
    served.server.report({"connect_ring": 0})
    served.server.report({"connect_ring": 3})
    served.server.report({"connect_ring": 3})
    late = served.client()
    for client in (early, late):
        told = [json.loads(b) for kind, b in served.heard(client) if kind is Message.LOST]
        assert told == [{"connect_ring": 3, "queue": 0}]


def test_users_other_than_root_are_refused(served, tmp_path):
    served.path.chmod(0o666)  # as if somebody had opened it
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    code = (
        "import os, socket, sys\n"
        "s = socket.socket(socket.AF_UNIX); s.settimeout(10)\n"
        "os.setuid(65534)\n"
        "s.connect(sys.argv[1])\n"
        "print(s.recv(100))"
    )
    argv = [sys.executable, "-c", code, str(served.path)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    served.until(lambda: process.poll() is not None)
    out, _ = process.communicate()
    assert out == "b''\n"
    assert served.came == []


def test_the_socket_is_roots_alone_and_replaces_one_that_was_left(tmp_path):
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / "sensor.sock"))
    left.close()
    served = Served(tmp_path)
    assert served.path.stat().st_mode & 0o777 == 0o600
    assert served.heard(served.client()) == [(Message.HELLO, b"{}")]
    served.close()
    assert list(tmp_path.iterdir()) == []


def test_a_descriptor_of_somebody_else_is_not_handled(served):
    assert not served.server.ready(0, select.EPOLLIN)
