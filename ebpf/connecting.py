"""Connects that may still be waiting for a gate: told again to one that was not there.

A gate that starts, or comes back, has heard nothing of the clients whose SYNs were lost meanwhile.
From the second retry on a SYN carries no option, so their connect events are all that can name
them. The sensor keeps events here, and sends those of sockets that are still connecting to every
gate that is new, and to all gates every `AGAIN_S`, because a gate forgets what it could not use.

What is sent again must never stand for another connection between the same ends:

- only the newest event of a 4-tuple is kept, so an older one cannot come after it;
- a socket that connected is not in the kernel's map of connecting sockets, and is not sent again;
- when a connect event was lost, everything here is forgotten: the lost one may have been newer.

Bounded: `most` events. When there are so many, sockets that are not connecting any more go first.
The kernel is asked `LOOKS` times for each new event then, on average; what was not needed is saved
up, `MOST_LOOKS` at most, for the many that began to wait together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ebpf.events import four_tuple_of

if TYPE_CHECKING:
    from collections.abc import Callable

MOST: Final = 8192
#: How long a client tries at most: Linux sends 6 retries, and gives up after 127 s.
LONGEST_NS: Final = 130_000_000_000
#: Less than the 15 s for which `ebpf.table` keeps an event.
AGAIN_S: Final = 10.0
LOOKS: Final = 4
MOST_LOOKS: Final = 1024
_COOKIE: Final = slice(24, 32)
_TS: Final = slice(32, 40)


class Connecting:
    """The newest connect event of each 4-tuple whose socket may still be connecting."""

    def __init__(self, connects: Callable[[bytes], bool], most: int = MOST) -> None:
        """`connects` says whether a socket, by its cookie as it lies in the event, still does."""
        self._connects, self._most = connects, most
        self._events: dict[bytes, bytes] = {}
        self._looks = MOST_LOOKS

    def add(self, event: bytes) -> None:
        """Keep a CONNECT body; ValueError when it is none."""
        key = four_tuple_of(event)
        self._events.pop(key, None)
        if len(self._events) >= self._most:
            self._make_room()
        self._events[key] = event

    def waiting(self, now_ns: int) -> list[bytes]:
        """Return the events of sockets that are still connecting, and forget all others; `now_ns`
        is CLOCK_MONOTONIC.
        """
        self._events = {
            key: event
            for key, event in self._events.items()
            if now_ns - int.from_bytes(event[_TS], "little") < LONGEST_NS
            and self._connects(event[_COOKIE])
        }
        return list(self._events.values())

    def forget(self) -> None:
        """Forget everything: a newer event between the same ends was lost."""
        self._events.clear()

    def _make_room(self) -> None:
        """Forget one event: the oldest whose socket is not connecting any more, if it is found."""
        self._looks = min(self._looks + LOOKS, MOST_LOOKS)
        while self._looks:
            self._looks -= 1
            key = next(iter(self._events))
            event = self._events.pop(key)
            if not self._connects(event[_COOKIE]):
                return
            self._events[key] = event
        del self._events[next(iter(self._events))]

    def __len__(self) -> int:
        return len(self._events)
