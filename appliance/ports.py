"""Ports of a route, as the configuration gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Ports:
    """A set of ports: `"all"`, or a list of ports and "low-high" ranges."""

    ranges: tuple[tuple[int, int], ...] = ((1, 65535),)

    def __contains__(self, port: int) -> bool:
        return any(low <= port <= high for low, high in self.ranges)

    @classmethod
    def parse(cls, value: Any) -> Ports:
        """Return the set that a TOML value means; ValueError otherwise."""
        if value == "all":
            return cls()
        if not isinstance(value, list) or not value:
            raise ValueError('ports are "all" or a list such as [5432, "8000-8100"]')
        ranges = []
        for item in value:
            low, _, high = str(item).partition("-")
            if isinstance(item, bool) or not low.isdecimal() or (high and not high.isdecimal()):
                raise ValueError(f"{item!r} is no port")
            pair = (int(low), int(high or low))
            if not 1 <= pair[0] <= pair[1] <= 65535:
                raise ValueError(f"{item!r} is no port range")
            ranges.append(pair)
        return cls(tuple(sorted(ranges)))
