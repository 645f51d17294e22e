"""Is what the gate recorded in the bench what was sent? Compared byte for byte, from the segments
themselves.

Content is known: load.c sends a fixed pattern, and its echo is compared with what was recorded of
the other direction; web_client.py sends one request over and over, and the bodies of its answers
are the same pattern. Completeness is known from the clients: what they counted as done must be in
the record.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench.web_client import BULK_PATH, SMALL_PATH, request
from capture import frames
from capture.frames import Kind, session_name
from capture.records import KINDS, Attributed, Operation, decode
from capture.segments import open_segment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from capture.crypt import Keys
    from capture.store import Store

PIECE = 256 * 1024
SMALL = 100
BULK_BODY_BYTES = 400 * PIECE  #: of the long answer
HEADER = struct.Struct("<c7xQ")
WEB = b"w"  #: stands for the mode of a session of web_client.py
ATTRIBUTED, OPERATION = KINDS[Attributed], KINDS[Operation]
QUERY = "abalance"  #: stands in pgbench's statement and in none of its own questions
MOST_TOLD = 10


@dataclass(slots=True)
class Sent:
    """What the clients did through the gate."""

    downloads: list[int] = field(default_factory=list)  #: bytes of each
    uploads: list[int] = field(default_factory=list)
    trips: int = 0  #: completed round trips of SMALL bytes
    queries: int = 0  #: completed queries of pgbench
    requests: int = 0  #: answered requests for the small page
    pages: int = 0  #: answered requests for the long one

    def bulk(self, way: str, size: int) -> None:
        """Note one bulk connection."""
        (self.downloads if way == "down" else self.uploads).append(size)


def pattern() -> bytes:
    """Return the bytes that load.c sends over and over."""
    x, made = 1, bytearray()
    for _ in range(PIECE):
        x = (x * 1103515245 + 12345) & 0xFFFFFFFF
        made.append(b"abcdefgh01234567"[x >> 16 & 15])
    return bytes(made)


@dataclass(slots=True)
class _Half:
    """One recorded half-stream: what it must hold, from `skip` on, over and over."""

    content: memoryview  #: at least two periods long
    period: int
    skip: int = 0
    received: int = 0

    def take(self, offset: int, payload: memoryview) -> str:
        """Compare the next frame; return what is wrong with it, or nothing."""
        expected, self.received = self.received, offset + len(payload)
        if offset != expected:
            return f"offset {offset} follows {expected}"
        start = max(self.skip - offset, 0)
        at = offset + start
        while start < len(payload):
            place = (at - self.skip) % self.period
            length = min(len(payload) - start, len(self.content) - place)
            if payload[start : start + length] != self.content[place : place + length]:
                return f"bytes {at} to {at + length} differ"
            start, at = start + length, at + length
        return ""


class _Answers:
    """One recorded half-stream of answers, each with a body of `body_bytes` of the pattern."""

    __slots__ = ("_head", "_left", "_long", "body_bytes", "count", "received")

    def __init__(self, body_bytes: int, long: memoryview) -> None:
        self.body_bytes, self._long = body_bytes, long
        self._head = b""  #: of the answer at hand, as far as it came
        self._left = 0  #: of its body
        self.count = self.received = 0

    def take(self, offset: int, payload: memoryview) -> str:
        """Compare the next frame; return what is wrong with it, or nothing."""
        expected, self.received = self.received, offset + len(payload)
        if offset != expected:
            return f"offset {offset} follows {expected}"
        at = 0
        while at < len(payload):
            if not self._left:
                head, end, _ = (self._head + bytes(payload[at:])).partition(b"\r\n\r\n")
                if not end:
                    self._head = head
                    return ""
                at += len(head) + len(end) - len(self._head)
                self._head, self._left = b"", self.body_bytes
                length = b"\r\nContent-Length: %d\r\n" % self.body_bytes
                if not head.startswith(b"HTTP/1.1 200 OK\r\n") or length not in head + b"\r\n":
                    return f"the head before byte {offset + at} is another"
            place = (self.body_bytes - self._left) % PIECE
            taken = min(len(payload) - at, self._left, len(self._long) - place)
            if payload[at : at + taken] != self._long[place : place + taken]:
                return f"bytes {offset + at} to {offset + at + taken} differ"
            at, self._left = at + taken, self._left - taken
            self.count += not self._left
        return ""


class CaptureCheck:
    """Reads every segment of a store and compares. `problems` stays empty when all is well."""

    def __init__(self) -> None:
        long = memoryview(pattern() * 3)
        small = bytes(long[:SMALL]) * 2000
        self._bulk, self._small = (long, PIECE), (memoryview(small), SMALL)
        self._halves: dict[tuple[int, int], _Half | _Answers] = {}
        self._modes: dict[int, tuple[bytes, int]] = {}
        self.recorded = Sent()
        self.owners: Counter[str] = Counter()  #: sessions by how their owner was found
        self.compared = 0
        self.problems: list[str] = []

    def read(self, store: Store, keys: Keys) -> None:
        """Walk all frames of the store."""
        for generation in store.all_generations():
            with open_segment(store, generation, keys) as reader:
                self._walk(
                    frame
                    for commit in reader.commits()
                    for frame in frames.walk(reader.plaintext(commit), reader.header.incarnation)
                )

    def _walk(self, found: Iterator[tuple[int, int, int, int, memoryview, int]]) -> None:
        for kind, session, _, offset, payload, _ in found:
            if kind <= Kind.DOWN:
                self._data(kind, session, offset, payload)
            elif kind == OPERATION:
                self._operation(decode(kind, payload)["text"])
            elif kind == ATTRIBUTED:
                found_by = decode(kind, payload)
                self.owners[found_by["reason"] or found_by["how"]] += 1

    def _operation(self, text: str) -> None:
        self.recorded.queries += QUERY in text
        self.recorded.requests += SMALL_PATH in text
        self.recorded.pages += BULK_PATH in text

    def _data(self, kind: int, session: int, offset: int, payload: memoryview) -> None:
        if session not in self._modes:
            self._begin(session, payload)
        half = self._halves.get((session, kind))
        if half is None:
            return
        wrong = half.take(offset, payload)
        self.compared += len(payload)
        if wrong:
            self._problem(f"session {session_name(session)}, {Kind(kind).name}: {wrong}")

    def _begin(self, session: int, payload: memoryview) -> None:
        """Learn from a session's first bytes what it is; one that is not ours is let be."""
        mode, total = (b"", 0)
        for path, body_bytes in ((SMALL_PATH, SMALL), (BULK_PATH, BULK_BODY_BYTES)):
            asked = request(path)
            if payload[: len(asked)] == asked:
                self._modes[session] = WEB, 0
                repeated = memoryview(asked * 1000)
                self._halves[session, Kind.UP] = _Half(repeated, len(asked))
                self._halves[session, Kind.DOWN] = _Answers(body_bytes, self._bulk[0])
                return
        if len(payload) >= HEADER.size and payload[0] in b"dup" and not any(payload[1:8]):
            mode, total = HEADER.unpack_from(payload)
        self._modes[session] = (mode, total)
        content, period = self._bulk if mode in b"du" else self._small
        if mode in (b"u", b"p"):
            self._halves[session, Kind.UP] = _Half(content, period, HEADER.size)
        if mode in (b"d", b"p"):
            self._halves[session, Kind.DOWN] = _Half(content, period)

    def finish(self, sent: Sent) -> None:
        """Compare what is recorded, as a whole, with what the clients did."""
        answered = {SMALL: 0, BULK_BODY_BYTES: 0}
        for session, (mode, total) in self._modes.items():
            down = self._halves.get((session, Kind.DOWN))
            if isinstance(down, _Answers):
                answered[down.body_bytes] += down.count
            elif mode == b"p":
                self.recorded.trips += self._halves[session, Kind.DOWN].received // SMALL
            elif mode:
                kind, skip = (Kind.DOWN, 0) if mode == b"d" else (Kind.UP, HEADER.size)
                received = self._halves[session, kind].received - skip
                self.recorded.bulk("down" if mode == b"d" else "up", received)
                if received != total:
                    name = session_name(session)
                    self._problem(f"session {name}: {received} of {total} bytes are recorded")
        for name in ("downloads", "uploads"):
            recorded, wanted = sorted(getattr(self.recorded, name)), sorted(getattr(sent, name))
            if recorded != wanted:
                self._problem(f"{name}: {len(recorded)} are recorded, {len(wanted)} were made")
        # The last ones under way when a client's time was up are recorded, and counted by nobody.
        for name in ("trips", "queries", "requests", "pages"):
            self._at_least(name, getattr(self.recorded, name), getattr(sent, name))
        self._at_least("answers", answered[SMALL], sent.requests)
        self._at_least("long answers", answered[BULK_BODY_BYTES], sent.pages)

    def _at_least(self, name: str, recorded: int, made: int) -> None:
        if recorded < made:
            self._problem(f"{name}: {recorded} are recorded, {made} were made")

    def _problem(self, text: str) -> None:
        if len(self.problems) < MOST_TOLD:
            self.problems.append(text)

    def lines(self) -> list[str]:
        """Return what the report says."""
        found = self.recorded
        differences = f"{len(self.problems) or 'no'} differences"
        bulk = f"{len(found.downloads)} downloads, {len(found.uploads)} uploads"
        web = f"{found.requests} requests, {found.pages} long answers"
        return [
            f"capture compared byte for byte: {self.compared} bytes, {differences}",
            f"recorded: {bulk}, {found.trips} round trips, {found.queries} queries, {web}",
            f"owners: {', '.join(f'{count} {how}' for how, count in self.owners.most_common())}",
            *(f"DIFFERENT: {problem}" for problem in self.problems),
        ]
