"""A client of the works http and tls: `webload.py MODE HOST PORT CA CONNECTIONS AMOUNT`.

MODE `page` asks for the small page on every connection, then reads every answer, again and again
for AMOUNT seconds; `big` fetches the large file AMOUNT times, one after the other. CA is a file of
authorities for TLS, or `-` for plain HTTP. Prints {"done", "bytes", "seconds"}. What the client
itself costs is not measured, so that plain Python will do.
"""

from __future__ import annotations

import json
import socket
import ssl
import sys
import time

BUFFER_BYTES = 1 << 20


class Client:
    """One connection that is kept."""

    def __init__(self, host: str, port: int, ca: str) -> None:
        sock = socket.create_connection((host, port), 30)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if ca != "-":
            sock = ssl.create_default_context(cafile=ca).wrap_socket(sock, server_hostname=host)
        self._sock, self._host = sock, host
        self._buffer = memoryview(bytearray(BUFFER_BYTES))

    def ask(self, path: str) -> None:
        """Send a request."""
        head = f"GET {path} HTTP/1.1\r\nHost: {self._host}\r\nUser-Agent: narrows-bench\r\n\r\n"
        self._sock.sendall(head.encode())

    def answer(self) -> int:
        """Read one answer to its end; return its bytes."""
        received, head = 0, b""
        while b"\r\n\r\n" not in head:
            head += self._sock.recv(4096)
        if not head.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"the answer is {head[:60]!r}")
        fields, _, body = head.partition(b"\r\n\r\n")
        length = int(fields.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        received = len(body)
        while received < length:
            received += self._sock.recv_into(self._buffer[: length - received])
        return len(fields) + 4 + received


def pages(clients: list[Client], seconds: float) -> tuple[int, int]:
    """Return (answers, bytes)."""
    done = size = 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for client in clients:
            client.ask("/page")
        for client in clients:
            size += client.answer()
        done += len(clients)
    return done, size


def big(clients: list[Client], times: int) -> tuple[int, int]:
    """Return (answers, bytes)."""
    size = 0
    for number in range(times):
        client = clients[number % len(clients)]
        client.ask("/big")
        size += client.answer()
    return times, size


def main() -> None:
    """Connect, then measure."""
    mode, host, port, ca, connections, amount = sys.argv[1:]
    clients = [Client(host, int(port), ca) for _ in range(int(connections))]
    started = time.monotonic()
    work = pages(clients, float(amount)) if mode == "page" else big(clients, int(amount))
    seconds = time.monotonic() - started
    print(json.dumps({"done": work[0], "bytes": work[1], "seconds": seconds}))


if __name__ == "__main__":
    main()
