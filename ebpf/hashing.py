"""SHA-256 of executables: each file once, on a thread of its own, bounded.

`ebpf.sensor` gives it open descriptors, so that a file is the very one that was executed, whatever
its path names by now. A digest is kept under (device, inode, mtime, ctime, size). ctime cannot be
set back by a user, so a key that is older than the clock's grain stands for one content; a younger
one is hashed again each time.

A digest is given only when the key was the same before and after reading.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import os
import queue
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

#: Two changes within this time may leave the same ctime: file systems stamp with the clock of the
#: last timer tick, 1 to 10 ms.
GRAIN_NS = 20_000_000
LARGEST = 1 << 30  #: larger files have no digest
_PIECE = 1 << 20
_MOST_KEPT = 8192
_MOST_WAITING = 1024


class FileKey(NamedTuple):
    """One content of one file."""

    device: int  #: as stat gives it
    inode: int
    mtime_ns: int
    ctime_ns: int
    size: int

    @classmethod
    def of(cls, fd: int) -> FileKey:
        """Return the key of an open file as it is now."""
        return cls.said(os.fstat(fd))

    @classmethod
    def said(cls, s: os.stat_result) -> FileKey:
        """Return the key that an answer of stat means."""
        return cls(s.st_dev, s.st_ino, s.st_mtime_ns, s.st_ctime_ns, s.st_size)


class Hasher:
    """The digests that are known, and the thread that makes more.

    `wakeup_fd` is readable when `finished` has something to say.
    """

    def __init__(self) -> None:
        self._known: dict[FileKey, str] = {}
        self._waiting: dict[FileKey, list[Callable[[str], None]]] = {}
        self._jobs: queue.SimpleQueue[tuple[FileKey, int] | None] = queue.SimpleQueue()
        self._done: collections.deque[tuple[FileKey, str, bool]] = collections.deque()
        self.wakeup_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.refused = 0  #: files that were not hashed, because too many waited
        self._thread = threading.Thread(target=self._run, name="hasher", daemon=True)
        self._thread.start()

    def known(self, key: FileKey) -> str | None:
        """Return the digest of a content, if it was made before; hexadecimal."""
        return self._known.get(key)

    def submit(self, fd: int, key: FileKey, done: Callable[[str], None]) -> None:
        """Hash an open file, which is the hasher's from now on.

        `done` is called from `finished` with the digest, or with "" when there is none.
        """
        waiting = self._waiting.get(key)
        if waiting is not None:
            os.close(fd)
            waiting.append(done)
        elif key.size > LARGEST or len(self._waiting) >= _MOST_WAITING:
            os.close(fd)
            self.refused += 1
            done("")
        else:
            self._waiting[key] = [done]
            self._jobs.put((key, fd))

    def finished(self) -> None:
        """Tell those who waited; call when `wakeup_fd` is readable."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.wakeup_fd)
        while self._done:
            key, digest, final = self._done.popleft()
            if digest and final:
                if len(self._known) >= _MOST_KEPT:
                    del self._known[next(iter(self._known))]
                self._known[key] = digest
            for done in self._waiting.pop(key):
                done(digest)

    def close(self) -> None:
        """End the thread after the file that it is reading."""
        self._jobs.put(None)
        self._thread.join()
        while not self._jobs.empty():
            job = self._jobs.get()
            if job is not None:
                os.close(job[1])
        os.close(self.wakeup_fd)

    def _run(self) -> None:
        buffer = bytearray(_PIECE)
        while (job := self._jobs.get()) is not None:
            key, fd = job
            # A later change that leaves this very key must fall into the same grain.
            final = time.time_ns() - key.ctime_ns > GRAIN_NS
            try:
                self._done.append((key, _digest(fd, key, buffer), final))
            finally:
                os.close(fd)
            os.eventfd_write(self.wakeup_fd, 1)


def _digest(fd: int, key: FileKey, buffer: bytearray) -> str:
    """Return the digest; "" when the file cannot be read, or changed meanwhile."""
    digest = hashlib.sha256()
    view = memoryview(buffer)
    at = 0
    try:
        while at <= key.size and (count := os.preadv(fd, [buffer], at)):
            digest.update(view[:count])
            at += count
        return digest.hexdigest() if FileKey.of(fd) == key else ""
    except OSError:
        return ""
