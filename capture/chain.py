"""The chain: the segment files that one writer fills, one after the other.

`capture.committer` owns one and is the only one who calls it, from its thread. It knows nothing of
chunks or of sessions. The next segment is made ready (preallocated) before it is needed, so that a
rotation waits for nothing. On a full disk `fall_back` continues in the space held back.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from typing import TYPE_CHECKING

from capture.errors import EvidenceError
from capture.reserve import Reserve
from capture.segfile import BLOCK, SegmentFile, SegmentHeader, boot_id, commit_total

if TYPE_CHECKING:
    from capture.crypt import Keys
    from capture.settings import WriterSettings
    from capture.store import Store

OVERHEAD_BYTES = 64 << 10
SPARE_PIECE_BYTES = 128 << 10
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)


class Chain:
    """Commits go to the current segment, or to a new one where it is full. All calls may raise
    OSError.
    """

    def __init__(
        self, store: Store, keys: Keys, stream: str, incarnation: int, settings: WriterSettings
    ) -> None:
        """Begin the first segment; what is held back for readers is used for it if need be and
        allowed.
        """
        self._store, self._keys, self._stream = store, keys, stream
        self._incarnation, self._settings = incarnation, settings
        self._boot = boot_id()
        self._reserve = Reserve(store.evidence / f"reserve.{stream}", settings.reserve_bytes)
        self._spare = Reserve(store.evidence / "reserve.readers", settings.spare_bytes)
        self._next: SegmentFile | None = None
        self._begun_at = time.monotonic()
        self._named = False  #: a file got its name and the directory was not synced since
        self._folder = os.open(store.segments, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._kept = -1  #: a descriptor for the next segment, when others have taken all
        try:
            self._segment = self._make(0)
            self._begin()
        except BaseException:
            os.close(self._folder)
            raise
        self._hold_spare()
        self._keep_descriptor()

    def _begin(self) -> None:
        try:
            self._activate(self._segment)
            self._reserve.hold()
        except BaseException:
            self._segment.close()
            self._segment.path.unlink(missing_ok=True)
            raise

    def commit(self, plaintext: memoryview, base: int, staging: memoryview) -> tuple[int, int]:
        """Store frames that begin at stream position `base`; return (generation, offset) of the
        commit.
        """
        if self._segment.damaged or not self._segment.fits(len(plaintext)):
            self._next = self._next or self._make(len(plaintext))
            self._rotate(self._next, base, staging)
        elif self._old():
            self._turn(base, staging)
        return self._segment.generation, self._segment.commit(plaintext, base, staging)

    def _old(self) -> bool:
        longest_s = self._settings.segment_s
        used = self._segment.used > BLOCK
        return used and 0 < longest_s <= time.monotonic() - self._begun_at

    def _turn(self, position: int, staging: memoryview) -> None:
        """Go on in a new segment, so that the seal can rewrite this one; not if space is short."""
        self._begun_at = time.monotonic()
        size = self._settings.segment_bytes
        if self._next is None and self._free_bytes() > 2 * size + self._settings.reserve_bytes:
            with contextlib.suppress(OSError):  # there is no need for it
                self._next = self._create(size)
        if self._next is not None:
            self._rotate(self._next, position, staging)

    def fits(self, plain_bytes: int) -> bool:
        """Say whether the current segment takes a commit of this size."""
        return not self._segment.damaged and self._segment.fits(plain_bytes)

    def sync(self) -> None:
        """Make everything committed so far survive power loss.

        EvidenceError when the disk lost it.
        """
        self._segment.sync()
        if self._named:
            os.fsync(self._folder)
            self._named = False

    def prepare(self) -> None:
        """Make the next segment ready when the current one is half full and there is space."""
        half = self._segment.used > self._segment.capacity // 2
        size = self._settings.segment_bytes
        if self._settings.ahead and self._next is None and half and self._free_bytes() > size:
            self._next = self._create(size)

    def fall_back(self, position: int, staging: memoryview) -> bool:
        """Continue in the space that was held back; False when there is none. `position` is where
        the stream stands.
        """
        if self._next is None:
            if not self._reserve.give(self._settings.reserve_bytes):
                return False
            self._reserve.drop()
            # The names of the new file and of what was freed take some of it.
            self._next = self._create(self._settings.reserve_bytes - OVERHEAD_BYTES)
        self._rotate(self._next, position, staging)
        return True

    def renew(self, position: int, staging: memoryview) -> None:
        """Continue in a segment of full size, with space held back again."""
        if self._free_bytes() < self._settings.segment_bytes + self._settings.reserve_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # without taking any for a try
        self._reserve.hold()
        self._hold_spare()
        if self._next is None:
            self._next = self._create(self._settings.segment_bytes)
        self._rotate(self._next, position, staging)

    def finish(self, position: int, staging: memoryview) -> None:
        """End the last segment and give free what was held for the next ones."""
        if self._segment.damaged:
            self._segment.close()
        else:
            self._segment.finish(position, staging)
        self._drop()

    def leave(self) -> None:
        """Close everything as it is; the next start completes it."""
        self._segment.close()
        self._drop()

    def _drop(self) -> None:
        if self._next is not None:
            self._next.close()
            self._next.path.unlink(missing_ok=True)
            self._next = None
        self._reserve.drop()
        os.close(self._folder)
        self._lend_descriptor()

    def _rotate(self, following: SegmentFile, position: int, staging: memoryview) -> None:
        # The new name first: an incarnation whose newest segment is final has ended.
        self._activate(following)
        self._begun_at = time.monotonic()
        self._next = None
        old, self._segment = self._segment, following
        if old.damaged:  # nothing can be added to it; what it holds stays good
            old.sync()
            old.close()
        else:
            old.finish(position, staging)
        self._keep_descriptor()

    def _make(self, plain_bytes: int) -> SegmentFile:
        """Return a new segment, or, for one who may, a small one in the space held back for
        readers.
        """
        try:
            return self._create(self._settings.segment_bytes)
        except OSError:
            size = max(SPARE_PIECE_BYTES, 2 * BLOCK + commit_total(plain_bytes))
            if not (self._settings.spare and self._spare.give(size)):
                raise
            return self._create(size)

    def _create(self, capacity: int) -> SegmentFile:
        try:
            return self._new_file(capacity)
        except OSError as wrong:
            if wrong.errno not in _NO_DESCRIPTORS or not self._lend_descriptor():
                raise
            return self._new_file(capacity)

    def _lend_descriptor(self) -> bool:
        if self._kept < 0:
            return False
        os.close(self._kept)
        self._kept = -1
        return True

    def _keep_descriptor(self) -> None:
        if self._kept < 0:
            with contextlib.suppress(OSError):
                self._kept = os.dup(self._folder)

    def _new_file(self, capacity: int) -> SegmentFile:
        generation = self._store.next_generation(self._incarnation)
        header = SegmentHeader(
            generation, self._incarnation, self._stream, time.time_ns(), capacity, self._boot,
            self._keys.key_id,
        )  # fmt: skip
        return SegmentFile(self._store.unused(self._incarnation, generation), header, self._keys)

    def _activate(self, segment: SegmentFile) -> None:
        path = self._store.segment(segment.generation)
        if path.exists():
            raise EvidenceError(f"{path.name} exists already; it is not written over")
        os.rename(segment.path, path)
        segment.path = path
        self._named = True

    def _free_bytes(self) -> int:
        disk = os.statvfs(self._store.segments)
        return disk.f_frsize * (disk.f_bfree if os.geteuid() == 0 else disk.f_bavail)

    def _hold_spare(self) -> None:
        try:
            self._spare.hold()
        except OSError:
            pass  # the disk is nearly full: readers have what is left
