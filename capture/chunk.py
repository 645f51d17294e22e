"""The chunk: the memory that a worker receives into, as a named tmpfs file that outlives every
process.

`capture.segment` publishes frames into chunks, `capture.committer` encrypts them from there,
`capture.recover` reads what a dead process left. A chunk file is a 64-byte header and then frames
(`capture.frames`):

    magic "NARCHUNK" | incarnation u64 | sequence u64 | base u64 | zero

`base` is the stream position of the first frame.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections import deque
from typing import TYPE_CHECKING

from capture.frames import HEADER_BYTES, padded, walk
from capture.settings import COMMIT_BYTES_SOFT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from capture.held import Held

MAGIC = b"NARCHUNK"
START = 64
HEADER = struct.Struct("<8sQQQ")


class Chunk:
    """One chunk of a living writer. `fill` is where the next frame goes; `committed` what is on
    disk already.
    """

    __slots__ = (
        "base", "commits", "committed", "fill", "held", "limit", "marks", "memory", "view", "words"
    )  # fmt: skip

    def __init__(self, path: Path, size: int) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, size)  # the memory is ours now: no fault can fail later
            self.memory = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        self.view = memoryview(self.memory)
        self.words = self.view.cast("Q")
        self.base = 0
        self.fill = START
        self.committed = START
        self.limit = START + COMMIT_BYTES_SOFT  #: the first frame that ends here or later is marked
        self.marks: deque[int] = deque()  #: ends of frames where a long commit is cut
        self.held: set[Held] = set()
        self.commits: list[tuple[int, int, int]] = []  #: (end position, generation, commit offset)

    def begin(self, incarnation: int, sequence: int, base: int) -> None:
        """Make the chunk an empty one at stream position `base`. No frame of its past can be taken
        for a new one.
        """
        self.words[START >> 3] = 0
        HEADER.pack_into(self.view, 0, MAGIC, incarnation, sequence, base)
        self.base = base
        self.fill = self.committed = START
        self.limit = START + COMMIT_BYTES_SOFT
        self.marks.clear()
        self.commits.clear()

    def mark(self, end: int) -> None:
        """Note that a frame ends at `end`, where a commit may be cut."""
        self.marks.append(end)
        self.limit = end + COMMIT_BYTES_SOFT

    def cut(self, fill: int) -> int:
        """Return where the next commit ends, at `fill` at the latest."""
        marks = self.marks
        while marks and marks[0] <= self.committed:
            marks.popleft()
        return marks[0] if marks and marks[0] < fill else fill

    @property
    def end(self) -> int:
        """Return the stream position after the last published frame."""
        return self.base + self.fill - START

    def close(self) -> None:
        """Unmap the memory; the file stays. A view that a caller still holds keeps the mapping
        alive.
        """
        with contextlib.suppress(BufferError):
            self.words.release()
            self.view.release()
            self.memory.close()


class Remains:
    """What a dead writer's chunk file holds: the stream position of its first frame, and its whole
    frames, back to back.
    """

    __slots__ = ("base", "incarnation", "plaintext")

    def __init__(self, incarnation: int, base: int, plaintext: bytes) -> None:
        self.incarnation = incarnation
        self.base = base
        self.plaintext = plaintext

    @property
    def end(self) -> int:
        """Return the stream position after the last whole frame."""
        return self.base + len(self.plaintext)

    @classmethod
    def read(cls, path: Path, incarnation: int) -> Remains | None:
        """Return the remains, or None when the file is no chunk of `incarnation` (it was being
        made).
        """
        content = path.read_bytes()
        if len(content) < START + HEADER_BYTES:
            return None
        magic, owner, _sequence, base = HEADER.unpack_from(content)
        if magic != MAGIC or owner != incarnation:
            return None
        end = START
        for *_, payload, at in walk(content, incarnation, START):
            end = at + padded(len(payload))
        return cls(incarnation, base, content[START:end])

    def pieces(self, after: int) -> Iterator[tuple[int, memoryview, int]]:
        """Yield (stream position, frames, number of frames) of what lies after position `after`,
        which is where a frame begins, in pieces of the size of a commit.
        """
        view = memoryview(self.plaintext)
        begin = end = max(after - self.base, 0)
        count = 0
        for *_, payload, at in walk(self.plaintext, self.incarnation, begin):
            end = at + padded(len(payload))
            count += 1
            if end - begin >= COMMIT_BYTES_SOFT:
                yield self.base + begin, view[begin:end], count
                begin, count = end, 0
        if count:
            yield self.base + begin, view[begin:end], count
