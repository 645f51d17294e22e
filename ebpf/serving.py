"""The sensor's unix socket: what was seen goes to every gate worker, questions come back.

A worker that connects gets HELLO, then the connects that may be waiting for it.

Any number of clients, root only (SO_PEERCRED). The messages are those of `ebpf.events`. Nobody
waits for a client: each has a queue of its own, and what does not fit into it is dropped for this
client alone and counted; LOST tells it as soon as it reads again. A client that says something else
than ASK is disconnected.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import socket
import struct
import time
from typing import TYPE_CHECKING

from ebpf import events
from ebpf.events import Message, Messages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

log = logging.getLogger("narrows.sensor")

QUEUE_BYTES = 8 << 20
MOST_CLIENTS = 256
_BACKLOG = 64
_READ_BYTES = 1 << 16
_QUESTION_BYTES = 64
_PEER = struct.Struct("3i")


class Client:
    """One gate worker's connection."""

    def __init__(self, sock: socket.socket, pid: int, limit: int) -> None:
        self.sock, self.pid = sock, pid
        self.dropped = 0  #: messages that its queue had no room for
        self.reported: dict[str, int] = {}  #: the counters that it was told last
        self.questions = Messages(_QUESTION_BYTES)
        self._limit = limit
        self._queue = bytearray()

    @property
    def waiting(self) -> bool:
        """Say whether something is queued."""
        return bool(self._queue)

    def send(self, data: bytes | bytearray, count: int) -> None:
        """Send `count` whole messages, or queue them, or drop them all; OSError when it is gone."""
        if self._queue:
            if len(self._queue) + len(data) > self._limit:
                self.dropped += count
            else:
                self._queue += data
            return
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self._queue += memoryview(data)[sent:]

    def flush(self) -> None:
        """Send what is queued as far as it goes; OSError when the client is gone."""
        with contextlib.suppress(BlockingIOError):
            while self._queue:
                sent = self.sock.send(memoryview(self._queue)[:_READ_BYTES])
                del self._queue[:sent]


class Server:
    """The listening socket and its clients, on the sensor's epoll."""

    def __init__(
        self,
        path: Path,
        poll: select.epoll,
        hello: bytes,
        asked: Callable[[int], Iterable[bytes]],
        came: Callable[[int], list[bytes]],
        queue_bytes: int = QUEUE_BYTES,
    ) -> None:
        """Listen at `path`, 0600; a socket that a dead sensor left is replaced.

        `asked` answers a question with whole messages; `came` is told the process id of each
        client, and returns the messages that follow HELLO.
        """
        self._poll, self._hello, self._asked, self._came = poll, hello, asked, came
        self._path, self._queue_bytes = path, queue_bytes
        self._clients: dict[int, Client] = {}
        self._counters: dict[str, int] = {}
        self.dropped = 0  #: messages that clients lost who are gone
        self._listener = _listening(path)
        poll.register(self._listener, select.EPOLLIN)

    @property
    def clients(self) -> list[Client]:
        """Return who is connected."""
        return list(self._clients.values())

    def ready(self, fd: int, what: int) -> bool:
        """Handle an event of the poll; False when the descriptor is none of ours."""
        if fd == self._listener.fileno():
            self._accept()
            return True
        client = self._clients.get(fd)
        if client is None:
            return False
        try:
            if what & select.EPOLLOUT:
                client.flush()
                self._settle(client)
            if what & ~select.EPOLLOUT:
                self._read(client)
        except (OSError, ValueError, struct.error) as wrong:
            self._leave(client, wrong)
        return True

    def broadcast(self, data: bytes | bytearray, count: int = 1) -> None:
        """Give every client `count` whole messages."""
        for client in self.clients:
            self._give(client, data, count)

    def report(self, counters: dict[str, int]) -> None:
        """Tell every client the loss counters, if they changed for it."""
        self._counters = counters
        for client in self.clients:
            if not client.waiting:
                try:
                    self._settle(client)
                except OSError as wrong:
                    self._leave(client, wrong)

    def close(self) -> None:
        """Say goodbye and take the socket away."""
        for client in self.clients:
            self._leave(client, None)
        self._poll.unregister(self._listener)
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            time.sleep(0.001)  # out of descriptors: do not spin until some come back
            return
        sock.settimeout(0)
        pid, uid, _ = _PEER.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        )
        if uid not in {0, os.geteuid()} or len(self._clients) >= MOST_CLIENTS:
            log.warning("refused a client: process %d of user %d", pid, uid)
            sock.close()
            return
        client = Client(sock, pid, self._queue_bytes)
        self._clients[sock.fileno()] = client
        self._poll.register(sock, select.EPOLLIN)
        told = [self._hello, *self._came(pid)]
        self._give(client, b"".join(told), len(told))
        self.report(self._counters)

    def _give(self, client: Client, data: bytes | bytearray, count: int) -> None:
        waited = client.waiting
        try:
            client.send(data, count)
        except OSError as wrong:
            self._leave(client, wrong)
            return
        if client.waiting and not waited:
            self._poll.modify(client.sock, select.EPOLLIN | select.EPOLLOUT)

    def _settle(self, client: Client) -> None:
        """The queue may be empty now: tell what was lost meanwhile, and stop waiting for room."""
        if client.waiting:
            return
        known = self._counters | {"queue": client.dropped}
        if any(known.values()) and known != client.reported:
            client.reported = known
            client.send(events.message(Message.LOST, json.dumps(known).encode()), 1)
        wanted = select.EPOLLIN | (select.EPOLLOUT if client.waiting else 0)
        self._poll.modify(client.sock, wanted)

    def _read(self, client: Client) -> None:
        try:
            data = client.sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            raise ConnectionResetError("it closed the connection")
        for kind, body in client.questions.feed(data):
            if kind is not Message.ASK:
                raise ValueError(f"{kind.name} from a client")
            for answer in self._asked(events.handle_of(body)):
                self._give(client, answer, 1)

    def _leave(self, client: Client, wrong: Exception | None) -> None:
        if self._clients.pop(client.sock.fileno(), None) is None:
            return
        log.info("client of process %d is gone: %s", client.pid, wrong or "the sensor stops")
        self.dropped += client.dropped
        self._poll.unregister(client.sock)
        client.sock.close()


def _listening(path: Path) -> socket.socket:
    """Return the listening socket; the caller holds the lock that keeps a second sensor out."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    scratch = path.with_name(path.name + ".new")
    try:
        scratch.unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            sock.bind(str(scratch))
        finally:
            os.umask(before)
        sock.listen(_BACKLOG)
        scratch.rename(path)
    except BaseException:
        sock.close()
        raise
    return sock
