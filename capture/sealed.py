"""The sealed store: finished segments become packs, and their files go.

`capture.seal` drives one `Rewriter` in what time the ledger leaves it. Theory of operation, for
each segment whose stream went on (or ended) and whose every commit is in the signed log:

1. a window of commits is written as a pack (`capture.packing`), which survives power loss;
2. its leaf goes into the next checkpoint (`capture.sealer`); the next window follows;
3. when the leaves of all of them are signed, the segment's file goes (`capture.recycle`).

Killed at any moment, the ledger says what to go on with: a pack without a signed leaf is written
anew, a file whose packs all have one goes. A segment that is damaged stays as it is.
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import orjson

from capture.errors import EvidenceError
from capture.follow import ENDED
from capture.keystore import KeyStore
from capture.packing import WINDOW_BYTES, Packer
from capture.recycle import recycle, sweep
from capture.reserve import Reserve
from capture.tail import SegmentReader
from capture.uncached import Uncached

if TYPE_CHECKING:
    from capture.crypt import Keys
    from capture.sealer import Sealer
    from capture.store import Store
    from capture.tail import CommitInfo

log = logging.getLogger("narrows.sealed")

LOOK_S = 1.0
RETRY_S = 5.0
#: With so much to rewrite, packs are not compressed: the disk fills faster than they are made.
LEAVE_AS_IS_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class RewriteSettings:
    """How finished segments are rewritten."""

    after_s: float = 30.0  #: a segment is left alone for so long after its last commit
    window_bytes: int = WINDOW_BYTES  #: plaintext of a pack
    reserve_bytes: int = 2 * WINDOW_BYTES  #: held back, so that a full disk can be made free


class Rewriter:
    """Rewrites the segments of one store; only the seal that holds the lock may have one."""

    def __init__(self, store: Store, keys: Keys, sealer: Sealer, settings: RewriteSettings) -> None:
        self._store, self._keys, self._sealer, self._settings = store, keys, sealer, settings
        self._keystore = KeyStore(store, keys)
        self._packer = Packer(store, self._keystore, settings.window_bytes)
        self._uncached = Uncached()
        self._reserve = Reserve(store.evidence / "reserve.seal", settings.reserve_bytes)
        self._reader: SegmentReader | None = None
        self._commits: list[CommitInfo] = []
        self._incarnations: dict[int, int] = {}  #: of the segments on disk; -1: unreadable
        self._refused: set[int] = set()  #: segments that cannot be rewritten
        self._queue: list[int] = []
        self._given = False  #: the space for a pack was given free
        self._look_at = 0.0
        self._told = (-1, 0)
        self.backlog = (0, 0)  #: finished segments whose files are there, and their bytes
        sweep(store)

    def step(self) -> bool:
        """Do the next piece of work, if there is any now: one pack, or one file that goes."""
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOK_S
            self._look()
        for generation in self._queue:
            first = self._sealer.unpacked(generation)
            if first < 0 and not self._sealer.replaced(generation):
                continue  # its last leaf waits for the checkpoint
            try:
                done = self._recycle(generation) if first < 0 else self._pack(generation, first)
            except OSError as refused:
                self._wait(refused)
                return False
            except EvidenceError as wrong:
                log.error("segment %08x cannot be rewritten: %s", generation, wrong)  # noqa: TRY400 - the reason says it all
                self._refused.add(generation)
                self._close()
                done = True
            if done:
                return True
        return False

    def relieve(self) -> None:
        """The disk refuses leaves, without which no file may go: give all of the space free."""
        self._reserve.give(self._settings.reserve_bytes)

    def close(self) -> None:
        """Close what is open."""
        self._close()

    def _pack(self, generation: int, first: int) -> bool:
        reader = self._open(generation)
        if not self._commits:  # its writer died, or went on, before it stored anything in it
            self._close()
            return self._recycle(generation)
        digests = self._sealer.digests(generation, len(self._commits))
        made = self._packer.pack(
            reader, self._commits, first, digests, compress=self.backlog[1] < LEAVE_AS_IS_BYTES
        )
        self._sealer.packed(made)
        if made.last:
            self._close()
        return True

    def _recycle(self, generation: int) -> bool:
        if not recycle(self._store, self._keystore, generation):
            return False
        self._queue.remove(generation)
        self._incarnations.pop(generation, None)
        return True

    def _open(self, generation: int) -> SegmentReader:
        if self._reader is None or self._reader.header.generation != generation:
            self._close()
            path = self._store.segment(generation)
            self._reader = SegmentReader(path, self._keys, uncached=self._uncached)
            end = self._sealer.cursor(generation)
            self._commits = [c for c in self._reader.commits() if c.number < end.number]
        return self._reader

    def _close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        self._commits = []

    def _wait(self, refused: OSError) -> None:
        """The disk refuses: give free what was held back for this, and try again a little later."""
        given = not self._given and self._reserve.give(self._settings.window_bytes)
        self._given = True
        log.warning("the sealed store cannot be written: %s", refused)
        self._close()
        self._queue = []
        self._look_at = time.monotonic() + (0 if given else RETRY_S)

    def _look(self) -> None:
        """Find the segments that can be rewritten, oldest first."""
        hot = self._store.generations()
        streams: dict[int, list[int]] = {}
        for generation in hot:
            streams.setdefault(self._incarnation(generation), []).append(generation)
        streams.pop(-1, None)
        self._incarnations = {g: self._incarnations[g] for g in hot}
        finished = sorted(
            generation
            for incarnation, generations in streams.items()
            for generation in self._finished(incarnation, generations)
        )
        self._queue = [g for g in finished if g not in self._refused and self._settled(g)]
        size = sum(map(self._size, finished))
        self._tell(len(finished), size)
        if not self._queue:
            with contextlib.suppress(OSError):  # there is no space to hold back now
                self._reserve.hold()
                self._given = False

    def _incarnation(self, generation: int) -> int:
        if generation not in self._incarnations:
            self._incarnations[generation] = -1
            with (
                contextlib.suppress(OSError, EvidenceError),
                SegmentReader(self._store.segment(generation)) as reader,
            ):
                self._incarnations[generation] = reader.header.incarnation
        return self._incarnations[generation]

    def _finished(self, incarnation: int, generations: list[int]) -> list[int]:
        """Return those that nothing is added to, and that nobody needs who recovers their writer:
        it wants the end of the stream.
        """
        cursor = self._sealer.cursor
        ended = not (self._store.open / f"{incarnation:08x}").exists()
        found = []
        later = False  #: a later segment has a commit, so that this one was read to its end
        for generation in reversed(generations):
            read = later or (ended and cursor(generation) == ENDED)
            if read and self._sealer.whole(generation):
                found.append(generation)
            later = later or cursor(generation).number > 0
        return found

    def _settled(self, generation: int) -> bool:
        with contextlib.suppress(FileNotFoundError):
            changed_s = self._store.segment(generation).stat().st_mtime
            return abs(time.time() - changed_s) >= self._settings.after_s
        return False

    def _size(self, generation: int) -> int:
        with contextlib.suppress(FileNotFoundError):
            return self._store.segment(generation).stat().st_size
        return 0

    def _tell(self, segments: int, size: int) -> None:
        """Write the backlog where the review API finds it."""
        if (segments, size) == self._told:
            return
        self.backlog = self._told = segments, size
        path = self._store.evidence / "seal.backlog"
        scratch = path.with_suffix(".new")
        with contextlib.suppress(OSError):
            scratch.write_bytes(orjson.dumps({"segments": segments, "bytes": size}))
            scratch.rename(path)
