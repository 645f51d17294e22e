"""The chunk: the memory that a worker receives into, as a named tmpfs file that outlives every
process.

`capture.segment` publishes frames into chunks, `capture.committer` encrypts them from there,
`capture.recover` reads what a dead process left. A chunk file is a 64-byte header and then frames
(`capture.frames`):

    magic "NARCHUNK" | incarnation u64 | sequence u64 | base u64: stream position of the first frame | zero
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from typing import TYPE_CHECKING

from capture.frames import HEADER_BYTES, walk

if TYPE_CHECKING:
    from pathlib import Path

    from capture.held import Held

MAGIC = b"NARCHUNK"
START = 64
HEADER = struct.Struct("<8sQQQ")


class Chunk:
    """One chunk of a living writer. `fill` is where the next frame goes; `committed` what is on
    disk already.
    """

    __slots__ = ("base", "commits", "committed", "fill", "held", "memory", "view", "words")

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
        self.commits.clear()

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
    """What a dead writer's chunk file holds: its base and its whole frames."""

    __slots__ = ("base", "frames", "plaintext")

    def __init__(self, base: int, plaintext: bytes, frames: int) -> None:
        self.base = base
        self.plaintext = plaintext  #: the published frames, back to back
        self.frames = frames

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
        end, frames = START, 0
        for *_rest, payload, at in walk(content, incarnation, START):
            end = at + HEADER_BYTES + ((len(payload) + 7) & ~7)
            frames += 1
        return cls(base, content[START:end], frames)
