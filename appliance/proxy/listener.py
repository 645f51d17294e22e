"""Transparent listeners: take redirected connections in batches, and stop politely when descriptors
run out.

One pair (IPv4, IPv6) per worker, with SO_REUSEPORT so that the kernel spreads connections over the
workers. A connection's own address is the original destination; its saved SYN carries the identity
option.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from typing import TYPE_CHECKING, Any

from appliance.proxy.upstream import IP_TRANSPARENT, IPV6_TRANSPARENT, prepare

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable

BACKLOG = 4096
BATCH = 64
TCP_SAVE_SYN = 27
TCP_SAVED_SYN = 28
_PLAIN_V4 = 0x45  #: an IPv4 header without options
RETRY_S = 0.1
_OUT_OF_FILES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def open_listener(family: socket.AddressFamily, port: int) -> socket.SocketType:
    """Return a listening transparent socket on every address."""
    sock = socket.SocketType(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
        sock.setsockopt(socket.IPPROTO_TCP, TCP_SAVE_SYN, 1)
        prepare(sock)  # inherited by what is accepted
        sock.bind(("", port))
        sock.listen(BACKLOG)
        sock.setblocking(False)  # noqa: FBT003 - the method's own way
    except BaseException:
        sock.close()
        raise
    return sock


def saved_syn(sock: socket.SocketType) -> bytes:
    """Return the IP and TCP headers of the client's SYN; empty when SYN cookies answered it.
    Readable once.
    """
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, TCP_SAVED_SYN, 256)
    except OSError:
        return b""


def target_of(sock: socket.SocketType, syn: bytes) -> tuple[str, int]:
    """Return the original destination of a connection: where its SYN went, or the socket's own
    address when there is no SYN.
    """
    if len(syn) >= 40 and syn[0] == _PLAIN_V4:
        return socket.inet_ntoa(syn[16:20]), syn[22] << 8 | syn[23]
    name = sock.getsockname()
    return name[0], name[1]


class Listener:
    """Accepts on one socket and hands (socket, client's address) over.

    It stops for two reasons that do not know of each other: its owner `pause`d it, or descriptors
    ran out. Connections wait in the kernel's backlog meanwhile. It keeps one descriptor, so that
    what was accepted with the last one can still be connected: see `lend`.
    """

    def __init__(
        self, loop: AbstractEventLoop, sock: socket.SocketType,
        accepted: Callable[[socket.SocketType, tuple[Any, ...]], None],
        blocked: Callable[[int, int], None],
    ) -> None:  # fmt: skip
        """`blocked(since_ns, until_ns)` is told when accepting had to stop for want of descriptors,
        with until = 0, and when the backlog was taken again.
        """
        self._loop, self._sock, self._family = loop, sock, sock.family
        self._accepted, self._blocked = accepted, blocked
        self._since = 0  #: time since when descriptors are short
        self._paused = self._resting = False
        self._reading = self._closed = False
        self._kept = -1
        self._keep()
        self._update()

    def pause(self) -> None:
        """Leave new connections in the backlog."""
        self._paused = True
        self._update()

    def resume(self) -> None:
        """Accept again."""
        self._paused = False
        self._update()

    def close(self) -> None:
        """Stop for good; what is in the backlog is reset by the kernel."""
        if not self._closed:
            self._closed = True
            self._update()
            self._sock.close()
            self.lend()

    def lend(self) -> bool:
        """Give the kept descriptor free; say whether there was one. Nothing is accepted until it
        is back.
        """
        if self._kept < 0:
            return False
        os.close(self._kept)
        self._kept = -1
        return True

    def _keep(self) -> bool:
        if self._kept < 0:
            try:
                self._kept = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                return False
        return True

    def _update(self) -> None:
        wanted = not (self._paused or self._resting or self._closed)
        if wanted and not self._reading:
            self._loop.add_reader(self._sock.fileno(), self._ready)
        elif self._reading and not wanted:
            self._loop.remove_reader(self._sock.fileno())
        self._reading = wanted

    def _ready(self) -> None:
        # socket.accept() would make an object of the slower class.
        accept, accepted = self._sock._accept, self._accepted  # type: ignore[attr-defined]  # noqa: SLF001 - see above
        family = self._family
        for _ in range(BATCH):
            if self._kept < 0 and not self._keep():
                self._out_of_files()
                return
            try:
                fd, client = accept()
            except BlockingIOError:
                self._all_taken()
                return
            except OSError as wrong:
                if wrong.errno in _OUT_OF_FILES:
                    self._out_of_files()
                    return
                continue  # the client gave up between SYN and accept
            accepted(socket.SocketType(family, socket.SOCK_STREAM, 0, fd), client)
            if not self._reading:
                return

    def _all_taken(self) -> None:
        if self._since:
            self._blocked(self._since, time.time_ns())
            self._since = 0

    def _out_of_files(self) -> None:
        if not self._since:
            self._since = time.time_ns()
            self._blocked(self._since, 0)
        self._resting = True
        self._update()
        self._loop.call_later(RETRY_S, self._rested)

    def _rested(self) -> None:
        self._resting = False
        self._update()
