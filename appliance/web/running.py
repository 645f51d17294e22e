"""The sessions that run now, once or as server-sent events (WHATWG HTML, 9.2).

The workers are asked at most once a second, however many listen. Each listener is told of the
differences to what it was told before; one that does not take them is let go.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, TypedDict

from aiohttp import web

from appliance import live
from appliance.live import RunningObject  # noqa: TC001 - parameters and answers are described at run time
from appliance.web.problem import Problem
from appliance.web.reading import BUSY_HEADERS
from appliance.web.routes import Nothing, Route
from appliance.web.tokens import Right
from capture import plainjson

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from appliance.web.reading import Opened, Reading
    from appliance.web.review import Review
    from appliance.web.routes import Asked

EVENTS = "text/event-stream"
PACE_S = 1.0
ALIVE_S = 15.0
WRITE_S = 20.0
MOST_LISTENERS = 32


class Workers(TypedDict):
    """How many gate workers are there, and how many of them did not answer."""

    there: int
    silent: int


class Running(TypedDict):
    """The sessions that run now, as the gate's workers count them."""

    items: list[RunningObject]
    workers: Workers


class Feed:
    """What runs, as of a moment ago."""

    def __init__(self, reading: Reading, run: Path) -> None:
        self._reading, self._run = reading, run
        self._asking = asyncio.Lock()
        self._asked_at = -PACE_S
        self._known: Running = {"items": [], "workers": {"there": 0, "silent": 0}}
        self.listeners = 0

    async def now(self) -> Running:
        """Return what runs; asked anew when the last answer is a second old."""
        async with self._asking:
            if time.monotonic() - self._asked_at >= PACE_S:
                self._known = await self._reading.ask(self._ask)
                self._asked_at = time.monotonic()
        return self._known

    def _ask(self, opened: Opened) -> Running:
        found, silent = live.ask_all(self._run)
        return {
            "items": [live.running_object(opened.index, told) for told in found],
            "workers": {"there": len(live.workers(self._run)), "silent": len(silent)},
        }


class _Told:
    """What one listener knows."""

    def __init__(self) -> None:
        self._sessions: dict[str, RunningObject] = {}
        self._workers: Workers | None = None

    def news(self, running: Running) -> Iterator[tuple[str, str]]:
        """Yield the events (name, data) that bring the listener up to date."""
        if running["workers"] != self._workers:
            self._workers = running["workers"]
            yield "workers", plainjson.dumps(self._workers)
        current = {session["id"]: session for session in running["items"]}
        for name, session in current.items():
            if self._sessions.get(name) != session:
                yield "session", plainjson.dumps(session)
        if not running["workers"]["silent"]:  # a silent worker's sessions may still run
            for name in self._sessions.keys() - current.keys():
                yield "ended", plainjson.dumps({"id": name})
            self._sessions = current
        else:
            self._sessions |= current


async def list_running(review: Review, asked: Asked, given: Nothing) -> Running:
    """List the sessions that run now."""
    del asked, given
    return await review.feed.now()


async def follow_running(review: Review, asked: Asked, given: Nothing) -> web.StreamResponse:
    """Follow the sessions that run, as server-sent events: `session` with the object of one that
    is new or changed, `ended` with the id of one that is gone, `workers` with how many answer. A
    listener that comes back is told of everything again.
    """
    del given
    if review.feed.listeners >= MOST_LISTENERS:
        raise Problem("unavailable", "too many listeners", headers=BUSY_HEADERS)
    review.feed.listeners += 1
    try:
        response = web.StreamResponse(headers={"X-Accel-Buffering": "no"})
        response.content_type = EVENTS
        first = await review.feed.now()
        await response.prepare(asked.request)
        await _follow(review, asked, response, first)
    finally:
        review.feed.listeners -= 1
    return response


async def _follow(
    review: Review, asked: Asked, response: web.StreamResponse, running: Running
) -> None:
    told, written = _Told(), time.monotonic()
    assert asked.token is not None, "the route needs a right"
    while not review.stopping.is_set() and review.tokens.good(asked.token):
        text = "".join(f"event: {name}\ndata: {data}\n\n" for name, data in told.news(running))
        if not text and time.monotonic() - written >= ALIVE_S:
            text = ": alive\n\n"
        if text:
            async with asyncio.timeout(WRITE_S):
                await response.write(text.encode())
            written = time.monotonic()
        try:
            async with asyncio.timeout(PACE_S):
                await review.stopping.wait()
        except TimeoutError:
            running = await review.feed.now()


ROUTES = (
    Route("GET", "/live", Right.METADATA, "live", list_running),
    Route("GET", "/live/events", Right.METADATA, "live", follow_running, media=EVENTS),
)
