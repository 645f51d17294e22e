"""Samples, medians, spreads and ratios, for people and as JSON."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Row:
    """The samples of one work over one path, in `unit`; the lower the better unless `unit` ends in
    "/s".
    """

    work: str
    path: str
    unit: str
    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Return the median of the samples."""
        return statistics.median(self.samples)

    def as_json(self) -> dict[str, Any]:
        """Return the row as one JSON object."""
        return {
            "work": self.work,
            "path": self.path,
            "unit": self.unit,
            "median": round(self.median, 4),
            "min": round(min(self.samples), 4),
            "max": round(max(self.samples), 4),
            "n": len(self.samples),
        }


@dataclass(frozen=True, slots=True)
class Ratio:
    """How the gate compares: capacity per core (peer's cost divided by ours); 1.0 is as good as the
    peer.
    """

    work: str
    peer: str
    value: float
    goal: float

    @property
    def reached(self) -> bool:
        """Say whether the goal was reached in this run."""
        return self.value >= self.goal

    def as_json(self) -> dict[str, Any]:
        """Return the ratio as one JSON object."""
        return {
            "work": self.work,
            "peer": self.peer,
            "ratio": round(self.value, 3),
            "goal": self.goal,
            "reached": self.reached,
        }


@dataclass(slots=True)
class Report:
    """Everything that one run measured."""

    machine: dict[str, Any]
    rows: dict[tuple[str, str, str], Row] = field(default_factory=dict)
    ratios: list[Ratio] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)

    def add(self, work: str, path: str, unit: str, value: float) -> None:
        """Add one sample."""
        self.rows.setdefault((work, path, unit), Row(work, path, unit)).samples.append(value)

    def compare(self, work: str, unit: str, peer: str, goal: float, *, path: str = "gate") -> None:
        """Add the ratio of `peer`'s median cost to `path`'s, paired sample by sample where counts
        agree.
        """
        ours, theirs = self.rows[work, path, unit], self.rows[work, peer, unit]
        if len(ours.samples) == len(theirs.samples):
            pairs = zip(theirs.samples, ours.samples, strict=True)
            value = statistics.median(t / o for t, o in pairs)
        else:
            value = theirs.median / ours.median
        self.ratios.append(Ratio(work, peer, value, goal))

    def as_json(self) -> dict[str, Any]:
        """Return the report as one JSON object."""
        return {
            "machine": self.machine,
            "rows": [row.as_json() for row in self.rows.values()],
            "ratios": [ratio.as_json() for ratio in self.ratios],
            "checks": self.checks,
        }

    def text(self) -> str:
        """Return the report as the tables of docs/benchmarks.md."""
        lines = ["| work | path | median | min | max | n | unit |", "|---|---|---|---|---|---|---|"]
        lines += [
            f"| {r.work} | {r.path} | {r.median:.4g} | {min(r.samples):.4g} | {max(r.samples):.4g} "
            f"| {len(r.samples)} | {r.unit} |"
            for r in self.rows.values()
        ]
        lines += ["", "| work | against | ratio | goal | |", "|---|---|---|---|---|"]
        lines += [
            f"| {r.work} | {r.peer} | {r.value:.2f}x | {r.goal:.2f}x | "
            f"{'reached' if r.reached else 'not reached'} |"
            for r in self.ratios
        ]
        return "\n".join([*lines, "", *self.checks])
