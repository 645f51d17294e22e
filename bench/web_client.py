"""The client of the works http and tls: GET over and over, for some seconds, or one long answer.

    python bench/web_client.py keep|connect ADDRESS PORT AUTHORITIES CONNECTIONS SECONDS
    python bench/web_client.py bulk ADDRESS PORT AUTHORITIES

AUTHORITIES is a file of the certificates that are trusted, or "-" without TLS. `keep` asks on
connections that stay, each as soon as it was answered; `connect` asks once a connection, so many at
a time. Prints one JSON line. Its own CPU is nobody's: the proxy's is measured.
"""

from __future__ import annotations

import json
import select
import socket
import ssl
import sys
import time
from concurrent.futures import ThreadPoolExecutor

NAME = "web.bench"  #: what the servers' certificates are for
SMALL_PATH, BULK_PATH = "/bench-small", "/bench-bulk"


def request(path: str) -> bytes:
    """Return the request that is sent for a path."""
    return f"GET {path} HTTP/1.1\r\nHost: {NAME}\r\nAccept: */*\r\n\r\n".encode()


class Client:
    """Makes connections to one server."""

    def __init__(self, address: str, port: int, authorities: str) -> None:
        self._target = (address, port)
        self._tls = None if authorities == "-" else ssl.create_default_context(cafile=authorities)

    def connect(self) -> socket.socket:
        """Return a connection, with TLS up."""
        sock = socket.create_connection(self._target, 20)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock if self._tls is None else self._tls.wrap_socket(sock, server_hostname=NAME)


def ask(sock: socket.socket, path: str) -> int:
    """Ask once, and return how many bytes the whole answer had."""
    sock.sendall(request(path))
    room = bytearray(1 << 20)
    head = b""
    while b"\r\n\r\n" not in head:
        data = sock.recv(65536)
        if not data:
            raise ConnectionError("the answer has no end")
        head += data
    lines, _, body = head.partition(b"\r\n\r\n")
    if not lines.startswith(b"HTTP/1.1 200 "):
        raise ConnectionError(f"the answer is {lines[:40]!r}")
    fields = dict(line.lower().split(b": ", 1) for line in lines.split(b"\r\n")[1:])
    left = int(fields[b"content-length"]) - len(body)
    whole = len(head) + left
    while left:
        length = sock.recv_into(room, min(left, len(room)))
        if not length:
            raise ConnectionError("the answer is cut")
        left -= length
    return whole


def keep(client: Client, connections: int, seconds: float) -> list[float]:
    """Return the seconds that each answer took, on connections that stay."""
    socks = [client.connect() for _ in range(connections)]
    (whole,) = {ask(sock, SMALL_PATH) for sock in socks}  # every answer is as long
    asked, took = request(SMALL_PATH), []
    poller = select.epoll()
    waiting: dict[int, list[float]] = {}  #: (bytes still to come, when it was asked)
    by_fd = {sock.fileno(): sock for sock in socks}
    until = time.monotonic() + seconds
    for fd, sock in by_fd.items():
        sock.setblocking(False)  # noqa: FBT003 - the method's own way
        poller.register(fd, select.EPOLLIN)
        waiting[fd] = [whole, time.monotonic()]
        sock.send(asked)
    while time.monotonic() < until:
        for fd, _ in poller.poll(20):
            sock, state = by_fd[fd], waiting[fd]
            try:
                data = sock.recv(65536)
            except (BlockingIOError, ssl.SSLWantReadError):
                continue  # a TLS record that is no data, or not whole
            if not data:
                raise ConnectionError("a connection that stays was ended")
            state[0] -= len(data)
            if state[0] <= 0:
                now = time.monotonic()
                took.append(now - state[1])
                state[:] = whole, now
                sock.send(asked)
    for sock in socks:
        sock.close()
    return took


def connect(client: Client, connections: int, seconds: float) -> list[float]:
    """Return the seconds that each connection with its one answer took."""
    until = time.monotonic() + seconds

    def again_and_again(_number: int) -> list[float]:
        took = []
        while (started := time.monotonic()) < until:
            with client.connect() as sock:
                ask(sock, SMALL_PATH)
            took.append(time.monotonic() - started)
        return took

    with ThreadPoolExecutor(connections) as pool:
        found = pool.map(again_and_again, range(connections))
        return [each for took in found for each in took]


def main(mode: str, address: str, port: str, authorities: str, *words: str) -> None:
    """Run one mode and print what it did."""
    client = Client(address, int(port), authorities)
    started = time.monotonic()
    if mode == "bulk":
        with client.connect() as sock:
            ask(sock, BULK_PATH)
        print(json.dumps({"seconds": time.monotonic() - started}))
        return
    count, seconds = int(words[0]), float(words[1])
    took = (connect if mode == "connect" else keep)(client, count, seconds)
    took.sort()
    print(
        json.dumps(
            {
                "requests": len(took),
                "seconds": seconds,
                "p50_us": round(took[len(took) // 2] * 1e6),
                "p99_us": round(took[len(took) * 99 // 100] * 1e6),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
