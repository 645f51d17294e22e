"""Completes the evidence of writers that died.

`capture.segment` calls it whenever a writer starts, with an incarnation whose lock it got
(`capture.incarnation`). Its frames that had not reached the disk are stored in a new final segment
of that incarnation; its own segments are never touched. Two steps, so that a kill at any point only
repeats work: `complete`, then, once the `Recovered` record is durable, `Incarnation.end`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from capture.chunk import Remains
from capture.errors import EvidenceError
from capture.frames import walk
from capture.records import KINDS, Recovered, Stop
from capture.segfile import BLOCK, SegmentFile, SegmentHeader, boot_id, commit_total
from capture.store import sync_directory
from capture.tail import SegmentReader

if TYPE_CHECKING:
    from capture.crypt import Keys
    from capture.incarnation import Incarnation
    from capture.store import Store
    from capture.tail import CommitInfo


@dataclass(frozen=True, slots=True)
class Completed:
    """What became of a dead incarnation."""

    record: Recovered | None  #: None when nothing was left open
    unreadable: tuple[str, ...]  #: chunk files and stream positions that memory should have held


def complete(store: Store, keys: Keys, entry: Incarnation) -> Completed:
    """Store what only memory held of `entry` in a final segment. OSError when the disk refuses."""
    _sweep(store, entry.number)
    generations = _generations(store, entry.number)
    memory = entry.has_memory
    remains, unreadable = _remains(entry) if memory else ([], [])
    if not generations and not remains:
        return Completed(None, tuple(unreadable))  # it died before it wrote anything
    if not memory and _stopped(store, keys, generations[-1]):
        return Completed(None, ())  # only forgetting it was left to do
    committed, stream = _committed(store, keys, generations)
    pieces: list[tuple[int, memoryview, int]] = []
    position = committed
    for chunk in remains:
        if chunk.end > position:
            if chunk.base > position:
                unreadable.append(f"stream position {position} to {chunk.base}")
            pieces += chunk.pieces(position)
            position = chunk.end
    tail = _store_tail(store, keys, entry.number, stream, pieces, position)
    record = Recovered(
        entry.number, (*generations, tail), sum(piece[2] for piece in pieces),
        sum(len(piece[1]) for piece in pieces), power_loss=not memory,
    )  # fmt: skip
    return Completed(record, tuple(unreadable))


def _sweep(store: Store, incarnation: int) -> None:
    """Remove segments that were made ready and never used."""
    for path in store.segments.glob(f"{incarnation:08x}.*.pre"):
        path.unlink(missing_ok=True)


def _generations(store: Store, incarnation: int) -> list[int]:
    """Return the segments of an incarnation; they all have higher numbers than itself."""
    found = []
    for generation in store.generations():
        if generation > incarnation:
            with (
                contextlib.suppress(OSError, EvidenceError),
                SegmentReader(store.segment(generation)) as reader,
            ):
                if reader.header.incarnation == incarnation:
                    found.append(generation)
    return found


def _last(reader: SegmentReader) -> tuple[CommitInfo, bytes] | None:
    """Return the last commit that authenticates, and its frames."""
    for commit in reversed(list(reader.commits())):
        with contextlib.suppress(EvidenceError):
            return commit, reader.plaintext(commit)
    return None


def _committed(store: Store, keys: Keys, generations: list[int]) -> tuple[int, str]:
    """Return the stream position up to which there are commits, and the stream's name.

    Only the newest segment can end in a torn commit; what is damaged elsewhere is for the verifier
    to report.
    """
    stream = "lost"
    for generation in reversed(generations):
        with (
            contextlib.suppress(OSError, EvidenceError),
            SegmentReader(store.segment(generation), keys) as reader,
        ):
            stream = reader.header.stream
            last = _last(reader)
            if last is not None:
                return last[0].base + last[0].plain_bytes, stream
    return 0, stream


def _stopped(store: Store, keys: Keys, generation: int) -> bool:
    """Say whether a segment is final and its last frame is a Stop record."""
    with (
        contextlib.suppress(OSError, EvidenceError),
        SegmentReader(store.segment(generation), keys) as reader,
    ):
        commits = list(reader.commits())
        if len(commits) > 1 and commits[-1].final:
            frames = walk(reader.plaintext(commits[-2]), reader.header.incarnation)
            return [frame[0] for frame in frames][-1:] == [KINDS[Stop]]
    return False


def _remains(entry: Incarnation) -> tuple[list[Remains], list[str]]:
    chunks, unreadable = [], []
    for path in sorted(entry.hot.glob("*.chunk")):
        try:
            remains = Remains.read(path, entry.number)
        except OSError as wrong:
            unreadable.append(f"{path.name}: {wrong.strerror}")
            continue
        if remains is not None:
            chunks.append(remains)
    chunks.sort(key=lambda remains: remains.base)
    return chunks, unreadable


def _store_tail(
    store: Store, keys: Keys, incarnation: int, stream: str,
    pieces: list[tuple[int, memoryview, int]], end: int,
) -> int:  # fmt: skip
    """Write the final segment of an incarnation whose stream ends at `end`."""
    generation = store.next_generation(incarnation)
    sizes = [commit_total(len(frames)) for _, frames, _ in pieces]
    header = SegmentHeader(
        generation, incarnation, stream, time.time_ns(), BLOCK + sum(sizes) + BLOCK, boot_id(),
        keys.key_id,
    )  # fmt: skip
    path = store.unused(incarnation, generation)
    segment = SegmentFile(path, header, keys)
    try:
        _fill(segment, pieces, end, max(sizes, default=BLOCK))
    except BaseException:
        segment.close()
        path.unlink(missing_ok=True)
        raise
    os.rename(path, store.segment(generation))
    sync_directory(store.segments)
    return generation


def _fill(
    segment: SegmentFile, pieces: list[tuple[int, memoryview, int]], end: int, most: int
) -> None:
    with mmap.mmap(-1, most) as memory, memoryview(memory) as staging:
        for base, frames, _ in pieces:
            segment.commit(frames, base, staging)
        segment.finish(end, staging)
