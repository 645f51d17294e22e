"""Bounds the connections of the review API: how many, and how long one may be without a request.

aiohttp lets a connection wait for ever for the end of a request's head; this does not.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiohttp import web

IDLE_S = 30.0
MOST = 512


class Connections:
    """When each connection last had a request."""

    def __init__(self, idle_s: float = IDLE_S, most: int = MOST) -> None:
        self.idle_s, self.most = idle_s, most
        self._spoke: dict[object, float] = {}

    def began(self, connection: object) -> None:
        """A request is being answered: it may take as long as it takes."""
        self._spoke[connection] = math.inf

    def ended(self, connection: object) -> None:
        """It was answered."""
        self._spoke[connection] = time.monotonic()

    async def sweep(self, server: web.Server) -> None:
        """Close those that say nothing, or only half of a request, and the newest of too many."""
        while True:
            await asyncio.sleep(1)
            now = time.monotonic()
            here = server.connections
            self._spoke = {each: self._spoke.get(each, now) for each in here}
            for number, each in enumerate(here):
                spoke = self._spoke[each]
                idle = now - spoke > self.idle_s
                crowd = number >= self.most and spoke is not math.inf
                if (idle or crowd) and each.transport is not None:
                    each.transport.abort()
