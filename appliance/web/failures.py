"""Bounds the rate of failed authentication, per peer and over all.

A token is 256 random bits and cannot be guessed; what is bounded is the work and the log lines that
somebody without one can cause. A good token is let in whatever others at its address do.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

PER_PEER, PER_MINUTE = 10, 300
MOST_PEERS = 1024
WINDOW_S = 60.0


class Failures:
    """Failures of the last minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._count = 0
        self._peers: OrderedDict[str, int] = OrderedDict()
        self.total = 0

    def add(self, peer: str) -> bool:
        """Count one; say whether it is within the bound."""
        now = self._clock()
        if now - self._began >= WINDOW_S:
            self._began, self._count = now, 0
            self._peers.clear()
        self.total += 1
        self._count += 1
        count = self._peers[peer] = self._peers.pop(peer, 0) + 1
        if len(self._peers) > MOST_PEERS:
            self._peers.popitem(last=False)
        return count <= PER_PEER and self._count <= PER_MINUTE

    @property
    def wait_s(self) -> int:
        """Return the seconds until the next minute begins."""
        return max(int(self._began + WINDOW_S - self._clock()) + 1, 1)
