"""The gate's connection to the server that the client meant to reach.

`appliance.proxy.worker` dials at accept, so that servers that speak first are heard. With `source =
"client"` the connection carries the client's own address (IP_TRANSPARENT), with a port of the
kernel's choice.

Sockets of the byte path are `socket.SocketType`: all of `socket.socket` but what costs time and is
not needed (files made of sockets, enumerations).
"""

from __future__ import annotations

import errno
import os
import socket

from appliance.proxy.tls.stream import TlsStream

IP_TRANSPARENT = 19
IPV6_TRANSPARENT = 75
IP_BIND_ADDRESS_NO_PORT = 24
_RESET = b"\1\0\0\0\0\0\0\0"  # struct linger: on, no time


def prepare(sock: socket.SocketType) -> None:
    """Set what both legs of a session need: no delay, urgent data in line, and probes that find a
    peer that is gone for good. An accepted socket has it from its listener.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def dial(target: tuple[str, int], source: str | None) -> socket.SocketType:
    """Return a socket that is connecting to `target`, from address `source` when given. OSError at
    once when it cannot.
    """
    six = ":" in target[0]
    family = socket.AF_INET6 if six else socket.AF_INET
    sock = socket.SocketType(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
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
    except BaseException:
        sock.close()
        raise
    if failed not in {0, errno.EINPROGRESS}:
        sock.close()
        raise OSError(failed, os.strerror(failed))
    return sock


def why(failed: int) -> str:
    """Return the SessionClose reason of an upstream connection that failed with errno `failed`."""
    if failed == errno.ECONNREFUSED:
        return "refused"
    if failed == errno.ETIMEDOUT:
        return "timeout"
    if failed == errno.ECONNRESET:
        return "reset"
    return "unreachable"


def given_up(sock: socket.SocketType | TlsStream) -> bool:
    """Say whether the peer of an idle connection has reset it, and left nothing to read."""
    assert not isinstance(sock, TlsStream), "TLS comes after the server was reached"
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return False  # there are bytes, or an orderly end


def abort(sock: socket.SocketType) -> None:
    """Close with a reset instead of a FIN."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    except OSError:
        pass  # the peer was faster
    sock.close()
