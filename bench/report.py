"""Samples, medians, spreads and goals, for people and as JSON."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Row:
    """The samples of one work over one path, in `unit`."""

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

    def text(self) -> str:
        """Return the row as one of a Markdown table."""
        low, high = min(self.samples), max(self.samples)
        numbers = " | ".join(f"{value:.4g}" for value in (self.median, low, high))
        return f"| {self.work} | {self.path} | {numbers} | {len(self.samples)} | {self.unit} |"


@dataclass(frozen=True, slots=True)
class Goal:
    """One line of the goal table. `most`: the goal is an upper bound, otherwise a lower one."""

    work: str
    what: str
    value: float
    goal: float
    most: bool = False

    @property
    def reached(self) -> bool:
        """Say whether the goal was reached in this run."""
        return self.value <= self.goal if self.most else self.value >= self.goal

    def as_json(self) -> dict[str, Any]:
        """Return the goal as one JSON object."""
        return {
            "work": self.work,
            "what": self.what,
            "value": round(self.value, 3),
            "goal": self.goal,
            "bound": "at most" if self.most else "at least",
            "reached": self.reached,
        }

    def text(self) -> str:
        """Return the goal as one row of a Markdown table."""
        bound = "at most" if self.most else "at least"
        said = "reached" if self.reached else "not reached"
        return (
            f"| {self.work} | {self.what} | {self.value:.2f} | {bound} {self.goal:.2f} | {said} |"
        )


@dataclass(slots=True)
class Report:
    """Everything that one run measured."""

    machine: dict[str, Any]
    rows: dict[tuple[str, str, str], Row] = field(default_factory=dict)
    goals: list[Goal] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)

    def add(self, work: str, path: str, unit: str, value: float) -> None:
        """Add one sample."""
        self.rows.setdefault((work, path, unit), Row(work, path, unit)).samples.append(value)

    def capacity(self, work: str, unit: str, peer: str, goal: float) -> None:
        """Judge capacity per core against `peer`: its cost divided by the gate's, 1.0 is as good.

        Samples of one round stand beside each other in time, so that they are paired: the ratio is
        the median of the rounds' ratios.
        """
        ratio = self._paired(work, unit, peer, "gate")
        self.goals.append(Goal(work, f"capacity per core against {peer}", ratio, goal))

    def added(self, work: str, unit: str, peer: str, base: str, goal: float) -> None:
        """Judge what the gate adds to `base` against what `peer` adds to it; 1.0 is as much."""
        ours, theirs, without = (
            self.rows[work, path, unit].samples for path in ("gate", peer, base)
        )
        gate = statistics.median(o - w for o, w in zip(ours, without, strict=True))
        other = statistics.median(t - w for t, w in zip(theirs, without, strict=True))
        value = gate / other if other > 0 else float("inf")
        self.goals.append(Goal(work, f"{unit} added against {peer}", value, goal, most=True))

    def limit(self, work: str, unit: str, goal: float, path: str = "gate") -> None:
        """Judge the median of one path, the gate's by itself, by an upper bound."""
        row = self.rows[work, path, unit]
        self.goals.append(Goal(work, unit, row.median, goal, most=True))

    def _paired(self, work: str, unit: str, above: str, below: str) -> float:
        upper, lower = self.rows[work, above, unit].samples, self.rows[work, below, unit].samples
        return statistics.median(u / o for u, o in zip(upper, lower, strict=True))

    def as_json(self) -> dict[str, Any]:
        """Return the report as one JSON object."""
        return {
            "machine": self.machine,
            "rows": [row.as_json() for row in self.rows.values()],
            "goals": [goal.as_json() for goal in self.goals],
            "checks": self.checks,
        }

    def text(self) -> str:
        """Return the report as the tables of docs/benchmarks.md."""
        lines = [f"- {key}: {value}" for key, value in self.machine.items()]
        lines += [
            "",
            "| work | path | median | min | max | n | unit |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [row.text() for row in self.rows.values()]
        lines += ["", "| work | what | value | goal | |", "|---|---|---|---|---|"]
        lines += [goal.text() for goal in self.goals]
        return "\n".join([*lines, "", *(f"- {check}" for check in self.checks)])
