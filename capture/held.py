"""Held: bytes of a frame that a slow peer has not taken yet.

The session driver keeps one for each stalled direction. While the chunk is there, the bytes come
from it; when the chunk is used again, they are read back from the segment, so that a peer that
never reads holds no memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from capture.chunk import Chunk

    #: (generation, offset of a commit) -> its base position and its plaintext
    ReadBack = Callable[[int, int], tuple[int, memoryview]]


class Held:
    """`length` payload bytes at stream position `start`; `view` gives them, `release` ends the
    claim.
    """

    __slots__ = ("_chunk", "_read_back", "_where", "length", "start")

    def __init__(self, chunk: Chunk, start: int, length: int, read_back: ReadBack) -> None:
        self.start = start
        self.length = length
        self._chunk: Chunk | None = chunk
        self._where: tuple[int, int] | None = None
        self._read_back = read_back
        chunk.held.add(self)

    def view(self) -> memoryview:
        """Return the bytes; valid until control returns to the event loop."""
        if self._chunk is not None:
            at = self.start - self._chunk.base + 64
            return self._chunk.view[at : at + self.length]
        assert self._where is not None
        generation, offset = self._where
        base, plaintext = self._read_back(generation, offset)
        return plaintext[self.start - base : self.start - base + self.length]

    def advance(self, count: int) -> None:
        """Drop the first `count` bytes: they were sent."""
        self.start += count
        self.length -= count

    def move_out(self, commits: list[tuple[int, int, int]]) -> None:
        """The chunk is about to be used again: remember which commit holds the bytes."""
        assert self._chunk is not None
        for end, generation, offset in commits:
            if self.start < end:
                self._where = (generation, offset)
                break
        self._chunk = None

    def release(self) -> None:
        """End the claim."""
        if self._chunk is not None:
            self._chunk.held.discard(self)
            self._chunk = None
        self.length = 0
