"""What the rule set counted: per purpose, and what passed a route while no gate was there.

The gate calls it at start and `narrows redirect` when it shows or removes the rules. Counters
outlive a replacement of the rules; they end with `undo`, which records them first, and with
anybody's `nft flush ruleset`, which passes nothing from then on and becomes a Gap as well.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pyroute2.netlink.exceptions import NetlinkError

from appliance.proxy.redirect import nft, routing, rules, sets
from capture.records import Gap

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_BYPASS, _ANSWER = rules.bypass_counter(""), rules.answer_counter("")
_NOTHING = (0, 0)


@contextmanager
def alone(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Be the only process that records what the kernel counted; give whether that is so.

    `folder` is the boot's memory. The gate does not wait: what it does not record now, it records
    later, unless somebody else did.
    """
    descriptor = os.open(folder / "counts.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def counted() -> dict[str, tuple[int, int]]:
    """Return (packets, bytes) of every counter; empty when nothing is applied.

    "session", "redirected", "refused" (TCP that the listener refuses), "bypass" (the list),
    "control", "quic", "spoofed", "direct" (the listener's own port), "dropped", and "allow.ROUTE",
    "bypass.ROUTE", "answer.ROUTE".
    """
    return nft.counters(rules.TABLE)


def bypass_gaps() -> list[Gap]:
    """Return one Gap record for each route that was bypassed: from its first packet until now, both
    directions.

    Nothing is reset: `settle_bypass` does that when these are recorded.
    """
    counts, since, now = counted(), _since(), time.time_ns()
    routes = {
        name.removeprefix(prefix): None
        for prefix in (_BYPASS, _ANSWER)
        for name, (packets, _) in counts.items()
        if name.startswith(prefix) and packets
    }
    return [
        _gap(
            route,
            since.get(rules.route_key(route), 0),
            now,
            counts.get(_BYPASS + route, _NOTHING),
            counts.get(_ANSWER + route, _NOTHING),
        )
        for route in routes
    ]


def settle_bypass(recorded: Iterable[Gap]) -> list[Gap]:
    """Reset the counters of recorded bypasses; return Gaps for what passed after they were read.

    The caller records those too. Read and reset are one operation in the kernel, so nothing is
    counted twice or never.
    """
    late = []
    for gap in recorded:
        _forget_since(gap.detail)
        up = nft.reset_counter(rules.TABLE, _BYPASS + gap.detail)
        down = nft.reset_counter(rules.TABLE, _ANSWER + gap.detail)
        if up[0] + down[0] > gap.packets:
            later = _gap(gap.detail, gap.until, time.time_ns(), up, down, without=gap)
            late.append(later)
    return late


def lost_counts() -> Gap | None:
    """Return the Gap of a rule set that somebody removed while the guard stands, None otherwise.

    Nothing passes from then on; but what had passed since it was last recorded is not known.
    """
    if nft.exists(rules.TABLE) or not routing.present():
        return None
    why = "the rule set is gone, and with it what it counted of bypasses and flows"
    return Gap("flow", "counts-lost", until=time.time_ns(), detail=why)


def _gap(
    route: str,
    since: int,
    until: int,
    up: tuple[int, int],
    down: tuple[int, int],
    without: Gap | None = None,
) -> Gap:
    packets, bytes_up, bytes_down = up[0] + down[0], up[1], down[1]
    if without is not None:
        packets -= without.packets
        bytes_up, bytes_down = bytes_up - without.bytes_up, bytes_down - without.bytes_down
    return Gap("route", "bypass", since, until, bytes_up, bytes_down, packets, detail=route)


def _since() -> dict[bytes, int]:
    """Return when each route's first bypassed packet came, by the age of its element."""
    now = time.time_ns()
    found = sets.elements(rules.TABLE, rules.SINCE, rules.KEEP_MS)
    return {element.key[:4]: now - element.age_ms * 1_000_000 for element in found}


def _forget_since(route: str) -> None:
    try:
        sets.forget(rules.TABLE, rules.SINCE, [rules.route_key(route)])
    except NetlinkError:
        pass  # only answers were counted, or the table is gone
