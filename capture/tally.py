"""What the seal keeps of an open session, and the loop over a commit's frames that keeps it.

A tally counts frames and payload and grows the session's sub-root by one leaf a commit
(docs/adr/0003). The loop is the seal's hot path: it looks at headers only, and hands the few
records that make leaves to its caller.
"""

from __future__ import annotations

from hashlib import sha256
from struct import pack
from typing import TYPE_CHECKING, Any

from capture.frames import FIRST_RECORD, HEADER, HEADER_BYTES, SESSION_BITS, session_name
from capture.merkle import Frontier
from capture.records import KINDS, Gap, Operation

if TYPE_CHECKING:
    from collections.abc import Callable, Container

    #: kind, session, time_ns, payload
    Found = Callable[[int, int, int, bytes], None]

_OPERATION = KINDS[Operation]
_GAP = KINDS[Gap]


class Tally:
    """Counts and sub-root of one open session, up to the last whole commit."""

    __slots__ = (
        "extents", "frames", "gaps", "name", "opened_ns", "operations", "records", "sizes", "tree",
    )  # fmt: skip

    def __init__(self, session: int) -> None:
        self.name = session_name(session)
        self.opened_ns = 0  #: time of its SessionOpen; 0 while that was not seen
        self.sizes = [0, 0, 0, 0]  #: payload of UP, DOWN, UP_OWN and DOWN_OWN frames
        self.frames = 0
        self.records = 0
        self.operations = 0
        self.gaps = 0
        self.tree = Frontier()
        self.extents: list[int] = []  #: start, end, start, end... in the commit that is being read

    def fold(self, where: bytes) -> None:
        """Add the leaf of the commit `where`: its SHA-256, generation and number."""
        extents = self.extents
        if extents:
            data = b"\0" + where + pack(f"<{len(extents)}I", *extents)
            self.tree.add(sha256(data).digest())
            extents.clear()

    def save(self) -> list[Any]:
        """Return the tally as JSON values."""
        return [
            self.opened_ns, *self.sizes, self.frames, self.records, self.operations, self.gaps,
            self.tree.size, b"".join(self.tree.hashes).hex(),
        ]  # fmt: skip

    @classmethod
    def load(cls, session: int, values: list[Any]) -> Tally:
        """Return the tally that `save` gave."""
        tally = cls(session)
        tally.opened_ns = values[0]
        tally.sizes = values[1:5]
        tally.frames, tally.records, tally.operations, tally.gaps = values[5:9]
        hashes = bytes.fromhex(values[10])
        tally.tree = Frontier(values[9], [hashes[at : at + 32] for at in range(0, len(hashes), 32)])
        return tally


def read_commit(
    plaintext: bytes,
    incarnation: int,
    tallies: dict[int, Tally],
    wanted: Container[int],
    found: Found,
) -> tuple[list[Tally], int]:
    """Count the frames of one commit into `tallies`, which gets an entry for each new session.

    `found` is called for each frame of a kind in `wanted`, after it was counted. Returns the
    tallies that have extents now, and where the frames end: the commit's length, if all is well.
    """
    touched: list[Tally] = []  # longer than other functions: a call for each frame would show
    unpack = HEADER.unpack_from
    size = len(plaintext)
    at = 0
    while at + HEADER_BYTES <= size:
        word, session, time_ns, _offset = unpack(plaintext, at)
        kind = (word >> 24) & 0xFF
        length = word & 0xFFFFFF
        after = at + HEADER_BYTES + ((length + 7) & ~7)
        if word >> 32 != incarnation or after > size:
            break
        if session >> SESSION_BITS == incarnation:
            tally = tallies.get(session)
            if tally is None:
                tally = tallies[session] = Tally(session)
            extents = tally.extents
            if not extents:
                touched.append(tally)
                extents += (at, after)
            elif extents[-1] == at:
                extents[-1] = after
            else:
                extents += (at, after)
            tally.frames += 1
            if kind < FIRST_RECORD:
                tally.sizes[kind - 1 & 3] += length
            else:
                tally.records += 1
                if kind == _OPERATION:
                    tally.operations += 1
                elif kind == _GAP:
                    tally.gaps += 1
        if kind in wanted:
            found(kind, session, time_ns, plaintext[at + HEADER_BYTES : at + HEADER_BYTES + length])
        at = after
    return touched, at
