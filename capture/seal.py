"""The seal's process object: follows the segments, keeps the ledger, the index and the sealed
store.

`appliance.daemon` calls `step` until it is told to stop. Only one seal runs for a state directory;
it may be killed at any time. Segments are read and decrypted once for both: a consumer that is
ahead passes over what it has.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import sqlite3
import time
from typing import TYPE_CHECKING

from capture.errors import EvidenceError
from capture.follow import ENDED, Cursor, Follower
from capture.index import Index, Indexer
from capture.sealed import Rewriter
from capture.sealer import Sealer

if TYPE_CHECKING:
    from pathlib import Path

    from capture.crypt import Keys
    from capture.follow import Followed
    from capture.sealed import RewriteSettings
    from capture.store import Store

log = logging.getLogger("narrows.seal")

#: So many leaves are sealed without waiting for the time.
MOST_LEAVES = 16384
#: A checkpoint is begun at this part of the time that it may be late.
MARGIN = 0.8
RETRY_S = 1.0
REWRITE_S = 0.5  #: a seal that is behind rewrites a pack so often all the same
OPEN_AGAIN_S = 10.0
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h


class SealRuns(EvidenceError):
    """Another seal runs on the same state directory."""


class Seal:
    """One seal over a state directory, which it locks."""

    def __init__(
        self, store: Store, keys: Keys, checkpoint_s: float = 5.0,
        rewrite: RewriteSettings | None = None,
    ) -> None:  # fmt: skip
        """Open everything; SealRuns when another does, EvidenceError when the ledger is not as
        signed.

        Without `rewrite` finished segments stay as they are.
        """
        store.prepare()
        _keep_memory()
        self._lock = _lock(store)
        try:
            self._sealer = Sealer(store, checkpoint_s)
        except BaseException:
            os.close(self._lock)
            raise
        self._store, self._keys = store, keys
        self._rewriter = None if rewrite is None else Rewriter(store, keys, self._sealer, rewrite)
        self._rewrite_at = 0.0
        self._indexing = _Indexing(store.index)
        self._follower = self._follow()
        self._due_s = checkpoint_s * MARGIN
        self._signed_at = time.monotonic() - self._due_s
        self._behind = False
        self._refused = False  #: the disk did not take the last leaves

    @property
    def backlog(self) -> tuple[int, int]:
        """Return how many finished segments were not rewritten yet, and their bytes."""
        return (0, 0) if self._rewriter is None else self._rewriter.backlog

    def step(self) -> bool:
        """Take in what is new on disk, and sign when it is time; say whether there was anything."""
        if self._sealer.waiting > 2 * MOST_LEAVES:
            self._sign_if_due()  # the disk refuses: take no more
            return False
        found = self._follower.step()
        for damage in self._follower.damage:
            log.error("segment %08x is damaged at %d: %s",
                      damage.generation, damage.offset, damage.reason)  # fmt: skip
            self._sealer.damaged(damage)
        self._follower.damage.clear()
        for followed in found:
            self._sealer.take(followed)
            self._indexing.take(followed)
        self._sealer.settle(self._follower.following)
        if not found:
            self._sealer.caught_up()
        self._behind = bool(found)
        self._sign_if_due()
        self._indexing.flush()
        if self._indexing.renewed():
            self._follower.close()
            self._follower = self._follow()
        return self._rewrite() or self._behind

    def _rewrite(self) -> bool:
        """Rewrite a piece of a finished segment, but not more than the ledger leaves time for."""
        if self._rewriter is None or self._refused:
            return False  # what space there is is the ledger's
        if self._behind and time.monotonic() < self._rewrite_at:
            return False
        self._rewrite_at = time.monotonic() + REWRITE_S
        return self._rewriter.step()

    def close(self) -> None:
        """Sign what was taken, and let go of everything."""
        self._sealer.close()
        if self._rewriter is not None:
            self._rewriter.close()
        self._indexing.close()
        self._follower.close()
        os.close(self._lock)

    def _follow(self) -> Follower:
        return Follower(self._store, self._keys, self._cursor, digests=True)

    def _cursor(self, generation: int) -> Cursor:
        return min(self._sealer.cursor(generation), self._indexing.cursor(generation))

    def _sign_if_due(self) -> None:
        passed = time.monotonic() - self._signed_at
        if passed < self._due_s and (self._sealer.waiting < MOST_LEAVES or passed < RETRY_S):
            return
        try:
            self._sealer.flush(self._follower.unread() if self._behind else ())
        except OSError as refused:
            log.warning("the ledger cannot be written: %s", refused)
            self._refused = True
            if self._rewriter is not None:
                self._rewriter.relieve()
            self._signed_at = time.monotonic() - self._due_s + RETRY_S
        else:
            self._refused = False
            self._signed_at = time.monotonic()


class _Indexing:
    """The index as the seal keeps it: it is never in the way of the ledger."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._index: Index | None = None
        self._indexer: Indexer | None = None
        self._open_at = 0.0
        self._open()

    def cursor(self, generation: int) -> Cursor:
        """Return the next commit that the index needs of a segment."""
        return ENDED if self._indexer is None else self._indexer.cursor(generation)

    def take(self, followed: Followed) -> None:
        """Add a commit."""
        if self._indexer is not None:
            self._indexer.take(followed)

    def flush(self) -> None:
        """Write what was taken, as far as the index can be written."""
        if self._indexer is not None:
            self._indexer.flush()

    def renewed(self) -> bool:
        """Say whether the index needs earlier commits now: somebody made it anew, or it could not
        be opened before.
        """
        if self._indexer is not None and not self._indexer.behind:
            return False
        return self._open()

    def close(self) -> None:
        """Write what was taken, and close the index."""
        self.flush()
        if self._index is not None:
            self._index.close()
        self._index = self._indexer = None

    def _open(self) -> bool:
        if time.monotonic() < self._open_at:
            return False
        try:
            if self._index is None:
                self._index = Index.open(self._path)
            self._indexer = Indexer(self._index)
        except (EvidenceError, sqlite3.Error, OSError) as wrong:
            log.warning("the index cannot be opened: %s", wrong)
            self._index = self._indexer = None
            self._open_at = time.monotonic() + OPEN_AGAIN_S
            return False
        return True


def _keep_memory() -> None:
    """Let malloc keep the memory of large commits for the next ones.

    By itself it gives every buffer of some megabytes back at once, and the kernel clears fresh
    pages for the next one: that costs as much as everything else that the seal does in bulk.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, not every libc
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 64 << 20)


def _lock(store: Store) -> int:
    lock = os.open(store.evidence / "seal.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise SealRuns(f"another seal runs on {store.state}") from None
    return lock
