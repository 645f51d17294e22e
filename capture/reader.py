"""Reads one session out of the segments: its frames in order, or the bytes of one side.

The command line and the exports read through it, also while the gate writes. With an index it
decrypts only commits that hold frames of the session, or, of a segment that is packed, only the
session's parts; without one it scans the segments of the session's incarnation. A commit that was
opened is kept for a while with the places of all its frames, so that exporting many sessions of the
same time opens each commit once. Memory is bounded by `cache_bytes` and what one frame holds.

What does not authenticate, or is not there any more, is left out and told in `damage`; nothing is
raised for it, because the rest is still evidence.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from capture import index_query
from capture.errors import EvidenceError
from capture.follow import BEGINNING, ENDED, Damage, Follower
from capture.frames import FIRST_RECORD, HEADER, HEADER_BYTES, Kind, incarnation_of
from capture.pack import PackedSegment
from capture.records import KINDS, Hidden, decode
from capture.segments import open_segment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from capture.crypt import Keys
    from capture.follow import Cursor
    from capture.index import Index
    from capture.index_query import Extent
    from capture.pack import Part
    from capture.segments import AnySegment
    from capture.store import Store

CACHE_BYTES = 32 << 20
UNKNOWN = "unknown"  #: stands for the type of a record that is not understood
_HIDDEN = KINDS[Hidden]


class Side(Enum):
    """Whose bytes: those that one side sent, or the gate's own that were sent to one side."""

    UP = Kind.UP.value
    DOWN = Kind.DOWN.value
    UP_OWN = Kind.UP_OWN.value
    DOWN_OWN = Kind.DOWN_OWN.value


class Frame(NamedTuple):
    """One frame of a session. `offset` is the place in the half-stream, for data frames."""

    kind: int
    time_ns: int
    offset: int
    payload: memoryview

    @property
    def is_record(self) -> bool:
        """Say whether it holds a record, not bytes."""
        return self.kind >= FIRST_RECORD

    def fields(self) -> dict[str, Any]:
        """Return a record's fields, its type under "record"; the kind and the payload as hex when
        it is not understood.
        """
        try:
            return decode(self.kind, self.payload)
        except ValueError:
            return {"record": UNKNOWN, "kind": self.kind, "hex": self.payload.hex()}


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a half-stream at `offset`; hidden ones are zero, and `hidden` says what they are."""

    offset: int
    data: memoryview
    hidden: str = ""


class _Opened:
    """A decrypted commit and where the frames of each session are in it."""

    __slots__ = ("places", "plaintext")

    def __init__(self, plaintext: bytes, incarnation: int) -> None:
        self.plaintext = memoryview(plaintext)
        self.places: dict[int, list[int]] = {}
        unpack, size, at = HEADER.unpack_from, len(plaintext), 0
        while at + HEADER_BYTES <= size:
            word, session, _, _ = unpack(plaintext, at)
            if word >> 32 != incarnation or not word & 0xFFFFFFFF:
                break
            self.places.setdefault(session, []).append(at)
            at += HEADER_BYTES + ((word & 0xFFFFFF) + 7 & ~7)

    @property
    def size(self) -> int:
        return len(self.plaintext)

    def frames(self, session: int, _commit: int = 0) -> Iterator[Frame]:
        for at in self.places.get(session, ()):
            word, _, time_ns, offset = HEADER.unpack_from(self.plaintext, at)
            start = at + HEADER_BYTES
            payload = self.plaintext[start : start + (word & 0xFFFFFF)]
            yield Frame(word >> 24 & 0xFF, time_ns, offset, payload)


class _OpenedPart:
    """What a pack holds of one session."""

    __slots__ = ("_runs", "size")

    def __init__(self, part: Part | None) -> None:
        self._runs: dict[int, list[memoryview]] = {}
        self.size = 0 if part is None else len(part.frames)
        for number, _, frames in part.commits() if part is not None else ():
            self._runs.setdefault(number, []).append(frames)

    def frames(self, _session: int, commit: int) -> Iterator[Frame]:
        unpack = HEADER.unpack_from
        for run in self._runs.get(commit, ()):
            at, size = 0, len(run)
            while at + HEADER_BYTES <= size:
                word, _, time_ns, offset = unpack(run, at)
                start = at + HEADER_BYTES
                yield Frame(
                    word >> 24 & 0xFF, time_ns, offset, run[start : start + (word & 0xFFFFFF)]
                )
                at = start + ((word & 0xFFFFFF) + 7 & ~7)


class Reader:
    """Reads sessions of one store; the index, if given, is up to date (`capture.index_fill`)."""

    def __init__(
        self, store: Store, keys: Keys, index: Index | None, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self._store, self._keys, self._index = store, keys, index
        #: (generation, commit, -1) of a commit, (generation, first commit, session) of a part
        self._cache: OrderedDict[tuple[int, int, int], _Opened | _OpenedPart] = OrderedDict()
        self._most_bytes, self._bytes = cache_bytes, 0
        self._segment: AnySegment | None = None
        self.damage: list[Damage] = []  #: found so far, each once

    def close(self) -> None:
        """Close the segment that is open and forget what is cached."""
        if self._segment is not None:
            self._segment.close()
            self._segment = None
        self._cache.clear()
        self._bytes = 0

    def frames(self, session: int) -> Iterator[Frame]:
        """Yield every frame of a session, in the order in which they were written."""
        yield from self._frames(session, lambda _: True)

    def records(self, session: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (time, fields) of every record of a session; see `Frame.fields`."""
        for frame in self._frames(session, lambda extent: extent.others > 0):
            if frame.is_record:
                yield frame.time_ns, frame.fields()

    def stream(self, session: int, side: Side, start: int = 0) -> Iterator[Piece]:
        """Yield the bytes of one half-stream in order. A jump in `offset` was not recorded.

        With `start`, commits that only hold bytes before it are passed over: what hides bytes of a
        frame never comes before the frame.

        The records that name hidden ranges follow the frame that holds them, before the next frame
        of that side: one frame is held back until they are known.
        """
        held: Frame | None = None
        hidden: list[tuple[int, int, str]] = []
        sender = "client" if side in (Side.UP, Side.UP_OWN) else "upstream"
        first = (0, 0)
        if start and self._index is not None and side in (Side.UP, Side.DOWN):
            first = index_query.commit_of(self._index, session, start, up=side is Side.UP)
        holds = _HOLDS[side]
        for frame in self._frames(
            session, lambda extent: (extent.generation, extent.number) >= first and holds(extent)
        ):
            if frame.kind == side.value:
                if held is not None:
                    yield from _pieces(held, hidden)
                held, hidden = frame, []
            elif frame.kind == _HIDDEN and held is not None and side in (Side.UP, Side.DOWN):
                fields = frame.fields()
                if fields.get("side") == sender:
                    hidden.append((fields["offset"], fields["length"], fields["kind"]))
        if held is not None:
            yield from _pieces(held, hidden)

    def _frames(self, session: int, wanted: Callable[[Extent], bool]) -> Iterator[Frame]:
        """Yield the frames of at least those commits that are wanted."""
        if self._index is None:
            for opened in self._scan(session):
                yield from opened.frames(session)
            return
        for extent in index_query.extents(self._index, session):
            if wanted(extent):
                found = self._opened(session, extent.generation, extent.number, extent.offset)
                if found is not None:
                    yield from found.frames(session, extent.number)

    def _opened(
        self, session: int, generation: int, number: int, offset: int
    ) -> _Opened | _OpenedPart | None:
        key = (generation, number, -1)
        try:
            if key not in self._cache:
                segment = self._switch(generation)
                if isinstance(segment, PackedSegment):
                    key = (generation, segment.pack_of(number).first, session)
                if key not in self._cache:
                    self._keep(key, _open(segment, session, number, offset))
        except (OSError, EvidenceError) as wrong:
            self._damaged(Damage(generation, offset, str(wrong)))
            return None
        self._cache.move_to_end(key)
        return self._cache[key]

    def _keep(self, key: tuple[int, int, int], opened: _Opened | _OpenedPart) -> None:
        self._cache[key] = opened
        self._bytes += opened.size
        while self._bytes > self._most_bytes and len(self._cache) > 1:
            self._bytes -= self._cache.popitem(last=False)[1].size

    def _switch(self, generation: int) -> AnySegment:
        if self._segment is None or self._segment.header.generation != generation:
            if self._segment is not None:
                self._segment.close()
                self._segment = None
            self._segment = open_segment(self._store, generation, self._keys)
        return self._segment

    def _scan(self, session: int) -> Iterator[_Opened]:
        incarnation = incarnation_of(session)
        follower = Follower(self._store, self._keys, self._of_incarnation(incarnation))
        try:
            while found := follower.step():
                for followed in found:
                    opened = _Opened(followed.plaintext, incarnation)
                    if session in opened.places:
                        yield opened
        finally:
            for damage in follower.damage:
                self._damaged(damage)
            follower.close()

    def _of_incarnation(self, incarnation: int) -> Any:
        def start(generation: int) -> Cursor:
            try:
                with open_segment(self._store, generation) as reader:
                    mine = reader.header.incarnation == incarnation
            except (OSError, EvidenceError):
                mine = True  # the follower says what is wrong with it
            return BEGINNING if mine else ENDED

        return start

    def _damaged(self, damage: Damage) -> None:
        if damage not in self.damage:
            self.damage.append(damage)


def _open(segment: AnySegment, session: int, number: int, offset: int) -> _Opened | _OpenedPart:
    """Return a commit of a segment's file, or a session's part of one that is packed."""
    if isinstance(segment, PackedSegment):
        return _OpenedPart(segment.part(session, number))
    commit = segment.commit_at(offset)
    if commit is None or commit.number != number:
        raise EvidenceError(f"commit {number} is not at {offset}")
    return _Opened(segment.plaintext(commit), segment.header.incarnation)


#: Which commits may hold bytes of a side, or records that say which of them are hidden.
_HOLDS: dict[Side, Callable[[Extent], bool]] = {
    Side.UP: lambda extent: extent.up_at is not None or extent.others > 0,
    Side.DOWN: lambda extent: extent.down_at is not None or extent.others > 0,
    Side.UP_OWN: lambda extent: extent.others > 0,
    Side.DOWN_OWN: lambda extent: extent.others > 0,
}


def _pieces(frame: Frame, hidden: list[tuple[int, int, str]]) -> Iterator[Piece]:
    """Cut a frame at the edges of its hidden ranges."""
    at, end = frame.offset, frame.offset + len(frame.payload)
    for start, length, kind in sorted(hidden):
        start, stop = max(start, at), min(start + length, end)  # noqa: PLW2901 - cut to the frame
        if start >= stop:
            continue
        if start > at:
            yield Piece(at, frame.payload[at - frame.offset : start - frame.offset])
        yield Piece(start, frame.payload[start - frame.offset : stop - frame.offset], kind)
        at = stop
    if at < end:
        yield Piece(at, frame.payload[at - frame.offset :])
