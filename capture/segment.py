"""The only writer of evidence: frames are published into memory that outlives the process, then
committed to disk.

Gate workers, the seal and the command line each hold one `SegmentWriter`. The event loop calls
everything here; the thread of `capture.committer` does the disk work. Positions are byte positions
in the incarnation's frame stream.

The hot path is `reserve`, receive into it, `publish`: what was published survives `kill -9` at any
instruction after.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from capture import incarnation, recover
from capture.chunk import START, Chunk
from capture.committer import Committer
from capture.errors import EvidenceError
from capture.frames import FIRST_RECORD, HEADER, HEADER_BYTES, SESSION_BITS
from capture.held import Held, ReadBack
from capture.incarnation import Incarnation
from capture.records import KINDS, Gap, Record, Start, Stop, encode
from capture.segfile import boot_id
from capture.settings import WriterSettings
from capture.store import READERS

if TYPE_CHECKING:
    from collections.abc import Callable

    from capture.crypt import Keys
    from capture.store import Store

__all__ = ["SegmentWriter", "WriterSettings"]

VERSION = "0.1.0"
LEAST_ROOM = 4096
MOST_FRAME_BYTES = 256 << 10
CHUNK_WAIT_S = 5.0
_PADS = [bytes(-length & 7) for length in range(8)]


class SegmentWriter:
    """Writes one stream of evidence."""

    def __init__(
        self, store: Store, keys: Keys, stream: str, *, role: str, worker: int = 0,
        settings: WriterSettings | None = None, wake: Callable[[], None] = lambda: None,
        config_sha256: str = "",
    ) -> None:  # fmt: skip
        """Take an incarnation, write the Start record, and recover what dead writers left.

        `wake` is called from the writer thread when `durable` moved, memory came free or `failed`
        changed. Raises OSError or EvidenceError when there is no space to begin with.
        """
        self._store, self._keys = store, keys
        self._settings = settings or WriterSettings()
        store.prepare()
        self._life = Incarnation.claim(store, 0 if self._settings.sessions else READERS)
        self.incarnation = self._life.number
        self._tag = self.incarnation << 32
        self._next_session = 0
        self._brim = self._settings.chunk_bytes - HEADER_BYTES  #: no frame ends after it
        self._most = min(MOST_FRAME_BYTES, self._settings.chunk_bytes - START - 2 * HEADER_BYTES)
        self._all: list[Chunk] = []
        try:
            for number in range(self._settings.chunk_count):
                path = self._life.hot / f"{number:02d}.chunk"
                self._all.append(Chunk(path, self._settings.chunk_bytes))
            self._committer = Committer(
                store, keys, stream, self.incarnation, self._settings, wake
            )  # fmt: skip
        except BaseException:
            self._unmap()
            self._life.end()  # nothing was written yet
            raise
        self._sequence = 0
        self._chunk = self._all[0]
        self._chunk.begin(self.incarnation, 0, 0)
        self._committer.chunks.append(self._chunk)
        self._committer.free.extend(self._all[1:])
        self._read_back = ReadBack(store, keys)
        self._committer.start()
        self._open(role, worker, config_sha256)

    def _open(self, role: str, worker: int, config_sha256: str) -> None:
        with open("/proc/sys/kernel/osrelease", encoding="ascii") as file:
            kernel = file.read().strip()
        boot = boot_id().hex()
        start = Start(role, worker, os.getpid(), boot, VERSION, config_sha256, kernel)
        self.record(0, start, time.time_ns())
        self.recover()

    def recover(self) -> int:
        """Complete the evidence of every dead writer; return how many there were.

        Those for which there is no space now are left for a later call, or for the next start.
        """
        completed = 0
        while found := incarnation.dead(self._store, self.incarnation):
            done = [entry for entry in found if self._complete(entry)]
            if done:
                try:
                    self.wait_durable()
                except EvidenceError:
                    for entry in done:
                        entry.leave()
                    break
            for entry in done:
                entry.end()
            completed += len(done)
            if len(done) < len(found):
                break
        return completed

    def _complete(self, entry: Incarnation) -> bool:
        """Complete one; its lock is given back when that fails."""
        try:
            what = recover.complete(self._store, self._keys, entry)
            if what.record is not None:
                self.record(0, what.record, time.time_ns())
            if what.unreadable:
                detail = ", ".join(what.unreadable)[:4096]
                gap = Gap("worker", "unreadable-chunk", count=len(what.unreadable), detail=detail)
                self.record(0, gap, time.time_ns())
        except (OSError, EvidenceError):
            entry.leave()
            return False
        return True

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
        """Return the number of a new session; for a writer with the setting `sessions` only."""
        assert self._settings.sessions, "its incarnation has no room for sessions"
        self._next_session += 1
        return self.incarnation << SESSION_BITS | self._next_session

    def reserve(self, want: int) -> memoryview | None:
        """Return the payload area of the next data frame, between min(want, 4096) and `want` bytes.

        None means: stop reading until `wake`. One chunk is always kept for records.
        """
        committer = self._committer
        if committer.failed is not None:
            return None
        chunk = self._chunk
        room = self._settings.chunk_bytes - chunk.fill - 2 * HEADER_BYTES
        if room < want and (room < LEAST_ROOM or room < want >> 2):
            if len(committer.free) < 2:
                if room < LEAST_ROOM:
                    committer.hurry()
                    return None
            else:
                chunk = self._rotate()
                room = self._settings.chunk_bytes - chunk.fill - 2 * HEADER_BYTES
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
        if length & 7:  # what stands in the last word after the payload becomes zero
            words[(end >> 3) - 1] &= (1 << ((length & 7) << 3)) - 1
        words[end >> 3] = 0
        words[at + 1] = session
        words[at + 2] = time_ns
        words[at + 3] = offset
        words[at] = self._tag | kind << 24 | length
        if end >= chunk.limit:
            chunk.mark(end)
        chunk.fill = end
        if self._committer.asleep:
            self._committer.kick()
        return chunk.base + end - START

    def append(
        self, kind: int, session: int, payload: bytes | memoryview, time_ns: int, offset: int = 0
    ) -> int:
        """Publish a copy of `payload`; return the position after it. EvidenceError when there is no
        memory left.

        Long data becomes several frames; a record must fit a chunk.
        """
        size = len(payload)
        if size > self._most and kind < FIRST_RECORD:
            view = memoryview(payload)
            position = self.position
            for start in range(0, size, self._most):
                piece = view[start : start + self._most]
                position = self.append(kind, session, piece, time_ns, offset + start)
            return position
        # The length word is stored last: until then there is no frame.
        frame = b"".join((HEADER.pack(0, session, time_ns, offset), payload, _PADS[size & 7]))
        chunk = self._chunk
        fill = chunk.fill
        end = fill + len(frame)
        if end > self._brim:
            chunk = self._room_for(len(frame), size)
            fill = chunk.fill
            end = fill + len(frame)
        words = chunk.words
        words[end >> 3] = 0
        chunk.view[fill:end] = frame
        words[fill >> 3] = self._tag | kind << 24 | size
        if end >= chunk.limit:
            chunk.mark(end)
        chunk.fill = end
        if self._committer.asleep:
            self._committer.kick()
        return chunk.base + end - START

    def _room_for(self, length: int, size: int) -> Chunk:
        """Return an empty chunk for a frame of `length` bytes, whose payload has `size`."""
        if START + length > self._brim:
            raise EvidenceError(f"a record of {size} bytes does not fit a chunk")
        if not self._committer.free:
            self._wait_for_chunk()
        return self._rotate()

    def record(self, session: int, record: Record, time_ns: int) -> int:
        """Publish a record; return the position after it."""
        return self.append(KINDS[type(record)], session, encode(record), time_ns)

    def hurry(self) -> None:
        """Ask for memory: commit now, whether or not it survives power loss; `wake` tells."""
        self._committer.hurry()

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

    def close(self, reason: str = "stop") -> None:
        """Write the Stop record, commit everything, end the segment and give the memory back.

        What the disk refuses stays in memory, for the next start.
        """
        try:
            self.record(0, Stop(reason), time.time_ns())
        except EvidenceError:
            pass  # no memory left on a full disk: the next start completes this incarnation
        complete = self._committer.stop()
        self._read_back.close()
        self._unmap()
        if complete:
            self._life.end()
        else:
            self._life.leave()

    def _unmap(self) -> None:
        for chunk in self._all:
            chunk.close()

    def _rotate(self) -> Chunk:
        chunk = self._committer.free.popleft()
        for held in chunk.held:
            held.move_out()
        chunk.held.clear()
        base = self._chunk.end
        self._sequence += 1
        chunk.begin(self.incarnation, self._sequence, base)
        self._chunk = chunk
        self._committer.chunks.append(chunk)
        self._committer.hurry()
        return chunk

    def _wait_for_chunk(self) -> None:
        until = time.monotonic() + CHUNK_WAIT_S
        self._committer.hurry()
        while not self._committer.free:
            if self._committer.failed is not None or time.monotonic() > until:
                raise self._committer.failed or EvidenceError("no memory left for a record")
            time.sleep(0.0005)
