"""What the seal knows besides its ledger: how far it read, and the tallies of open sessions.

The ledger is the truth: its `segment` leaves say which commits are sealed. This state is a saved
shortcut, `evidence/seal.state`, as of some size of the ledger; what was sealed since is read again
without making leaves (`capture.sealer`). Without the file everything is read again.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from capture.errors import EvidenceError, FormatError
from capture.follow import BEGINNING, ENDED, Cursor
from capture.ledger import write_file
from capture.tally import Tally

if TYPE_CHECKING:
    from pathlib import Path

    from capture.ledger import Ledger

_VERSION = 2


class Cut(NamedTuple):
    """A Recovered record whose sessions are cut once the dead incarnation is read to its end."""

    incarnation: int
    generation: int
    commit: int
    time_ns: int


@dataclass(slots=True)
class SealState:
    """The seal's position. It fits the ledger exactly after each checkpoint."""

    cursors: dict[int, Cursor] = field(default_factory=dict)  #: of segments that have no end yet
    ended: set[int] = field(default_factory=set)  #: generations read to their final commit
    #: incarnation -> session -> tally
    tallies: dict[int, dict[int, Tally]] = field(default_factory=dict)
    cuts: list[Cut] = field(default_factory=list)
    config: str = ""  #: the last configuration that the log names
    damaged: set[tuple[int, int]] = field(default_factory=set)  #: generation, offset
    #: generation -> next commit to be packed, while some are and some are not
    packing: dict[int, int] = field(default_factory=dict)
    packed: set[int] = field(default_factory=set)  #: generations of which every commit is in packs

    def cursor(self, generation: int) -> Cursor:
        """Return the next commit to read."""
        if generation in self.ended:
            return ENDED
        return self.cursors.get(generation, BEGINNING)

    def advance(self, generation: int, cursor: Cursor, *, final: bool) -> None:
        """The commits before `cursor` were read; `final`: they are all that the segment has."""
        if final:
            self.ended.add(generation)
            self.cursors.pop(generation, None)
        else:
            self.cursors[generation] = cursor

    def pack(self, generation: int, commits: int, *, last: bool) -> None:
        """The first `commits` of a segment are in packs; `last`: they are all that it has."""
        if last:
            self.packed.add(generation)
            self.packing.pop(generation, None)
        else:
            self.packing[generation] = commits

    @property
    def open(self) -> int:
        """Return the number of open sessions."""
        return sum(map(len, self.tallies.values()))

    def save(self, path: Path, ledger: Ledger) -> None:
        """Write the state, which belongs to the ledger's present size."""
        value = {
            "version": _VERSION,
            "size": ledger.size,
            "root": ledger.checkpoint.root.hex(),
            "cursors": [[generation, *cursor] for generation, cursor in self.cursors.items()],
            "ended": _ranges(sorted(self.ended)),
            "tallies": [
                [incarnation, [[session, *tally.save()] for session, tally in tallies.items()]]
                for incarnation, tallies in self.tallies.items()
            ],
            "cuts": self.cuts,
            "config": self.config,
            "damaged": sorted(self.damaged),
            "packing": list(self.packing.items()),
            "packed": _ranges(sorted(self.packed)),
        }
        write_file(path, orjson.dumps(value))

    @classmethod
    def load(cls, path: Path, ledger: Ledger) -> tuple[SealState, int]:
        """Return the saved state and the ledger's size that it belongs to; (empty, 0) without one.

        EvidenceError when it belongs to no earlier state of this ledger: then the ledger was rolled
        back, and going on would give two histories one name.
        """
        with contextlib.suppress(FileNotFoundError):
            try:
                value = orjson.loads(path.read_bytes())
                if value["version"] != _VERSION:
                    return cls(), 0
                size, root = value["size"], bytes.fromhex(value["root"])
                state = cls._from(value)
            except (ValueError, KeyError, TypeError) as wrong:
                raise FormatError(f"{path} is damaged; remove it to read all again") from wrong
            if size > ledger.size or ledger.root_at(size) != root:
                raise EvidenceError(
                    f"the ledger has {ledger.size} leaves, {path} knew {size}: it was rolled back"
                )
            return state, size
        return cls(), 0

    @classmethod
    def _from(cls, value: Any) -> SealState:
        return cls(
            {generation: Cursor(*rest) for generation, *rest in value["cursors"]},
            _numbers(value["ended"]),
            {
                incarnation: {session: Tally.load(session, rest) for session, *rest in tallies}
                for incarnation, tallies in value["tallies"]
            },
            [Cut(*cut) for cut in value["cuts"]],
            value["config"],
            {(generation, offset) for generation, offset in value["damaged"]},
            dict(value["packing"]),
            _numbers(value["packed"]),
        )


def _numbers(ranges: list[list[int]]) -> set[int]:
    return {number for low, high in ranges for number in range(low, high + 1)}


def _ranges(numbers: list[int]) -> list[list[int]]:
    """Return sorted numbers as [first, last] of each run."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return found
