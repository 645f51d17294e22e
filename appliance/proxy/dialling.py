"""Upstream connections that are being made: none waits longer than it may, or for a client that is
gone.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from appliance.proxy.upstream import given_up

if TYPE_CHECKING:
    from appliance.proxy.loop import GateLoop
    from appliance.proxy.session import Session

TICK_S = 0.5
#: Most connections are made, or refused, long before anybody looks.
FIRST_LOOK_S = 1.0


class Dialling:
    """The sessions of one worker whose upstream connection is not made yet, oldest first."""

    def __init__(self, loop: GateLoop, timeout_s: float) -> None:
        self._loop, self._timeout_s = loop, timeout_s
        self._since: dict[Session, float] = {}
        self._ticking = False

    def add(self, session: Session) -> None:
        """Wait for `session`'s upstream socket; `Session.dialled` gets what becomes of it."""
        down = session.down
        self._loop.sockets.watch(down.fd, session.dialled)
        down.watched = True
        self._since[session] = time.monotonic()
        if not self._ticking:
            self._ticking = True
            self._loop.call_later(TICK_S, self._tick)

    def remove(self, session: Session) -> None:
        """Wait for it no more."""
        self._since.pop(session, None)

    def _tick(self) -> None:
        now = time.monotonic()
        first_look = min(FIRST_LOOK_S, self._timeout_s)
        for session, since in list(self._since.items()):
            waited = now - since
            if waited < first_look:
                break
            if waited >= self._timeout_s:
                session.close("timeout", "upstream", reset=True)
            elif given_up(session.up.source):
                session.close("reset", "client", reset=True)
        self._ticking = bool(self._since)
        if self._ticking:
            self._loop.call_later(TICK_S, self._tick)
