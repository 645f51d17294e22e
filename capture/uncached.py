"""Reads past the page cache: for whoever reads evidence once, from end to end.

`capture.follow` owns one and lends it to the readers of its segments. Segments are written with
O_DIRECT and so are in no cache: a plain read would first fill fresh pages that nobody asks for
again, which costs more than the read itself. Not for random access to the same places.
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

FIRST_BYTES = 1 << 20


class Uncached:
    """The memory that such reads go through: page-aligned, as long as the longest read so far."""

    __slots__ = ("_memory", "_view")

    def __init__(self) -> None:
        self._allocate(FIRST_BYTES)

    def _allocate(self, size: int) -> None:
        self._memory = mmap.mmap(-1, size)
        self._view = memoryview(self._memory)

    @staticmethod
    def open(path: Path) -> int:
        """Return a descriptor for `read`; on a file system without O_DIRECT a plain one."""
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, fd: int, length: int, offset: int) -> memoryview:
        """Return `length` bytes at `offset`, fewer at the end of the file; both multiples of
        4096. They are there until the next read.
        """
        if length > len(self._memory):
            self._allocate(length)
        count = os.preadv(fd, [self._view[:length]], offset)
        return self._view[:count]
