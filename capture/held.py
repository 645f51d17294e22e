"""Held: bytes of a frame that a slow peer has not taken yet.

The session driver keeps one for each stalled direction. While the chunk is there, the bytes come
from it; when the chunk is used again, they are read back from the segment, so that a peer that
never reads holds no memory.
"""

from __future__ import annotations

from bisect import bisect_right
from operator import itemgetter
from typing import TYPE_CHECKING

from capture.chunk import START
from capture.errors import EvidenceError
from capture.segments import open_segment

if TYPE_CHECKING:
    from capture.chunk import Chunk
    from capture.crypt import Keys
    from capture.segments import AnySegment
    from capture.store import Store

_END = itemgetter(0)


class Held:
    """`length` payload bytes at stream position `start`; `view` gives them, `release` ends the
    claim.
    """

    __slots__ = ("_chunk", "_commits", "_where", "length", "start")

    def __init__(self, chunk: Chunk, start: int, length: int, commits: ReadBack) -> None:
        self.start = start
        self.length = length
        self._chunk: Chunk | None = chunk
        self._where = (0, 0)
        self._commits = commits
        chunk.held.add(self)

    def view(self) -> memoryview:
        """Return the bytes; valid until control returns to the event loop. EvidenceError when the
        disk does not give them back.
        """
        if self._chunk is not None:
            at = self.start - self._chunk.base + START
            return self._chunk.view[at : at + self.length]
        base, frames = self._commits.read(*self._where)
        return frames[self.start - base : self.start - base + self.length]

    def advance(self, count: int) -> None:
        """Drop the first `count` bytes: they were sent."""
        self.start += count
        self.length -= count

    def move_out(self) -> None:
        """The chunk is about to be used again: remember which commit holds the bytes. A frame is
        never cut by commits.
        """
        assert self._chunk is not None
        commits = self._chunk.commits
        _, *where = commits[bisect_right(commits, self.start, key=_END)]
        self._where = (where[0], where[1])
        self._chunk = None

    def release(self) -> None:
        """End the claim."""
        if self._chunk is not None:
            self._chunk.held.discard(self)
            self._chunk = None
        self.length = 0


class ReadBack:
    """Reads commits of one writer's own segments; the last one is kept, for its neighbours."""

    __slots__ = ("_commit", "_frames", "_keys", "_reader", "_store")

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store, self._keys = store, keys
        self._reader: AnySegment | None = None
        self._commit = (0, 0)
        self._frames = (0, memoryview(b""))

    def read(self, generation: int, offset: int) -> tuple[int, memoryview]:
        """Return a commit's stream position and its frames. EvidenceError when it is not there."""
        if self._commit == (generation, offset):
            return self._frames
        try:
            reader = self._open(generation)
            commit = reader.commit_at(offset)
            if commit is None:
                raise EvidenceError(f"segment {generation:08x} lost its commit at {offset}")
            self._frames = (commit.base, memoryview(reader.plaintext(commit)))
        except OSError as wrong:
            raise EvidenceError(f"segment {generation:08x}: {wrong.strerror}") from wrong
        self._commit = (generation, offset)
        return self._frames

    def _open(self, generation: int) -> AnySegment:
        if self._reader is None or self._reader.header.generation != generation:
            self.close()
            self._reader = open_segment(self._store, generation, self._keys)
        return self._reader

    def close(self) -> None:
        """Close the segment that was read last, and forget what was read."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        self._commit = (0, 0)
        self._frames = (0, memoryview(b""))
