"""Takes the connections of the review API, and bounds them: how many there are, how many of one
address, how long a handshake takes, and how long one may be without a request.

asyncio would take any number and let each sit in its handshake; aiohttp lets a connection wait for
ever for the end of a request's head.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Callable

    from aiohttp import web

    from appliance.web.malformed import Protocol

log = logging.getLogger("narrows.review")

IDLE_S = 30.0
HANDSHAKE_S = 10.0
SHUTDOWN_S = 5.0
GRACE_S = 0.5
MOST = 512
MOST_OF_PEER = 128
RETRY_S = 0.1


class Connections:
    """Every connection, from before its handshake, and when each last had a request."""

    def __init__(self, idle_s: float = IDLE_S) -> None:
        self.idle_s, self.most, self.most_of_peer = idle_s, MOST, MOST_OF_PEER
        self.turned_away = 0
        self._peers: Counter[str] = Counter()
        self._serving: set[asyncio.Task[None]] = set()
        self._spoke: dict[web.RequestHandler, float] = {}

    @property
    def count(self) -> int:
        """Return how many there are, those that are still in their handshake too."""
        return len(self._serving)

    def began(self, connection: web.RequestHandler) -> None:
        """A request is being answered: it may take as long as it takes."""
        if connection in self._spoke:
            self._spoke[connection] = math.inf

    def ended(self, connection: web.RequestHandler) -> None:
        """It was answered."""
        if connection in self._spoke:
            self._spoke[connection] = time.monotonic()

    async def accept(
        self, listening: socket.socket, tls: ssl.SSLContext, made: Callable[[], Protocol]
    ) -> None:
        """Take connections until cancelled; one too many is closed before it costs a handshake."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(listening)
            except OSError as refused:  # no descriptors; or it was reset while it waited
                log.warning("a connection cannot be taken: %s", refused)
                await asyncio.sleep(RETRY_S)
                continue
            peer = str(address[0])
            if self.count >= self.most or self._peers[peer] >= self.most_of_peer:
                self.turned_away += 1
                sock.close()
                continue
            self._peers[peer] += 1
            task = asyncio.create_task(self._serve(sock, peer, tls, made))
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)

    async def _serve(
        self, sock: socket.socket, peer: str, tls: ssl.SSLContext, made: Callable[[], Protocol]
    ) -> None:
        loop = asyncio.get_running_loop()
        protocol = made()
        self._spoke[protocol] = time.monotonic()
        transport: asyncio.Transport | None = None
        try:
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol, sock, ssl=tls, ssl_handshake_timeout=HANDSHAKE_S,
                ssl_shutdown_timeout=SHUTDOWN_S,
            )  # fmt: skip
            await protocol.gone
        except OSError:
            pass  # no TLS, or none in time
        finally:
            if transport is not None and not protocol.gone.done():
                transport.abort()  # it does not take the end of TLS in time
            del self._spoke[protocol]
            self._peers[peer] -= 1
            if not self._peers[peer]:
                del self._peers[peer]

    async def close(self) -> None:
        """End every connection, those that take no more at once; call it when none are taken."""
        if self._serving:
            _, late = await asyncio.wait(self._serving, timeout=GRACE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        for _ in range(2):
            await asyncio.sleep(0)  # asyncio closes a socket one turn after its transport

    async def sweep(self) -> None:
        """Close those that say nothing, or only half of a request."""
        while True:
            await asyncio.sleep(min(1.0, self.idle_s))
            since = time.monotonic() - self.idle_s
            for connection, spoke in list(self._spoke.items()):
                if spoke < since and connection.transport is not None:
                    connection.transport.abort()
