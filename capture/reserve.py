"""Disk space that is held back, and given free when a full disk would keep evidence from being
written.

A writer holds one for its own orderly stop, and every writer helps to hold one more for readers:
who reads evidence must write that down first, also on a full disk. It is a preallocated file that
nobody reads.
"""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class Reserve:
    """`size_bytes` held back in the file `path`; 0 for none."""

    __slots__ = ("path", "size_bytes")

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        self.size_bytes = size_bytes

    def hold(self) -> None:
        """Hold the space back, or go on doing so; OSError while the disk has too little."""
        if not self.size_bytes:
            return
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.posix_fallocate(fd, 0, self.size_bytes)
        finally:
            os.close(fd)

    def give(self, size_bytes: int) -> bool:
        """Give the last `size_bytes` of it free; say whether there was anything to give."""
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            left = os.fstat(fd).st_size
            os.ftruncate(fd, max(left - size_bytes, 0))
        finally:
            os.close(fd)
        return left > 0

    def drop(self) -> None:
        """Give all of it free, for good."""
        self.path.unlink(missing_ok=True)
