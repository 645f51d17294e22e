"""What the handlers of the review API share: the evidence, the recorder, the tokens, what runs.

`appliance.web.server` makes one and serves it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any

from appliance.web.connections import Connections
from appliance.web.failures import Failures
from appliance.web.health import Counts, Pulse
from appliance.web.reading import Reading
from appliance.web.recorder import Recorder
from appliance.web.running import Feed
from appliance.web.tokens import Tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from aiohttp import web

    from appliance.config import Config
    from appliance.web.reading import Opened
    from capture.crypt import Keys
    from capture.store import Store

WRITE_S = 30.0  #: how long a reader may take for one piece


class Review:
    """One review process; made on its loop."""

    def __init__(
        self, config: Config, store: Store, keys: Keys, description: dict[str, Any]
    ) -> None:
        self.description = description  #: openapi.json, worked out once
        self.run: Path = config.paths.run
        self.reading = Reading(store, keys)
        self.recorder = Recorder(store, keys, config.sha256)
        self.tokens = Tokens(config.paths.state)
        self.feed = Feed(self.reading, self.run)
        self.failures = Failures()
        self.strangers = Failures()  #: lines in the log that nobody with a good token caused
        self.connections = Connections()
        self.counts = Counts()
        self.pulse = Pulse()
        self.answered: Counter[str] = Counter()  #: requests by status
        self.stopping = asyncio.Event()

    def refused(self, status: str, peer: str) -> bool:
        """Count an answer to one who has no good token; say whether it may go to the log: what
        anybody can cause is bounded.
        """
        self.answered[status] += 1
        return self.strangers.add(peer)

    def close(self) -> None:
        """End the threads; what was read is in the evidence."""
        self.reading.close()
        self.recorder.close()

    async def send(
        self, request: web.Request, response: web.StreamResponse,
        content: Callable[[Opened], Iterator[bytes]],
    ) -> web.StreamResponse:  # fmt: skip
        """Send something long. One who does not take a piece within half a minute is let go, and
        so is everybody when the process ends: the answer is then seen to be cut.
        """
        pieces = self.reading.pieces(content)
        try:
            first = await anext(pieces, b"")  # what is wrong is told before the answer begins
            await response.prepare(request)
            await self._write(response, first)
            async for piece in pieces:
                await self._write(response, piece)
                if self.stopping.is_set():
                    raise ConnectionResetError("the review process ends")
            await response.write_eof()
        finally:
            await pieces.aclose()
        return response

    async def _write(self, response: web.StreamResponse, piece: bytes) -> None:
        async with asyncio.timeout(WRITE_S):
            await response.write(piece)
