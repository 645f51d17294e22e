"""What the rule set counted: per purpose, and what passed a route while no gate was there.

The gate calls it at start and `narrows redirect` when it shows or removes the rules. Counters
outlive a replacement of the rules; they end with `undo`, and with anybody's `nft flush ruleset`,
which passes nothing from then on.
"""

from __future__ import annotations

import struct
import time
from typing import TYPE_CHECKING

from appliance.proxy.redirect import nft, rules
from capture.records import Gap

if TYPE_CHECKING:
    from collections.abc import Iterable

_BYPASS, _ANSWER = rules.bypass_counter(""), rules.answer_counter("")


def counted() -> dict[str, tuple[int, int]]:
    """Return (packets, bytes) of every counter; empty when nothing is applied.

    "session", "redirected", "refused" (TCP that the listener refuses), "bypass" (the list),
    "control", "quic", "spoofed", "direct" (the listener's own port, and link-local TCP), "dropped",
    and "allow.ROUTE", "bypass.ROUTE", "answer.ROUTE".
    """
    return nft.counters(rules.TABLE)


def bypassed() -> list[tuple[str, int, int]]:
    """Return (route, packets, bytes) of what passed from client to server unrecorded and was not
    settled yet.
    """
    return [
        (name.removeprefix(_BYPASS), packets, size)
        for name, (packets, size) in counted().items()
        if name.startswith(_BYPASS) and packets
    ]


def bypass_gaps() -> list[Gap]:
    """Return one Gap record for each route that was bypassed: from its first packet until now, both
    directions.

    Nothing is reset: `settle_bypass` does that when these are durable.
    """
    since = _since()
    answers = counted()
    return [
        _gap(
            route,
            packets,
            size,
            answers.get(_ANSWER + route, (0, 0)),
            since.get(rules.route_key(route), 0),
        )
        for route, packets, size in bypassed()
    ]


def settle_bypass(recorded: Iterable[Gap]) -> list[Gap]:
    """Reset the counters of recorded bypasses; return Gaps for what passed after they were read.

    The caller records those too. Read and reset are one operation in the kernel, so nothing is
    counted twice or never.
    """
    late = []
    for gap in recorded:
        up = nft.reset_counter(rules.TABLE, _BYPASS + gap.detail)
        down = nft.reset_counter(rules.TABLE, _ANSWER + gap.detail)
        nft.forget(rules.TABLE, rules.SINCE, [rules.route_key(gap.detail)])
        packets = up[0] + down[0] - gap.packets
        if packets > 0:
            size = up[1] - gap.bytes_up, down[1] - gap.bytes_down
            now = time.time_ns()
            late.append(
                Gap("route", "bypass", gap.until, now, *size, packets=packets, detail=gap.detail)
            )
    return late


def _gap(route: str, packets: int, size: int, answers: tuple[int, int], since: int) -> Gap:
    both = packets + answers[0]
    return Gap("route", "bypass", since, time.time_ns(), size, answers[1], both, detail=route)


def _since() -> dict[bytes, int]:
    """Return when each route's first bypassed packet came, by the age of its element."""
    now = time.time_ns()
    found = nft.elements(rules.TABLE, rules.SINCE, rules.KEEP_MS)
    return {
        element.key[: struct.calcsize("=I")]: now - element.age_ms * 1_000_000 for element in found
    }
