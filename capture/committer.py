"""The writer thread: takes published frames from chunks and makes them commits of segment files.

`capture.segment.SegmentWriter` starts one. It never touches a session. Theory of operation:

* the event loop publishes frames and, when it finds the thread asleep, wakes it; nothing is polled
  while idle;
* the thread waits `commit_s` (or not at all, after `hurry`), then commits [committed, fill) of
  every chunk in order, in pieces of about `COMMIT_BYTES_SOFT`;
* a chunk whose frames are all committed and which is no longer the current one goes to `free` for
  the loop to use again;
* `durable` moves after fdatasync: at once when somebody waits for it, otherwise once a second;
* when the disk refuses, `failed` is set and what is published goes to the space held back; the
  thread tries every second to go on as usual, and until then stores what still fits.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from capture.chain import Chain
from capture.chunk import START, Chunk
from capture.errors import EvidenceError
from capture.segfile import BLOCK, commit_total

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
        self._settings, self._wake = settings, wake
        self._chain = Chain(store, keys, stream, incarnation, settings)
        self._urgent = threading.Event()
        self._kick = threading.Event()
        self._stopping = False
        self._staging_memory = mmap.mmap(-1, commit_total(settings.chunk_bytes) + BLOCK)
        self._staging = memoryview(self._staging_memory)
        self._synced_at = time.monotonic()
        self._wanted = 0  # durable position that somebody waits for
        #: chunks with frames to commit, oldest first; the last is the current one
        self.chunks: deque[Chunk] = deque()
        self.free: deque[Chunk] = deque()
        self.asleep = False
        self.committed = 0
        self.durable = 0
        self.failed: EvidenceError | None = None
        self._thread = threading.Thread(target=self._run, name=f"commit-{stream}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def kick(self) -> None:
        """Wake the thread: something was published."""
        self.asleep = False
        self._kick.set()

    def hurry(self, position: int | None = None) -> None:
        """Commit now; with `position`, also make everything up to it survive power loss."""
        if position is not None and position > self._wanted:
            self._wanted = position
        self._urgent.set()
        self._kick.set()

    def stop(self) -> bool:
        """Commit everything, finish the segment and end the thread; say whether everything is on
        disk.
        """
        self._stopping = True
        self.hurry()
        self._thread.join()
        try:
            if self._behind() or not self._finish():
                self._chain.leave()
                return False
        finally:
            self._staging.release()
            self._staging_memory.close()
        return True

    def _finish(self) -> bool:
        try:
            self._chain.finish(self.committed, self._staging)
        except (OSError, EvidenceError) as refused:
            self.failed = EvidenceError(f"the last segment cannot be ended: {refused}")
            return False
        return True

    def _run(self) -> None:
        try:
            self._work()
        except Exception as bug:
            self.failed = EvidenceError(f"the writer thread ended: {bug!r}")
            self._wake()
            raise

    def _work(self) -> None:
        while not (self._stopping and not self._behind()):
            self._pause()
            last = self._stopping
            before = (self.durable, self.failed, len(self.free))
            try:
                self._step()
            except OSError as refused:
                self._refuse(refused)
            if before != (self.durable, self.failed, len(self.free)):
                self._wake()
            if last and self.failed is not None:
                return

    def _uncommitted(self) -> bool:
        return bool(self.chunks) and self.chunks[-1].end > self.committed

    def _behind(self) -> bool:
        return self._uncommitted() or self.committed > self.durable

    def _pause(self) -> None:
        if self.failed is not None:
            self._urgent.wait(RETRY_S)
        else:
            if not self._uncommitted():
                self._sleep()
            if self._uncommitted():
                self._urgent.wait(self._settings.commit_s)
        self._urgent.clear()

    def _sleep(self) -> None:
        """Sleep until something is published or asked for, or what is committed is to be synced."""
        longest_s = None
        if self.committed > self.durable:
            longest_s = max(self._synced_at + SYNC_S - time.monotonic(), 0)
        self._kick.clear()
        self.asleep = True
        if not (self._uncommitted() or self._urgent.is_set()):
            self._kick.wait(longest_s)
        self.asleep = False

    def _step(self) -> None:
        if self.failed is not None:
            self._renew()
        self._commit_all()
        self._sync_if_due()
        if self.failed is None:
            self._chain.prepare()

    def _commit_all(self) -> None:
        while self.chunks:
            chunk = self.chunks[0]
            fill = chunk.fill
            while chunk.committed < fill:
                end = chunk.cut(fill)
                if self.failed is not None and not self._chain.fits(end - chunk.committed):
                    return  # it stays in memory until there is space
                self._commit(chunk, end)
            if len(self.chunks) == 1 or chunk.fill > chunk.committed:
                break  # the current chunk, or one that was still being filled when we looked
            self.chunks.popleft()
            self.free.append(chunk)

    def _commit(self, chunk: Chunk, end: int) -> None:
        base = chunk.base + chunk.committed - START
        plaintext = chunk.view[chunk.committed : end]
        generation, offset = self._chain.commit(plaintext, base, self._staging)
        self.committed = chunk.base + end - START
        chunk.commits.append((self.committed, generation, offset))
        chunk.committed = end

    def _sync_if_due(self) -> None:
        now = time.monotonic()
        due = self._wanted > self.durable or self._stopping or now - self._synced_at >= SYNC_S
        if self.committed > self.durable and (due or self.failed is not None):
            position = self.committed
            self._chain.sync()
            self._synced_at = time.monotonic()
            self.durable = position

    def _refuse(self, refused: OSError) -> None:
        """The disk refuses: say so, and bring what is published to safety in the space held
        back.
        """
        self.failed = EvidenceError(f"evidence cannot be written: {refused.strerror}")
        try:
            if self._chain.fall_back(self.committed, self._staging):
                self._commit_all()
                self._sync_if_due()
        except OSError as again:
            self.failed = EvidenceError(f"evidence cannot be written: {again.strerror}")

    def _renew(self) -> None:
        """Try to go on as usual; `failed` stays while the disk still refuses."""
        try:
            self._chain.renew(self.committed, self._staging)
        except OSError as refused:
            self.failed = EvidenceError(f"evidence cannot be written: {refused.strerror}")
        else:
            self.failed = None
