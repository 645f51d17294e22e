"""Completes the evidence of writers that died.

`capture.segment` calls it whenever a writer starts. A writer is alive while it holds the lock in
`hot/<incarnation>/`. A dead one's frames that had not reached the disk are stored in a new final
segment of its incarnation; its own segments are never touched. Two steps, so that a kill at any
point only repeats work: `complete`, then, once the `Recovered` record is durable, `forget`. An
incarnation without a hot directory whose newest segment is not final lost its memory with the
power.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import shutil
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from capture.chunk import Remains
from capture.errors import EvidenceError
from capture.records import Recovered
from capture.segfile import BLOCK, COMMIT_BYTES, SegmentFile, SegmentHeader, boot_id, commit_total
from capture.tail import SegmentReader

if TYPE_CHECKING:
    from pathlib import Path

    from capture.crypt import Keys
    from capture.store import Store


@dataclass(slots=True)
class Dead:
    """A dead incarnation; `lock` is held until `forget`."""

    incarnation: int
    hot: Path | None
    lock: int = -1
    generations: list[int] = field(default_factory=list)


def dead(store: Store, mine: int) -> list[Dead]:
    """Return every dead incarnation that is not complete, oldest first, locked where it left
    memory.
    """
    before = _headers(store)
    living, found = {mine}, []
    for path in sorted(store.hot.iterdir()):
        incarnation = _incarnation(path)
        if incarnation is None:
            _sweep_unfinished(path)
        elif incarnation != mine:
            lock = _lock(path)
            living.add(incarnation)
            if lock is not None:
                found.append(Dead(incarnation, path, lock))
    # Segments first, hot directories second, segments again: a writer that started meanwhile shows
    # in neither first list, and one that ended meanwhile is final in the second.
    memoryless = {h.incarnation for _, h, _ in before} - living
    segments = _headers(store)
    newest = {header.incarnation: final for _, header, final in segments}
    found += [Dead(incarnation, None) for incarnation in memoryless if not newest.get(incarnation)]
    for entry in found:
        entry.generations = [
            g for g, header, _ in segments if header.incarnation == entry.incarnation
        ]
    _sweep_unused(store, living - {entry.incarnation for entry in found})
    return sorted(found, key=lambda entry: entry.incarnation)


def complete(store: Store, keys: Keys, entry: Dead) -> tuple[Recovered, list[str]]:
    """Store what only memory held in a final segment; return the record, and the chunk files that
    are unreadable.
    """
    committed, stream = _committed(store, keys, entry.generations)
    remains, unreadable = _remains(entry)
    missing = bytearray()
    frames = 0
    for chunk in remains:
        start = max(committed - chunk.base, 0)
        if start < len(chunk.plaintext):
            if chunk.base + start != committed:
                unreadable.append(f"position {committed} to {chunk.base + start}")
            missing += chunk.plaintext[start:]
            frames += chunk.frames
            committed = chunk.base + len(chunk.plaintext)
    generation = _store_tail(
        store, keys, entry.incarnation, stream, bytes(missing), committed - len(missing)
    )
    segments = (*entry.generations, generation)
    record = Recovered(
        entry.incarnation, segments, frames, len(missing), power_loss=entry.hot is None
    )
    return record, unreadable


def forget(entry: Dead) -> None:
    """Remove the memory of a completed incarnation."""
    if entry.hot is not None:
        shutil.rmtree(entry.hot, ignore_errors=True)
        os.close(entry.lock)


def _incarnation(path: Path) -> int | None:
    with contextlib.suppress(ValueError):
        return int(path.name, 16)
    return None


def _sweep_unused(store: Store, living: set[int]) -> None:
    """Remove segments that were made ready and never used by writers that are dead now."""
    for path in store.segments.glob("*.pre"):
        with contextlib.suppress(OSError, EvidenceError), SegmentReader(path) as reader:
            if reader.header.incarnation not in living:
                path.unlink()


def _lock(path: Path) -> int | None:
    try:
        fd = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None  # another process is forgetting it
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    if not (path / "lock").exists():
        os.close(fd)
        return None
    return fd


def _sweep_unfinished(path: Path) -> None:
    """Remove a hot directory that its writer never finished making, if that writer is dead."""
    lock = _lock(path)
    if lock is not None:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _headers(store: Store) -> list[tuple[int, SegmentHeader, bool]]:
    found = []
    for generation in store.generations():
        with (
            contextlib.suppress(OSError, EvidenceError),
            SegmentReader(store.segment(generation)) as reader,
        ):
            size = reader.path.stat().st_size
            last = reader.commit_at(size - BLOCK) if size > BLOCK else None
            found.append((generation, reader.header, last is not None and last.final))
    return found


def _committed(store: Store, keys: Keys, generations: list[int]) -> tuple[int, str]:
    """Return the stream position up to which commits authenticate, and the stream's name."""
    position, stream = 0, "lost"
    for generation in generations:
        try:
            with SegmentReader(store.segment(generation), keys) as reader:
                stream = reader.header.stream
                for commit in reader.commits():
                    reader.plaintext(commit)
                    position = commit.base + commit.plain_bytes
        except (OSError, EvidenceError):
            continue  # the verifier reports it; what memory still holds is kept in any case
    return position, stream


def _remains(entry: Dead) -> tuple[list[Remains], list[str]]:
    chunks, unreadable = [], []
    for path in sorted(entry.hot.glob("*.chunk")) if entry.hot else []:
        try:
            remains = Remains.read(path, entry.incarnation)
        except OSError as wrong:
            unreadable.append(f"{path.name}: {wrong.strerror}")
            continue
        if remains is not None:
            chunks.append(remains)
    chunks.sort(key=lambda remains: remains.base)
    return chunks, unreadable


def _store_tail(
    store: Store, keys: Keys, incarnation: int, stream: str, missing: bytes, base: int
) -> int:
    generation = store.next_generation()
    capacity = BLOCK + commit_total(len(missing)) + BLOCK
    header = SegmentHeader(
        generation, incarnation, stream, time.time_ns(), capacity, boot_id(), keys.key_id
    )
    path = store.segments / f"recover.{generation:08x}.pre"
    with (
        mmap.mmap(-1, commit_total(len(missing)) + COMMIT_BYTES) as memory,
        memoryview(memory) as staging,
    ):
        segment = SegmentFile(path, header, keys)
        if missing:
            segment.commit(missing, base, staging)
        segment.finish(base + len(missing), staging)
    os.rename(path, store.segment(generation))
    return generation
