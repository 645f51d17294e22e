"""Flow records: what passed that is not TCP, per client, protocol and port, with nothing lost and
nothing counted twice.

Gate worker 0 calls `record_flows` at a fixed pace and at its stop. The kernel counts in one of two
sets per IP version; a turn makes the rules count in the other, in one transaction, and then reads
the one that no rule touches any more:

    rules -> a   b is empty
    turn         rules -> b, read a, record what it had, forget the keys that are recorded
    turn         rules -> a, read b, ...

Keys that could not be recorded stay, and count on after the next turn. A set outlives this process:
what it did not record, the next one does. A process that dies between a record and the forgetting
(at most BATCH keys) leaves these to be recorded once more.
"""

from __future__ import annotations

import asyncio
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from appliance.proxy.redirect import nft, rules, sets
from appliance.proxy.redirect.family import FAMILIES, Family
from capture.records import Flow

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CROWD = rules.FLOW_SIZE // 4  #: so many flows in one turn ask for the next one soon
BATCH = sets.ELEMENTS_AT_ONCE
QUIET_S = 0.05  # longer than a packet is on its way through rules that were just replaced
_TRIES = 5
_NAMES = {17: "udp", 1: "icmp", 58: "icmp"}


@dataclass(frozen=True, slots=True)
class CountedFlow:
    """One key of a flow set, and the record that says what it counted."""

    flow: Flow
    set_name: str
    key: bytes


class FlowMeter:
    """Turns the kernel's flow sets and reads them. Every call blocks, on netlink."""

    def turn(self) -> list[CountedFlow]:
        """Make the rules count in the other sets; return what these counted, client by client.

        Empty when no redirect is applied. Raises NetlinkError.
        """
        quiet = self._swap()
        if not quiet:
            return []
        until = time.time_ns()
        time.sleep(QUIET_S)
        return _read(quiet, until)

    def rest(self) -> list[CountedFlow]:
        """Return what all sets counted, when no rule counts any more (`redirect.close`)."""
        time.sleep(QUIET_S)
        until = time.time_ns()
        return [*_read("a", until), *_read("b", until)]

    def forget(self, counted: Sequence[CountedFlow]) -> None:
        """Remove what is recorded from the sets, BATCH keys at most. Raises NetlinkError."""
        for name in {entry.set_name for entry in counted}:
            sets.forget(rules.TABLE, name, [e.key for e in counted if e.set_name == name])

    def _swap(self) -> str:
        """Make the rules count in the other sets; return the generation that is quiet now, or ""
        when there are no rules, or somebody else keeps changing them.
        """
        for _ in range(_TRIES):
            old = nft.rules_in(rules.TABLE, rules.FLOW_CHAINS)
            if not old.get("up4"):
                return ""
            active = rules.generation(old)
            other = "b" if active == "a" else "a"
            new = {k: v for family in FAMILIES for k, v in rules.flow_chains(family, other).items()}
            try:
                nft.rewrite(rules.TABLE, old, new)
            except nft.Overtaken:
                continue
            return active
        return ""


async def record_flows(meter: FlowMeter, record: Callable[[Flow], object]) -> int:
    """Turn the sets and record what they counted; return how many flows that were.

    What `record` raises comes out after that what was recorded before is forgotten.
    """
    counted = await asyncio.to_thread(meter.turn)
    for at in range(0, len(counted), BATCH):
        done: list[CountedFlow] = []
        try:
            for entry in counted[at : at + BATCH]:
                record(entry.flow)
                done.append(entry)
        finally:
            await asyncio.to_thread(meter.forget, done)
    return len(counted)


def _read(generation: str, until: int) -> list[CountedFlow]:
    found = []
    for family in FAMILIES:
        name, now = rules.flow_set(family.version, generation), time.time_ns()
        for element in sets.elements(rules.TABLE, name, rules.KEEP_MS):
            found.append(CountedFlow(_flow(family, element, now, until), name, element.key))
    return found


def _flow(family: Family, element: sets.Element, now: int, until: int) -> Flow:
    """Return the record of a key: address, protocol and port, the last two padded to four bytes."""
    client, rest = element.key[: family.size], element.key[family.size :]
    address = socket.inet_ntop(socket.AF_INET6 if family.version == 6 else socket.AF_INET, client)
    protocol = _NAMES.get(rest[0], str(rest[0]))
    since = min(now - element.age_ms * 1_000_000, until)
    port = int.from_bytes(rest[4:6], "big")
    return Flow(address, protocol, port, element.packets, element.bytes, since, until)
