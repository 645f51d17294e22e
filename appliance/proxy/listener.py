"""Transparent listeners: take redirected connections in batches, and stop politely when descriptors
run out.

One pair (IPv4, IPv6) per worker, with SO_REUSEPORT so that the kernel spreads connections over the
workers. A connection's own address is the original destination; its saved SYN carries the identity
option.
"""

from __future__ import annotations

import errno
import socket
import time
from typing import TYPE_CHECKING

from appliance.proxy.upstream import IP_TRANSPARENT, IPV6_TRANSPARENT

if TYPE_CHECKING:
    from collections.abc import Callable

    from appliance.proxy.loop import Loop

BACKLOG = 4096
BATCH = 64
TCP_SAVE_SYN = 27
TCP_SAVED_SYN = 28
RETRY_S = 0.1
_OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def open_listener(family: socket.AddressFamily, port: int) -> socket.socket:
    """Return a listening transparent socket on every address."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
        sock.setsockopt(socket.IPPROTO_TCP, TCP_SAVE_SYN, 1)
        sock.bind(("", port))
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def saved_syn(sock: socket.socket) -> bytes:
    """Return the IP and TCP headers of the client's SYN; empty when SYN cookies answered it.
    Readable once.
    """
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, TCP_SAVED_SYN, 256)
    except OSError:
        return b""


class Listener:
    """Accepts on one socket and hands (socket, client, target) over."""

    def __init__(
        self, loop: Loop, sock: socket.socket, accepted: Callable[[socket.socket, tuple[str, int]], None],
        blocked: Callable[[int, int], None],
    ) -> None:  # fmt: skip
        """`blocked(since_ns, until_ns)` is told when accepting had to stop for want of
        descriptors.
        """
        self._loop, self._sock = loop, sock
        self._accepted, self._blocked = accepted, blocked
        self._since = 0
        self._paused = False
        self._closed = False
        loop.add_reader(sock.fileno(), self._ready)

    def pause(self) -> None:
        """Leave new connections in the backlog."""
        if not self._paused and not self._closed:
            self._paused = True
            self._loop.remove_reader(self._sock.fileno())

    def resume(self) -> None:
        """Accept again."""
        if self._paused and not self._closed:
            self._paused = False
            self._loop.add_reader(self._sock.fileno(), self._ready)

    def close(self) -> None:
        """Stop for good; what is in the backlog is reset by the kernel."""
        if not self._closed:
            self.pause()
            self._closed = True
            self._sock.close()

    def _ready(self) -> None:
        for _ in range(BATCH):
            if self._paused:
                return
            try:
                sock, client = self._sock.accept()
            except BlockingIOError:
                return
            except OSError as wrong:
                if wrong.errno in _OUT_OF_FILES:
                    self._out_of_files()
                    return
                continue  # the client gave up between SYN and accept
            if self._since:
                self._blocked(self._since, time.time_ns())
                self._since = 0
            self._accepted(sock, client)

    def _out_of_files(self) -> None:
        self._since = self._since or time.time_ns()
        self.pause()
        self._loop.call_later(RETRY_S, self.resume)
