"""The only writer of evidence: frames are published into memory that outlives the process, then
committed to disk.

Gate workers, the seal and the command line each hold one `SegmentWriter`. The event loop calls
everything here; the thread of `capture.committer` does the disk work. Positions are byte positions
in the incarnation's frame stream.

The hot path is `reserve`, receive into it, `publish`: what was published survives `kill -9` at any
instruction after.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from typing import TYPE_CHECKING

from capture import recover
from capture.chunk import START, Chunk
from capture.committer import Committer
from capture.errors import EvidenceError
from capture.frames import FIRST_RECORD, HEADER_BYTES, SESSION_BITS, padded
from capture.held import Held
from capture.records import KINDS, Gap, Record, Start, Stop, encode
from capture.segfile import boot_id
from capture.settings import WriterSettings
from capture.tail import SegmentReader

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from capture.crypt import Keys
    from capture.store import Store

__all__ = ["SegmentWriter", "WriterSettings"]

VERSION = "0.1.0"
LEAST_ROOM = 4096
_PAD = bytes(8)


class SegmentWriter:
    """Writes one stream of evidence."""

    def __init__(
        self, store: Store, keys: Keys, stream: str, *, role: str, worker: int = 0,
        settings: WriterSettings | None = None, wake: Callable[[], None] = lambda: None, config_sha256: str = "",
    ) -> None:  # fmt: skip
        """Recover what dead writers left, take an incarnation, and write the Start record.

        `wake` is called from the writer thread when `durable` moved, memory came free or `failed`
        changed.
        """
        self._store, self._keys = store, keys
        self._settings = settings or WriterSettings()
        store.prepare()
        self.incarnation = store.next_generation()
        self._tag = self.incarnation << 32
        self._next_session = 0
        self._hot, self._lock = _claim(store, self.incarnation)
        chunks = [Chunk(self._hot / f"{n:02d}.chunk", self._settings.chunk_bytes)
                  for n in range(self._settings.chunk_count)]  # fmt: skip
        self._committer = Committer(store, keys, stream, self.incarnation, self._settings, wake)
        self._sequence = 0
        self._chunk = chunks[0]
        self._chunk.begin(self.incarnation, 0, 0)
        self._committer.chunks.append(self._chunk)
        self._committer.free.extend(chunks[1:])
        self._all = chunks
        self._reader: SegmentReader | None = None
        self._read_back_cache: tuple[tuple[int, int], tuple[int, memoryview]] | None = None
        self._committer.start()
        self._open(role, worker, config_sha256)

    def _open(self, role: str, worker: int, config_sha256: str) -> None:
        with open("/proc/sys/kernel/osrelease", encoding="ascii") as file:
            kernel = file.read().strip()
        boot = boot_id().hex()
        self.record(
            0,
            Start(role, worker, os.getpid(), boot, VERSION, config_sha256, kernel),
            time.time_ns(),
        )
        self.recover()

    def recover(self) -> int:
        """Complete the evidence of every dead writer; return how many there were."""
        found = recover.dead(self._store, self.incarnation)
        for remains in found:
            record, unreadable = recover.complete(self._store, self._keys, remains)
            self.record(0, record, time.time_ns())
            if unreadable:
                gap = Gap(
                    "worker",
                    "unreadable-chunk",
                    count=len(unreadable),
                    detail=", ".join(unreadable),
                )
                self.record(0, gap, time.time_ns())
        if found:
            self.wait_durable()
            for remains in found:
                recover.forget(remains)
        return len(found)

    @property
    def position(self) -> int:
        """Return the stream position after the last published frame."""
        return self._chunk.end

    @property
    def durable(self) -> int:
        """Return the stream position up to which everything survives power loss."""
        return self._committer.durable

    @property
    def failed(self) -> EvidenceError | None:
        """Return why evidence cannot be written now, or None."""
        return self._committer.failed

    @property
    def room(self) -> bool:
        """Say whether data can be received now."""
        if self._committer.failed is not None:
            return False
        chunk = self._chunk
        return (
            self._settings.chunk_bytes - chunk.fill > LEAST_ROOM + 2 * HEADER_BYTES
            or len(self._committer.free) > 1
        )

    def new_session(self) -> int:
        """Return the number of a new session."""
        self._next_session += 1
        return self.incarnation << SESSION_BITS | self._next_session

    def reserve(self, want: int) -> memoryview | None:
        """Return the payload area of the next data frame, between min(want, 4096) and `want` bytes.

        None means: stop reading until `wake`. One chunk is always kept for records.
        """
        chunk = self._chunk
        room = self._settings.chunk_bytes - chunk.fill - 2 * HEADER_BYTES
        if room < want and (room < LEAST_ROOM or room < want >> 2):
            if self._committer.failed is not None or len(self._committer.free) < 2:
                return None
            chunk = self._rotate()
            room = self._settings.chunk_bytes - chunk.fill - 2 * HEADER_BYTES
        elif self._committer.failed is not None:
            return None
        start = chunk.fill + HEADER_BYTES
        return chunk.view[start : start + (want if want < room else room & -8)]

    def publish(self, kind: int, session: int, offset: int, length: int, time_ns: int) -> int:
        """Make the first `length` bytes of the reserved area a frame; return the position after
        it.
        """
        chunk = self._chunk
        fill = chunk.fill
        end = fill + HEADER_BYTES + ((length + 7) & ~7)
        words = chunk.words
        at = fill >> 3
        if length & 7:
            chunk.view[fill + HEADER_BYTES + length : end] = _PAD[: -length & 7]
        words[end >> 3] = 0
        words[at + 1] = session
        words[at + 2] = time_ns
        words[at + 3] = offset
        words[at] = self._tag | kind << 24 | length
        chunk.fill = end
        if self._committer.asleep:
            self._committer.kick()
        return chunk.base + end - START

    def append(
        self, kind: int, session: int, payload: bytes | memoryview, time_ns: int, offset: int = 0
    ) -> int:
        """Publish a copy of `payload`; return the position after it. EvidenceError when there is no
        memory left.

        Data longer than a chunk becomes several frames; a record must fit one chunk.
        """
        size = len(payload)
        most = self._settings.chunk_bytes - START - 2 * HEADER_BYTES
        if size > most:
            if kind >= FIRST_RECORD:
                raise EvidenceError(f"a record of {size} bytes does not fit a chunk")
            view = memoryview(payload)
            for start in range(0, size, most):
                piece = view[start : start + most]
                position = self.append(kind, session, piece, time_ns, offset + start)
            return position
        chunk = self._chunk
        if chunk.fill + padded(size) + HEADER_BYTES > self._settings.chunk_bytes:
            if not self._committer.free:
                self._wait_for_chunk()
            chunk = self._rotate()
        start = chunk.fill + HEADER_BYTES
        chunk.view[start : start + size] = payload
        return self.publish(kind, session, offset, size, time_ns)

    def record(self, session: int, record: Record, time_ns: int) -> int:
        """Publish a record; return the position after it."""
        return self.append(KINDS[type(record)], session, encode(record), time_ns)

    def sync(self) -> None:
        """Ask for everything published so far to survive power loss; `wake` tells when `durable`
        got there.
        """
        self._committer.hurry(self.position)

    def wait_durable(self, *, longest_s: float = 30.0) -> None:
        """Block until everything published so far survives power loss; EvidenceError when it
        cannot.
        """
        target = self.position
        self._committer.hurry(target)
        until = time.monotonic() + longest_s
        while self._committer.durable < target:
            if self._committer.failed is not None:
                raise self._committer.failed
            if time.monotonic() > until:
                raise EvidenceError(f"the disk did not store evidence within {longest_s:g} s")
            time.sleep(0.0005)

    def hold(self, end: int, length: int) -> Held:
        """Claim the last `length` bytes before stream position `end` (unpadded) of the current
        chunk.
        """
        return Held(self._chunk, end - length, length, self._read_back)

    def payload_end(self, position: int, length: int) -> int:
        """Return where the payload of the frame that ended at `position` ends, without its
        padding.
        """
        return position - (-length & 7)

    def close(self, reason: str = "stop") -> None:
        """Write the Stop record, commit everything, end the segment and give the memory back."""
        self.record(0, Stop(reason), time.time_ns())
        self._committer.stop()
        self._read_back_cache = None
        finished = self._committer.failed is None
        for chunk in self._all:
            chunk.close()
        if finished:
            shutil.rmtree(self._hot, ignore_errors=True)
        os.close(self._lock)

    def _rotate(self) -> Chunk:
        chunk = self._committer.free.popleft()
        for held in chunk.held:
            held.move_out(chunk.commits)
        chunk.held.clear()
        base = self._chunk.end
        self._sequence += 1
        chunk.begin(self.incarnation, self._sequence, base)
        self._chunk = chunk
        self._committer.chunks.append(chunk)
        self._committer.hurry()
        return chunk

    def _wait_for_chunk(self) -> None:
        until = time.monotonic() + 5.0
        self._committer.hurry()
        while not self._committer.free:
            if self._committer.failed is not None or time.monotonic() > until:
                raise self._committer.failed or EvidenceError("no memory left for a record")
            time.sleep(0.0005)

    def _read_back(self, generation: int, offset: int) -> tuple[int, memoryview]:
        key = (generation, offset)
        if self._read_back_cache is None or self._read_back_cache[0] != key:
            with SegmentReader(self._store.segment(generation), self._keys) as reader:
                commit = reader.commit_at(offset)
                if commit is None:
                    raise EvidenceError(f"segment {generation:08x} lost its commit at {offset}")
                self._read_back_cache = (key, (commit.base, memoryview(reader.plaintext(commit))))
        return self._read_back_cache[1]


def _claim(store: Store, incarnation: int) -> tuple[Path, int]:
    """Make this writer's hot directory, locked before anyone can see it under its name."""
    final = store.hot / f"{incarnation:08x}"
    scratch = store.hot / f".new.{incarnation:08x}"
    scratch.mkdir(mode=0o700)
    lock = os.open(scratch / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.rename(scratch, final)
    return final, lock
