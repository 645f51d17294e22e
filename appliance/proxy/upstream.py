"""The gate's connection to the server that the client meant to reach.

`appliance.proxy.session` dials at accept, so that servers that speak first are heard. With `source
= "client"` the connection carries the client's own address (IP_TRANSPARENT), with a port of the
kernel's choice.
"""

from __future__ import annotations

import errno
import os
import socket

IP_TRANSPARENT = 19
IPV6_TRANSPARENT = 75
IP_BIND_ADDRESS_NO_PORT = 24


def prepare(sock: socket.socket) -> None:
    """Set what both legs of a session need: no delay, urgent data in line, non-blocking."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)


def dial(target: tuple[str, int], source: str | None) -> socket.socket:
    """Return a socket that is connecting to `target`, from address `source` when given. OSError at
    once when it cannot.
    """
    six = ":" in target[0]
    sock = socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_STREAM)
    try:
        prepare(sock)
        if source is not None:
            if six:
                sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
            sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind((source, 0))
        failed = sock.connect_ex(target)
        if failed not in (0, errno.EINPROGRESS):
            raise OSError(failed, os.strerror(failed))
    except BaseException:
        sock.close()
        raise
    return sock


def abort(sock: socket.socket) -> None:
    """Close with a reset instead of a FIN."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    except OSError:
        pass  # the peer was faster
    sock.close()
