"""The writer thread: takes published frames from chunks and makes them commits of segment files.

`capture.segment.SegmentWriter` starts one. It never touches a session. Theory of operation:

* the event loop publishes frames and, when it finds the thread asleep, wakes it; nothing is polled
  while idle;
* the thread waits `commit_s` (or not at all, after `urgent`), then commits [committed, fill) of
  every chunk in order;
* a chunk whose frames are all committed and which is no longer the current one goes to `free` for
  the loop to use again;
* `durable` moves after fdatasync: at once when somebody waits for it, otherwise once a second;
* the next segment is made ready (preallocated) before it is needed; when the disk refuses, the
  space held back is given free, what is published is stored there, `failed` is set, and the thread
  tries again every second.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from capture.chunk import START, Chunk
from capture.errors import EvidenceError
from capture.segfile import BLOCK, SegmentFile, SegmentHeader, boot_id, commit_total

if TYPE_CHECKING:
    from collections.abc import Callable

    from capture.crypt import Keys
    from capture.settings import WriterSettings
    from capture.store import Store

SYNC_S = 1.0
RETRY_S = 1.0


class Committer:
    """Owns the segment files of one writer. Attributes are read by the loop, written by the
    thread.
    """

    def __init__(
        self, store: Store, keys: Keys, stream: str, incarnation: int, settings: WriterSettings,
        wake: Callable[[], None],
    ) -> None:  # fmt: skip
        self._store, self._keys, self._stream, self._settings = store, keys, stream, settings
        self._incarnation = incarnation
        self._boot = boot_id()
        self._wake = wake
        self._urgent = threading.Event()
        self._kick = threading.Event()
        self._stopping = False
        self._staging_memory = mmap.mmap(-1, commit_total(settings.chunk_bytes) + BLOCK)
        self._staging = memoryview(self._staging_memory)
        self._next: SegmentFile | None = None
        self._synced_at = time.monotonic()
        self._wanted = 0  # durable position that somebody waits for
        self.chunks: deque[Chunk] = (
            deque()
        )  #: chunks with frames to commit, oldest first; the last is the current one
        self.free: deque[Chunk] = deque()
        self.asleep = False
        self.committed = 0
        self.durable = 0
        self.failed: EvidenceError | None = None
        self.segments = 0
        self._reserve = store.evidence / f"reserve.{stream}"
        self._segment = self._create(incarnation, settings.segment_bytes)
        self._activate(self._segment)
        self._hold_back()
        self._thread = threading.Thread(target=self._run, name=f"commit-{stream}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def kick(self) -> None:
        """Wake the thread: something was published."""
        self._kick.set()

    def hurry(self, position: int | None = None) -> None:
        """Commit now; with `position`, also make everything up to it survive power loss."""
        if position is not None and position > self._wanted:
            self._wanted = position
        self._urgent.set()
        self._kick.set()

    def stop(self) -> None:
        """Commit everything, finish the segment and end the thread."""
        self._stopping = True
        self.hurry()
        self._thread.join()
        if self.failed is None:
            self._segment.finish(self.committed, self._staging)
        else:
            self._segment.close()
        if self._next is not None:
            self._next.close()
            self._next.path.unlink(missing_ok=True)
        self._reserve.unlink(missing_ok=True)
        self._staging.release()
        self._staging_memory.close()

    def _run(self) -> None:
        try:
            self._work()
        except Exception as bug:
            self.failed = EvidenceError(f"the writer thread ended: {bug!r}")
            self._wake()
            raise

    def _work(self) -> None:
        while True:
            pending = self._pending()
            if not pending:
                if self._stopping:
                    return
                self._sleep()
                continue
            self._urgent.wait(self._settings.commit_s)
            self._urgent.clear()
            try:
                self._commit_all()
            except OSError as refused:
                self._refuse(refused)
                if self._stopping:
                    return
                self._kick.clear()
                self._urgent.wait(RETRY_S)
            self._wake()

    def _pending(self) -> bool:
        if self.failed is not None or self._wanted > self.durable or self.committed > self.durable:
            return True
        return bool(self.chunks) and self.chunks[-1].end > self.committed

    def _sleep(self) -> None:
        self._kick.clear()
        self.asleep = True
        if not self._pending() and not self._stopping:
            self._kick.wait()
        self.asleep = False

    def _commit_all(self) -> None:
        if self.failed is not None:
            self._recover_space()
        while self.chunks:
            chunk = self.chunks[0]
            fill = chunk.fill
            if fill > chunk.committed:
                self._commit(chunk, fill)
            if len(self.chunks) == 1 or chunk.fill > chunk.committed:
                break  # the current chunk, or one that was still being filled when we looked
            self.chunks.popleft()
            self.free.append(chunk)
        self._sync_if_due()
        self._prepare_next()

    def _commit(self, chunk: Chunk, fill: int) -> None:
        size = fill - chunk.committed
        if not self._segment.fits(size):
            self._rotate()
        base = chunk.base + chunk.committed - START
        offset = self._segment.commit(chunk.view[chunk.committed : fill], base, self._staging)
        chunk.committed = fill
        self.committed = chunk.base + fill - START
        chunk.commits.append((self.committed, self._segment.generation, offset))

    def _sync_if_due(self) -> None:
        now = time.monotonic()
        due = self._wanted > self.durable or self._stopping or now - self._synced_at >= SYNC_S
        if self.committed > self.durable and due:
            position = self.committed
            self._segment.sync()
            self._synced_at = time.monotonic()
            self.durable = position

    def _rotate(self) -> None:
        following = self._next or self._create(
            self._store.next_generation(), self._settings.segment_bytes
        )
        self._next = None
        # The new name first: an incarnation whose newest segment is final has ended
        # (capture.recover).
        self._activate(following)
        self._segment.finish(self.committed, self._staging)
        self._segment = following

    def _create(self, generation: int, capacity: int) -> SegmentFile:
        path = self._store.segments / f"{self._stream}.{generation:08x}.pre"
        header = SegmentHeader(
            generation,
            self._incarnation,
            self._stream,
            time.time_ns(),
            capacity,
            self._boot,
            self._keys.key_id,
        )
        return SegmentFile(path, header, self._keys)

    def _activate(self, segment: SegmentFile) -> None:
        path = self._store.segment(segment.generation)
        os.rename(segment.path, path)
        segment.path = path
        self.segments += 1

    def _prepare_next(self) -> None:
        if (
            self._settings.ahead
            and self._next is None
            and self._segment.used > self._segment.capacity // 2
        ):
            try:
                self._next = self._create(
                    self._store.next_generation(), self._settings.segment_bytes
                )
            except OSError as refused:
                if refused.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise

    def _hold_back(self) -> None:
        if not self._settings.reserve_bytes:
            return
        fd = os.open(self._reserve, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, self._settings.reserve_bytes)
        finally:
            os.close(fd)

    def _refuse(self, refused: OSError) -> None:
        """The disk refuses: say so, and bring what is published to safety in the space held
        back.
        """
        first = self.failed is None
        self.failed = EvidenceError(f"evidence cannot be written: {refused.strerror}")
        if not first or not self._settings.reserve_bytes:
            return
        self._reserve.unlink(missing_ok=True)
        try:
            tail = self._create(self._store.next_generation(), self._settings.reserve_bytes)
        except OSError:
            return
        self._next = tail
        try:
            self._rotate()
            while self.chunks and self.chunks[0].fill > self.chunks[0].committed:
                chunk = self.chunks[0]
                self._commit(chunk, chunk.fill)
                if len(self.chunks) == 1:
                    break
                self.free.append(self.chunks.popleft())
            self._segment.sync()
            self.durable = self.committed
        except OSError as again:
            self.failed = EvidenceError(f"evidence cannot be written: {again.strerror}")

    def _recover_space(self) -> None:
        """Try to write normally again; OSError while the disk still refuses."""
        if self._settings.reserve_bytes:
            self._hold_back()
        following = self._create(self._store.next_generation(), self._settings.segment_bytes)
        if self._next is not None:
            self._next.close()
            self._next.path.unlink(missing_ok=True)
        self._next = following
        self._rotate()
        self.failed = None
