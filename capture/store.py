"""Where evidence lies: paths of the state and run directories, and the generation counter.

Everything that touches evidence gets its paths here. Nothing here reads or writes evidence itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import time
from typing import TYPE_CHECKING, NamedTuple

from capture.errors import EvidenceError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_IN_MEMORY = frozenset({"tmpfs", "ramfs"})
#: A directory that changed shortly before it was listed may change again under the same time.
SETTLED_NS = 1_000_000_000
#: First generation of writers that number no sessions.
READERS = 1 << 24
_COUNT = re.compile("[0-9a-f]{8}")


class _Counter(NamedTuple):
    """A range of generations: the last that was given out is in a file."""

    name: str
    low: int
    end: int

    def of(self, numbers: list[int]) -> list[int]:
        """Return those of its range, and its lowest one."""
        return [self.low, *(number for number in numbers if self.low <= number < self.end)]


_NUMBERING = _Counter("generation", 0, READERS)
_READERS = _Counter("generation.readers", READERS, 1 << 32)


class Store:
    """The directories of one appliance. `state` persists; `run` is tmpfs and lasts one boot."""

    def __init__(self, state: Path, run: Path) -> None:
        self.state = state
        self.run = run
        self.evidence = state / "evidence"
        self.segments = self.evidence / "segments"
        self.open = self.evidence / "open"  #: one locked file per living incarnation
        self.sealed = self.evidence / "sealed"  #: packs: what finished segments became
        self.keys = self.evidence / "keys"  #: data keys of the sealed store
        self.ledger = self.evidence / "ledger"
        self.index = self.evidence / "index.sqlite"
        self._packs: tuple[int, list[int]] = (-1, [])  #: when they had changed, and what was listed
        self.hot = run / "hot"  #: one directory of chunks per living incarnation

    def prepare(self) -> None:
        """Make the directories, owner only. EvidenceError when one is there in which others may
        put something in a file's place.
        """
        for path in (
            self.state, self.evidence, self.segments, self.open, self.sealed, self.keys,
            self.ledger, self.run, self.hot,
        ):  # fmt: skip
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = path.stat()
            shared = found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX
            if shared or found.st_uid not in {0, os.geteuid()}:
                raise EvidenceError(
                    f"{path} has owner {found.st_uid} and mode {found.st_mode & 0o7777:o}:"
                    " others could replace what is in it"
                )
        self._begin(_NUMBERING)
        self._begin(_READERS)

    @property
    def run_is_memory(self) -> bool:
        """Say whether `run` lies in memory only. Elsewhere the chunks, which are plaintext, would
        be written to a disk, and last longer than the boot.
        """
        found = self.run.stat().st_dev
        device = f"{os.major(found)}:{os.minor(found)}"
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                place, _, kind = line.partition(" - ")
                if place.split(" ", 3)[2] == device:
                    return kind.split(" ", 1)[0] in _IN_MEMORY
        return False

    def segment(self, generation: int) -> Path:
        """Return the path of a segment."""
        return self.segments / f"{generation:08x}.seg"

    def unused(self, incarnation: int, generation: int) -> Path:
        """Return the path of a segment that is being made ready and holds nothing yet."""
        return self.segments / f"{incarnation:08x}.{generation:08x}.pre"

    def pack(self, generation: int, first: int) -> Path:
        """Return the path of the pack that begins with commit `first` of a segment."""
        return self.sealed / f"{generation:08x}.{first:08x}.pack"

    def generations(self) -> list[int]:
        """Return the generations of the segments whose files are there, oldest first. What is no
        file is none.
        """
        return _numbers(self.segments, "seg")

    def sealed_generations(self) -> list[int]:
        """Return the generations of the segments that have a pack, oldest first.

        They are many: a directory that did not change since it was listed is not listed again.
        """
        changed_ns = 0
        with contextlib.suppress(OSError):
            changed_ns = self.sealed.stat().st_mtime_ns
        if changed_ns != self._packs[0]:
            found = _numbers(self.sealed, "00000000.pack")
            settled = abs(time.time_ns() - changed_ns) > SETTLED_NS
            self._packs = changed_ns if settled else -1, found
        return list(self._packs[1])

    def all_generations(self) -> list[int]:
        """Return the generations of all segments, whether their files are there or only packs."""
        hot = self.generations()  # listed first: a pack is there before its segment's file goes
        return sorted({*hot, *self.sealed_generations()})

    def next_generation(self, like: int = 0) -> int:
        """Take the next generation, of the range that the number `like` is in; a number that was
        given out is never given again, not even after a crash or when the counter was lost.

        Writers that number sessions have the range below READERS, which session numbers have room
        for; those that only record what was read have the one from there on, so that reads use up
        nothing that is scarce.
        """
        counter = _READERS if like >= READERS else _NUMBERING
        with self._locked(self.evidence / counter.name) as fd:
            generation = max(self._last(fd, counter), *counter.of(self.generations())) + 1
            if generation >= counter.end:
                raise EvidenceError("the generation counter is used up")
            _put(fd, generation)
        return generation

    def _begin(self, counter: _Counter) -> None:
        """Make a counter, so that a number can be taken on a full disk."""
        if not (self.evidence / counter.name).exists():
            with self._locked(self.evidence / counter.name) as fd:
                _put(fd, self._last(fd, counter))
            sync_directory(self.evidence)

    def _last(self, fd: int, counter: _Counter) -> int:
        text = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        if _COUNT.fullmatch(text):
            return max(int(text, 16), counter.low)
        return max(counter.low, *counter.of(self.all_generations()))  # it was lost, or is new

    def used(self) -> float:
        """Return the part of the generations of writers that number sessions that was given out."""
        text = ""
        with contextlib.suppress(OSError, ValueError):
            text = (self.evidence / _NUMBERING.name).read_text("ascii").strip()
        return int(text, 16) / READERS if _COUNT.fullmatch(text) else 0.0

    @contextlib.contextmanager
    def _locked(self, path: Path) -> Iterator[int]:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            os.close(fd)


def _numbers(folder: Path, suffix: str) -> list[int]:
    found = []
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            stem, _, rest = entry.name.partition(".")
            if rest == suffix and len(stem) == 8:
                with contextlib.suppress(ValueError):
                    generation = int(stem, 16)
                    if entry.is_file(follow_symlinks=False):
                        found.append(generation)
    return sorted(found)


def _put(fd: int, number: int) -> None:
    os.pwrite(fd, f"{number:08x}\n".encode(), 0)
    os.fdatasync(fd)


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive power loss."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
