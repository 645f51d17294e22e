"""One work over several paths, in turn, round after round: the noise of a moment hits all of them.

The works (`bench.works`, `bench.pg`) say how a load is run; this says how it is measured.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench.accounting import cpu_seconds, until_idle

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.report import Report
    from bench.stage import Stage

DIRECT = "direct"


@dataclass(frozen=True, slots=True)
class Load:
    """What a client program did: so many units in `seconds`; `extra` are samples by their unit."""

    units: float
    seconds: float
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Work:
    """`scale` is ("s", 1.0) or ("us", 1e6): how the CPU of one unit is printed."""

    name: str
    unit: str
    plural: str
    scale: tuple[str, float]
    paths: tuple[str, ...]
    run: Callable[[str], Load]

    @property
    def cost(self) -> str:
        """Return the unit of the proxy's cost."""
        return f"CPU-{self.scale[0]}/{self.unit}"


def interleaved(stage: Stage, report: Report, work: Work, rounds: int) -> None:
    """Run every proxy once uncounted, then `rounds` times counted, each round from another
    start.
    """
    for path in work.paths:
        if path != DIRECT:
            _once(stage, None, work, path)
    for number in range(rounds):
        first = number % len(work.paths)
        for path in work.paths[first:] + work.paths[:first]:
            _once(stage, report, work, path)


def _once(stage: Stage, report: Report | None, work: Work, path: str) -> None:
    stage.use(path)
    behind = stage.behind if path == "gate" else ()
    own = () if path == DIRECT else (stage.group(path),)
    started = time.monotonic()
    own_before, behind_before = cpu_seconds(*own), cpu_seconds(*behind)
    load = work.run(path)
    own_s = cpu_seconds(*own) - own_before
    ended = until_idle(behind) if behind else started
    if report is None:
        return
    _, scale = work.scale
    report.add(work.name, path, f"{work.plural}/s", load.units / load.seconds)
    for unit, value in load.extra.items():
        report.add(work.name, path, unit, value)
    if own:
        report.add(work.name, path, work.cost, own_s / load.units * scale)
    if behind:
        whole_s = own_s + cpu_seconds(*behind) - behind_before
        report.add(work.name, "whole appliance", work.cost, whole_s / load.units * scale)
        sustained = load.units / max(ended - started, load.seconds)
        report.add(work.name, "whole appliance", f"{work.plural}/s", sustained)
