"""Socket to owner: what the sensor said, kept for a while; pure, bounded, expiring.

The gate feeds it with OWNER and CONNECT messages and asks it when a connection is accepted. Time is
passed in, so that tests need no clock. Both maps forget the oldest entry when they are full: an
owner that was forgotten can be asked for again, a connection that was forgotten is `Unknown` and
never someone else's.

A 4-tuple is used again by the next connection from the same port. If that one's event were lost,
the old entry would name the wrong process, so connections live a short time, `take` removes what
was used, and `forget_connects` is for the moment when the sensor reports lost connect events.

Events come for every connection of every host, and are needed for the few whose SYN lost its
option: an event is kept as the bytes that came, under those 36 of them that are the 4-tuple.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from ebpf.events import four_tuple_of

NS = 1_000_000_000
_EVENT = struct.Struct("<QQ16xQ")  #: handle, cgroup and time at the start of a connect event


class Connected(NamedTuple):
    """Who opened a connection: `ts` is CLOCK_MONOTONIC, `cgroup_id` that of the caller."""

    handle: int
    cgroup_id: int
    ts: int


class OwnerTable:
    """Owners by handle, handles by 4-tuple (`ebpf.events.four_tuple`)."""

    def __init__(
        self,
        owners: int = 16_384,
        connects: int = 65_536,
        owner_ns: int = 3600 * NS,
        connect_ns: int = 15 * NS,
    ) -> None:
        self._most_owners = owners
        self._most_connects = connects
        self._owner_ns = owner_ns
        self._connect_ns = connect_ns
        self._owners: dict[int, tuple[int, dict[str, Any]]] = {}
        self._connects: dict[bytes, tuple[int, bytes]] = {}
        self.evicted_owners = 0  #: pushed out by newer ones before their time
        self.evicted_connects = 0

    def add_owner(self, handle: int, owner: dict[str, Any], now_ns: int) -> None:
        """Keep an owner record; a later one for the same handle replaces it."""
        self._owners.pop(handle, None)
        if len(self._owners) >= self._most_owners:
            del self._owners[next(iter(self._owners))]
            self.evicted_owners += 1
        self._owners[handle] = (now_ns + self._owner_ns, owner)

    def add_connect(self, event: bytes, now_ns: int) -> bytes:
        """Keep who opened a connection (a CONNECT body) and return its 4-tuple; a later event with
        the same one replaces it. ValueError when it is no such body.
        """
        key = four_tuple_of(event)
        self._connects.pop(key, None)
        if len(self._connects) >= self._most_connects:
            del self._connects[next(iter(self._connects))]
            self.evicted_connects += 1
        self._connects[key] = (now_ns + self._connect_ns, event)
        return key

    def by_handle(self, handle: int, now_ns: int | None = None) -> dict[str, Any] | None:
        """Return the owner record of a handle; with `now_ns`, only if it has not expired."""
        found = self._owners.get(handle)
        if found is None or (now_ns is not None and found[0] <= now_ns):
            return None
        return found[1]

    def take(self, key: bytes, now_ns: int | None = None) -> Connected | None:
        """Return who opened a connection and forget it: the port may serve someone else next.
        With `now_ns`, only if it has not expired.
        """
        found = self._connects.pop(key, None)
        if found is None or (now_ns is not None and found[0] <= now_ns):
            return None
        return Connected(*_EVENT.unpack_from(found[1]))

    def forget(self, key: bytes) -> None:
        """Forget a connection whose owner is known from its SYN."""
        self._connects.pop(key, None)

    def expire(self, now_ns: int) -> int:
        """Forget what is too old; return how many entries went. Costs nothing when none is due."""
        return _expired(self._owners, now_ns) + _expired(self._connects, now_ns)

    def forget_connects(self) -> None:
        """Forget every connection: events were lost, so that an old entry may hide a newer one."""
        self._connects.clear()

    def __len__(self) -> int:
        return len(self._owners) + len(self._connects)


def _expired(entries: dict[Any, tuple[int, Any]], now_ns: int) -> int:
    """Remove from the old end: one lifetime a kind keeps entries in the order of expiry."""
    gone = 0
    for key in list(_due(entries, now_ns)):
        del entries[key]
        gone += 1
    return gone


def _due(entries: dict[Any, tuple[int, Any]], now_ns: int) -> Any:
    for key, (until, _) in entries.items():
        if until > now_ns:
            return
        yield key
