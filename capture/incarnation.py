"""The incarnation: one life of a process that writes evidence, and what is left when it dies.

`capture.segment` claims one; `capture.recover` takes over those of the dead. Theory of operation:

* an incarnation is a number, a locked file `evidence/open/<number>` on disk and a directory
  `hot/<number>/` of chunks in the boot's memory;
* it lives as long as somebody holds the lock. Whoever gets the lock of a dead one completes its
  evidence and then ends it; nobody else can meanwhile;
* the file is there before the directory and before the first segment, and goes first: a directory
  without a file needs nobody, and a file without a directory means that memory was lost (the boot
  ended without an orderly stop) or that its writer died before it wrote anything.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from typing import TYPE_CHECKING

from capture.store import sync_directory

if TYPE_CHECKING:
    from pathlib import Path

    from capture.store import Store

MOST_AT_ONCE = 64


class Incarnation:
    """A locked incarnation, our own or a dead one that we complete."""

    __slots__ = ("_lock", "hot", "number", "path")

    def __init__(self, store: Store, number: int, lock: int) -> None:
        self.number = number
        self.path = store.open / f"{number:08x}"
        self.hot = store.hot / f"{number:08x}"
        self._lock = lock

    @classmethod
    def claim(cls, store: Store, like: int = 0) -> Incarnation:
        """Begin a new life, with a number of the range that `like` is in. OSError when the disk
        refuses.
        """
        while True:
            number = store.next_generation(like)
            path = store.open / f"{number:08x}"
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            lock = _lock(path)
            if lock is None:
                continue  # another process saw it unlocked, and ends it
            mine = cls(store, number, lock)
            try:
                sync_directory(store.open)
                mine.hot.mkdir(mode=0o700)
            except FileExistsError:  # memory of a state directory that is gone
                mine.path.unlink()
                mine.leave()
            except BaseException:
                mine.end()
                raise
            else:
                return mine

    @property
    def has_memory(self) -> bool:
        """Say whether its chunks are there, as far as it made any."""
        return self.hot.is_dir()

    def end(self) -> None:
        """Say that everything of it is in final segments: forget it and its memory."""
        self.path.unlink(missing_ok=True)
        shutil.rmtree(self.hot, ignore_errors=True)
        self.leave()

    def leave(self) -> None:
        """Let go of it as it is: who starts next completes it."""
        os.close(self._lock)


def dead(store: Store, mine: int) -> list[Incarnation]:
    """Return the oldest dead incarnations but `mine`, MOST_AT_ONCE of them, locked by us now."""
    memories = os.listdir(store.hot)
    found = []
    for name in sorted(os.listdir(store.open)):
        number = _number(name)
        if number is not None and number != mine:
            lock = _lock(store.open / name)
            if lock is not None:
                found.append(Incarnation(store, number, lock))
            if len(found) == MOST_AT_ONCE:
                break
    for name in memories:  # listed first: a file is there before its directory
        number = _number(name)
        if number is not None and not (store.open / f"{number:08x}").exists():
            shutil.rmtree(store.hot / name, ignore_errors=True)
    return found


def _number(name: str) -> int | None:
    with contextlib.suppress(ValueError):
        return int(name, 16)
    return None


def _lock(path: Path) -> int | None:
    """Return the locked descriptor of a file that nobody else holds and that is still there."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.stat().st_ino == os.fstat(fd).st_ino:
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass  # it lives, or somebody else has just ended it
    os.close(fd)
    return None
