"""Opens commits with the appliance's key and compares what they say with the log.

Every record that must have a leaf has exactly the leaf that it must have, in the order of the
frames; the counts and sub-root of a session that ends are counted anew.
"""

from __future__ import annotations

import base64
import json
import re
import struct
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from capture.verify import leaf as leaves
from capture.verify.history import session_number
from capture.verify.tree import Tree, leaf

if TYPE_CHECKING:
    from collections.abc import Callable

    from capture.verify.history import History
    from capture.verify.log import Log
    from capture.verify.opened import Opened, Opener, Runs
    from capture.verify.packs import AnySegment
    from capture.verify.segment import Commit

_FRAME = struct.Struct("<QQQQ")
_LETTERS = "0123456789abcdefghjkmnpqrstvwxyz"
_WORD = re.compile("[a-z0-9][a-z0-9-]{0,31}")
_FIRST_RECORD, _OPEN, _OPERATION, _GAP, _CLOSE = 16, 16, 19, 24, 30
_START, _STOP = 31, 32
_SEGMENT_LETTERS = 8

Fields = dict[str, Any]


def _word(text: Any) -> str:
    return text if isinstance(text, str) and _WORD.fullmatch(text) else "other"


#: Frame kind -> (type of its leaf, what the leaf takes from the record).
_RECORDS: dict[int, tuple[str, Callable[[Fields], Fields]]] = {
    24: ("gap", lambda r: {"bytes": [r["bytes_up"], r["bytes_down"]], "count": r["count"],
                           "packets": r["packets"], "reason": _word(r["reason"]),
                           "scope": _word(r["scope"])}),
    28: ("decision", lambda r: {"action": _word(r["action"])}),
    29: ("access", lambda r: {"action": _word(r["action"])}),
    31: ("start", lambda r: {"boot": r["boot_id"], "role": _word(r["role"])}),
    32: ("stop", lambda r: {"reason": _word(r["reason"])}),
    33: ("recovered", lambda r: {
        "bytes": r["bytes"], "frames": r["frames"], "incarnation": r["incarnation"],
        "last": max(r["segments"], default=0), "power_loss": r["power_loss"],
        "segments": len(r["segments"])}),
    34: ("heartbeat", lambda r: {name: r[name] for name in (
        "accepted", "closed", "kernel_accepted", "listen_drops", "open", "refused", "sensor_lost",
        "worker")}),
}  # fmt: skip


@dataclass(slots=True)
class _Session:
    """What was counted of one session."""

    opened: str = ""
    sizes: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    frames: int = 0
    records: int = 0
    operations: int = 0
    gaps: int = 0
    tree: Tree = field(default_factory=Tree)
    extents: list[list[int]] = field(default_factory=list)

    def count(self, kind: int, length: int, start: int, end: int) -> None:
        """Count a frame that lies from `start` to `end` in its commit's plaintext."""
        self.frames += 1
        if kind < _FIRST_RECORD:
            self.sizes[(kind - 1) & 3] += length
        else:
            self.records += 1
        self.operations += kind == _OPERATION
        self.gaps += kind == _GAP
        if self.extents and self.extents[-1][1] == start:
            self.extents[-1][1] = end
        else:
            self.extents.append([start, end])

    def fold(self, where: bytes) -> None:
        """End the commit whose digest, generation and number are `where`."""
        if self.extents:
            runs = b"".join(struct.pack("<II", *extent) for extent in self.extents)
            self.tree.add(leaf(where + runs))
            self.extents = []

    def counted(self) -> Fields:
        """Return what its session_close leaf must say."""
        return {
            "bytes": self.sizes[:2], "own": self.sizes[2:], "frames": self.frames,
            "records": self.records, "operations": self.operations, "gaps": self.gaps,
            "opened": self.opened, "commits": self.tree.size,
            "subroot": base64.b64encode(self.tree.root()).decode(),
        }  # fmt: skip


class Content:
    """The records and sessions of the segments, in the order in which they are given."""

    def __init__(self, opener: Opener, history: History, log: Log, what: str) -> None:
        """`what` is "all" when every segment is given, so that every session is seen from its
        begin on.
        """
        self._opener, self._report = opener, opener.report
        self._history, self._log, self._what = history, log, what
        self._given = self._whole = what == "all"
        self._opened: Opened | None = None
        self._segment: AnySegment
        self._sessions: dict[int, _Session] = {}
        self._destroyed: set[int] = set()  #: sessions whose key is not there any more

    def begin(self, segment: AnySegment) -> None:
        """Open the next segment."""
        self._segment = segment
        self._opened = self._opener.open(segment)
        if self._opened is None:
            self.lost()

    def take(self, commit: Commit, hashed: bytes) -> None:
        """Compare the next sealed commit, of which the log has the hash `hashed`, with its
        leaves.
        """
        if self._opened is None:
            return
        where = {"segment": self._segment.generation, "offset": commit.offset}
        runs = self._opened.runs(commit, hashed)
        if runs is None:
            self.lost()
            return
        self._without(self._opened.missing)
        place = struct.pack("<II", self._segment.generation, commit.number)
        try:
            expected = self._frames(runs, commit.number, hashed + place)
        except (ValueError, KeyError, TypeError, IndexError, struct.error) as wrong:
            self._report.invalid(f"a record is malformed: {wrong!r}", **where)
            self.lost()
            return
        self._compare(expected, commit)

    def _without(self, missing: set[int]) -> None:
        """Say once of each session that nothing can be said of its content."""
        for number in missing - self._destroyed:
            name = _name(number)
            if self._what in {"all", name} or len(self._what) == _SEGMENT_LETTERS:
                self._report.incomplete(
                    "its data key was destroyed", segment=self._segment.generation, session=name
                )
        self._destroyed |= missing

    def lost(self) -> None:
        """Some of this incarnation is missing: sessions that it touches cannot be counted."""
        self._sessions.clear()
        self._whole = False

    def end(self, *, to_the_end: bool) -> None:
        """No more segments of an incarnation come: compare the sessions that were cut.

        Not so when the later ones were left out: what is open then is only not at its end.
        """
        for number, session in self._sessions.items() if to_the_end else ():
            name = _name(number)
            index = self._history.cut.get(name)
            if index is not None and (self._whole or session.opened):
                wanted = {"session": name, "reason": "cut", "by": "recovery", "declared": [0, 0, 0]}
                fields = self._leaf(index)
                self._differ({**wanted, **session.counted()}, fields, index, {"session": name})
        self._sessions.clear()
        self._whole = self._given

    def _frames(self, runs: Runs, commit: int, where: bytes) -> list[Fields]:
        """Count the frames; return what the leaves of the commit's records must say."""
        expected: list[Fields] = []
        touched: dict[int, _Session] = {}
        for base, run in runs:
            self._run(base, run, (commit, where), touched, expected)
        for session in touched.values():
            session.fold(where)
        return expected

    def _run(
        self, base: int, run: memoryview, place: tuple[int, bytes], touched: dict[int, _Session],
        expected: list[Fields],
    ) -> None:  # fmt: skip
        incarnation = self._segment.incarnation
        at = 0
        while at < len(run):
            word, number, time_ns, _ = _FRAME.unpack_from(run, at)
            kind, length = (word >> 24) & 0xFF, word & 0xFFFFFF
            start, at = at, at + _FRAME.size + (length + 7) // 8 * 8
            if word >> 32 != incarnation or at > len(run) or not kind:
                raise ValueError(f"no frame at {base + start}")
            if number >> 40 == incarnation:
                session = self._sessions.setdefault(number, _Session())
                session.count(kind, length, base + start, base + at)
                touched[number] = session
            payload = bytes(run[start + _FRAME.size : start + _FRAME.size + length])
            about = {"generation": self._segment.generation, "commit": place[0],
                     "time": _rfc3339(time_ns)}  # fmt: skip
            self._record(kind, number, payload, about, place[1], expected)

    def _record(
        self, kind: int, number: int, payload: bytes, about: Fields, where: bytes,
        expected: list[Fields],
    ) -> None:  # fmt: skip
        """Add what the leaf of this record must say, if it must have one."""
        session = self._sessions.get(number)
        if kind == _OPEN:
            if session is not None:
                session.opened = about["time"]
            expected.append({"type": "session_open", "session": _name(number), **about})
        elif kind == _CLOSE:
            if session is not None:
                record = json.loads(payload)
                declared = [record["bytes_up"], record["bytes_down"], record["operations"]]
                said = {"by": _word(record["by"]), "reason": _word(record["reason"])}
                expected.append(
                    self._closed(number, where, {**about, **said, "declared": declared})
                )
        elif kind in _RECORDS and not (kind == _GAP and number):
            name, taken = _RECORDS[kind]
            record = json.loads(payload)
            more = {"session": _name(number) if number else ""} if name == "decision" else {}
            expected.append({"type": name, **taken(record), **more, **about})
            if kind == _START and record["config_sha256"]:
                expected.append({"type": "config", "sha256": record["config_sha256"], **about})
            if kind == _STOP:
                cut = {"by": "stop", "reason": "cut", "declared": [0, 0, 0], **about}
                expected += [self._closed(n, where, cut) for n in list(self._sessions)]

    def _closed(self, number: int, where: bytes, about: Fields) -> Fields:
        session = self._sessions.pop(number)
        session.fold(where)
        known = session.counted() if self._whole or session.opened else {}
        return {"type": "session_close", "session": _name(number), **known, **about}

    def _compare(self, expected: list[Fields], commit: Commit) -> None:
        """Compare what the leaves must say with what they say, one by one."""
        place = (self._segment.generation, commit.number)
        where = {"segment": place[0], "offset": commit.offset}
        ranges = self._history.places.get(place, [])
        indexes = [index for first, count in ranges for index in range(first, first + count)]
        if self._opened is not None and self._opened.missing:
            indexes = [index for index in indexes if not self._is_missing(index)]
        at = 0
        for wanted in expected:
            fields = self._leaf(indexes[at]) if at < len(indexes) else {"type": "none"}
            if wanted["type"] == "config" and fields["type"] != "config":
                continue  # the log names a configuration only when it is another one
            if fields["type"] != wanted["type"]:
                self._report.invalid(
                    f"a {wanted['type']} record has no leaf of its own", **where,
                    session=wanted.get("session") or None,
                )  # fmt: skip
                continue
            self._differ(wanted, fields, indexes[at], where)
            at += 1
        for index in indexes[at:]:
            self._report.invalid("the leaf has no record", **where, leaf=index)

    def _differ(self, wanted: Fields, fields: Fields, index: int, where: Fields) -> None:
        session = wanted.get("session") or None
        for name, value in wanted.items():
            if fields.get(name) != value:
                self._report.invalid(
                    f"the leaf says {name} {fields.get(name)}, the segment {value}", leaf=index,
                    **{**where, "session": session},
                )  # fmt: skip

    def _is_missing(self, index: int) -> bool:
        """Say whether a leaf's record is one that cannot be opened any more."""
        assert self._opened is not None, "nothing is missing otherwise"
        fields = self._leaf(index)
        name = fields.get("session") or ""
        outside = not name or fields.get("by") == "stop"  # made by a Stop record
        return (session_number(name) if not outside else 0) in self._opened.missing

    def _leaf(self, index: int) -> Fields:
        try:
            return leaves.parse(self._log.entry(index))
        except (OSError, ValueError):
            return {"type": "unreadable"}


def _name(number: int) -> str:
    return "".join(_LETTERS[number >> shift & 31] for shift in range(60, -5, -5))


def _rfc3339(time_ns: int) -> str:
    moment = datetime.fromtimestamp(time_ns // 1_000_000_000, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{time_ns % 1_000_000_000:09d}Z"
