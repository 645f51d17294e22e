"""The run: commits of one segment that one `segment` leaf seals. Used by `capture.sealer`."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

from capture import leaves
from capture.merkle import Frontier, leaf_hash
from capture.moment import rfc3339
from capture.segfile import BLOCK

if TYPE_CHECKING:
    from pathlib import Path

    from capture.follow import Followed, Unread


class Run:
    """The commits of one segment since the last checkpoint."""

    __slots__ = ("_first", "_header", "_last", "_stream", "_tree")

    def __init__(self, followed: Followed, header: str) -> None:
        self._stream = followed.generation, followed.incarnation, followed.stream
        self._first = self._last = followed.commit
        self._header = header
        self._tree = Frontier()

    def add(self, followed: Followed) -> None:
        """Take in the next commit."""
        self._last = followed.commit
        self._tree.add(leaf_hash(followed.digest))

    @property
    def ends(self) -> bool:
        """Say whether the run has the segment's final commit."""
        return self._last.final

    @property
    def begins(self) -> bool:
        """Say whether the run has the segment's first commit."""
        return bool(self._header)

    def leaf(self) -> bytes:
        """Return the run's leaf."""
        first, last = self._first, self._last
        generation, incarnation, stream = self._stream
        leaf = leaves.Segment(
            base=first.base, commits=self._tree.size, end=last.offset + last.total_bytes,
            final=last.final, first=first.number, generation=generation, header=self._header,
            incarnation=incarnation, offset=first.offset, position=last.base + last.plain_bytes,
            root=leaves.base64_of(self._tree.root()), stream=stream, time=rfc3339(last.time_ns),
        )  # fmt: skip
        return leaves.pack(leaf)


def header_digest(path: Path) -> str:
    """Return the SHA-256 of a segment's first block."""
    with path.open("rb") as file:
        return leaves.base64_of(sha256(file.read(BLOCK)).digest())


def hot(entry: Unread, now: str) -> bytes:
    """Return the leaf of commits that were not read yet."""
    return leaves.pack(
        leaves.Hot(
            commits=len(entry.tags), first=entry.first, generation=entry.generation,
            offset=entry.offset, tags=leaves.base64_of(sha256(b"".join(entry.tags)).digest()),
            time=now,
        )
    )  # fmt: skip
