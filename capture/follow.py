"""Follows every segment on disk: gives each commit once, decrypted, in the order of its stream.

The seal drives one `Follower` and hands what it gives to the ledger and to the index, so that
segments are read and decrypted once. It never changes a file. Nothing is promised about the order
between streams: a `Recovered` record may come before the last commits of the incarnation that it
names.

Theory of operation. Segments of one incarnation are read in the order of their generations, one at
a time. A segment ends with its final commit. A writer names its next segment before it ends the
last one, but commits to it only after that: so once a later segment of the incarnation has a
commit, one more look shows the last of the earlier one. If that has no final commit, the disk
refused it or its writer died, and what follows its last good commit was never whole. Directories
are listed again only when they changed; a segment whose file is gone is read from its packs
(`capture.pack`), which give the same commits; a living segment that did not grow costs one read of
64 bytes, a finished one nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from capture.errors import EvidenceError, FormatError
from capture.pack import PackedSegment
from capture.segfile import BLOCK
from capture.segments import open_segment
from capture.store import SETTLED_NS
from capture.uncached import Uncached

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from capture.crypt import Keys
    from capture.segments import AnySegment
    from capture.store import Store
    from capture.tail import CommitInfo

#: How much one step gives, in bytes of segments.
STEP_BYTES = 8 << 20


class Cursor(NamedTuple):
    """The next commit to read of a segment."""

    number: int
    offset: int


BEGINNING = Cursor(0, BLOCK)
#: Of a segment that was read to its final commit.
ENDED = Cursor(1 << 32, 1 << 62)


@dataclass(frozen=True, slots=True)
class Followed:
    """One commit of a segment, as it lies on disk and opened."""

    generation: int
    incarnation: int
    stream: str
    commit: CommitInfo
    digest: bytes  #: SHA-256 of the block range, for the ledger; empty unless asked for
    plaintext: bytes  #: the frames; empty when the commit does not authenticate (see `damage`)


@dataclass(frozen=True, slots=True)
class Damage:
    """Something on disk that is not what a writer wrote."""

    generation: int
    offset: int  #: in the file; 0 for a whole segment
    #: "unreadable" (no header, or its key does not open), "commit" (does not authenticate), "chain"
    #: (the next commit is missing, though the segment is final)
    reason: str


class Unread(NamedTuple):
    """Commits of one segment that are on disk and were not given yet."""

    generation: int
    first: int  #: number of the first
    offset: int  #: where it begins
    tags: list[bytes]  #: their GCM tags


class Follower:
    """Every commit on disk, from the cursor on that `start` says for each generation."""

    def __init__(
        self, store: Store, keys: Keys, start: Callable[[int], Cursor] = lambda _: BEGINNING, *,
        digests: bool = False,
    ) -> None:  # fmt: skip
        """`digests`: hash every commit too, which costs more than all the rest."""
        self._store, self._start = store, start
        self._source = _Source(store, keys, start, digests, Uncached())
        self._known: set[int] = set()
        self._packed = False  #: the segments whose files are gone were taken up
        self._streams: dict[int, _Stream] = {}
        self._listed_ns = -1
        self.damage: list[Damage] = []  #: found since the caller last took it

    def step(self, limit: int = STEP_BYTES) -> list[Followed]:
        """Return what is new, at most about `limit` bytes of segments; empty when all was given.

        A stream that filled a step comes last in the next one.
        """
        self._look()
        found: list[Followed] = []
        taken = 0
        for stream in list(self._streams.values()):
            while taken < limit and (followed := stream.next(self.damage)) is not None:
                found.append(followed)
                taken += followed.commit.total_bytes
            del self._streams[stream.incarnation]
            if not stream.idle:
                self._streams[stream.incarnation] = stream  # last in turn
            if taken >= limit:
                break
        return found

    def unread(self, most: int = 2000) -> Iterator[Unread]:
        """Yield what is on disk beyond the last step, at most `most` commits of each segment.

        Only headers are read. The last commit is left out: it may be half written.
        """
        for stream in self._streams.values():
            yield from stream.unread(most)

    def following(self, incarnation: int) -> bool:
        """Say whether a segment of `incarnation` that a step has seen is not read to its end."""
        return incarnation in self._streams

    def close(self) -> None:
        """Close the segments that are open."""
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()

    def _look(self) -> None:
        """Take up segments that were not there before."""
        changed_ns = self._store.segments.stat().st_mtime_ns
        if changed_ns == self._listed_ns:
            return
        settled = abs(time.time_ns() - changed_ns) > SETTLED_NS
        # Whatever is packed later was there as a file when it was listed first.
        generations = self._store.generations() if self._packed else self._store.all_generations()
        self._packed = True
        for generation in generations:
            if generation not in self._known and self._start(generation) != ENDED:
                self._take_up(generation)
            self._known.add(generation)
        self._listed_ns = changed_ns if settled else -1

    def _take_up(self, generation: int) -> None:
        try:
            with open_segment(self._store, generation) as reader:
                incarnation = reader.header.incarnation
        except FileNotFoundError:
            return
        except FormatError:
            self.damage.append(Damage(generation, 0, "unreadable"))
            return
        stream = self._streams.get(incarnation)
        if stream is None:
            stream = self._streams[incarnation] = _Stream(incarnation, self._source)
        stream.waiting.append(generation)


class _Source(NamedTuple):
    """What it takes to read a segment."""

    store: Store
    keys: Keys
    start: Callable[[int], Cursor]
    digests: bool
    uncached: Uncached


class _Stream:
    """The segments of one incarnation that are not read to their end; only the first is open."""

    __slots__ = ("_head", "_last_look", "_source", "incarnation", "waiting")

    def __init__(self, incarnation: int, source: _Source) -> None:
        self.incarnation = incarnation
        self.waiting: deque[int] = deque()  #: later generations, oldest first
        self._source = source
        self._head: _Head | None = None
        self._last_look = False

    @property
    def idle(self) -> bool:
        """Say whether every segment was read to its end."""
        return self._head is None and not self.waiting

    def next(self, damage: list[Damage]) -> Followed | None:
        """Return the next commit, or None when there is none now."""
        while not self.idle:
            head = self._head or self._open(damage)
            if head is None:
                continue
            followed = head.next(damage)
            if followed is not None:
                if followed.commit.final:
                    self.close()
                return followed
            if self._last_look:
                head.left(damage)
                self.close()
            elif not self._left():
                return None
            else:
                self._last_look = True
        return None

    def unread(self, most: int) -> Iterator[Unread]:
        """Yield what was not given yet of each segment."""
        if self._head is not None:
            yield from self._head.unread(most)
        for generation in self.waiting:
            with (
                contextlib.suppress(OSError, EvidenceError),
                open_segment(self._source.store, generation) as reader,
            ):
                yield from _Head(reader, self._source.start(generation)).unread(most)

    def close(self) -> None:
        """Close the segment that is being read."""
        if self._head is not None:
            self._head.reader.close()
            self._head = None
        self._last_look = False

    def _open(self, damage: list[Damage]) -> _Head | None:
        generation = self.waiting.popleft()
        store, keys, start, digests, uncached = self._source
        try:
            reader = open_segment(store, generation, keys, uncached=uncached)
        except FileNotFoundError:
            return None
        except EvidenceError:
            damage.append(Damage(generation, 0, "unreadable"))
            return None
        cursor = start(generation)
        if reader.ends_final == cursor.offset:
            reader.close()
            return None
        self._head = _Head(reader, cursor, digests=digests)
        return self._head

    def _left(self) -> bool:
        """Say whether a later segment has a commit, so that nothing more comes to this one."""
        for generation in self.waiting:
            with (
                contextlib.suppress(OSError, EvidenceError),
                open_segment(self._source.store, generation) as reader,
            ):
                if reader.commit_at(BLOCK) is not None:
                    return True
        return False


class _Head:
    """The segment of a stream that is being read."""

    __slots__ = ("_digests", "_number", "_offset", "reader")

    def __init__(self, reader: AnySegment, cursor: Cursor, *, digests: bool = False) -> None:
        self.reader = reader
        self._digests = digests
        self._number, self._offset = cursor

    def next(self, damage: list[Damage]) -> Followed | None:
        """Return the commit at the cursor and move on; None when it is not wholly written."""
        commit = self.reader.commit_at(self._offset)
        if commit is None or commit.number != self._number:
            return None
        try:
            digest, plaintext = self.reader.load(commit, digest=self._digests)
        except FormatError:
            # A writer's store of some megabytes is seen in parts; but once the next commit is
            # there, this one is as it will be.
            after = self.reader.commit_at(commit.offset + commit.total_bytes)
            if after is None or after.number != commit.number + 1:
                return None
            digest, plaintext = self._load_damaged(commit, damage)
        self._number += 1
        self._offset += commit.total_bytes
        header = self.reader.header
        return Followed(
            header.generation, header.incarnation, header.stream, commit, digest, plaintext
        )

    def unread(self, most: int) -> Iterator[Unread]:
        """Yield the commits from the cursor on, in one piece, if there are any."""
        commits = islice(self.reader.commits(self._number, self._offset), 1, most + 1)
        tags = [commit.previous_tag for commit in commits]
        if tags:
            yield Unread(self.reader.header.generation, self._number, self._offset, tags)

    def left(self, damage: list[Damage]) -> None:
        """Nothing more comes; a final segment that was not read to its end is damaged."""
        if self.reader.ends_final:
            damage.append(Damage(self.reader.header.generation, self._offset, "chain"))

    def _load_damaged(self, commit: CommitInfo, damage: list[Damage]) -> tuple[bytes, bytes]:
        try:
            return self.reader.load(commit, digest=self._digests)
        except FormatError:
            damage.append(Damage(self.reader.header.generation, commit.offset, "commit"))
            if isinstance(self.reader, PackedSegment):
                return b"", b""
            return self.reader.digest(self.reader.raw(commit)) if self._digests else b"", b""
