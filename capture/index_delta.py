"""What one commit adds to the index: a pass over its frames, without any database.

`capture.index.Indexer` makes one for each commit and applies several in one transaction. Bytes are
never copied or looked at: a data frame costs its header.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from capture import records
from capture.follow import Cursor
from capture.frames import FIRST_RECORD, HEADER, HEADER_BYTES, Kind
from capture.index_schema import stored

if TYPE_CHECKING:
    from collections.abc import Callable

    from capture.follow import Followed

#: How much of one text is looked at for words; a statement record holds no more.
MOST_TEXT = 64 * 1024
#: Facts whose values nobody searches for: there are a dozen in each session.
UNSEARCHED = frozenset({"parameter"})
UNPARSED = "unparsed"  #: of secrets, in Detected and in facts
#: Kernel facts that are searched for, besides the words of argv.
OWNER_TEXTS = ("exe", "exe_sha256", "cgroup", "unit", "container", "pod", "host")

_PEER = frozenset({Kind.UP.value, Kind.DOWN.value})
_KIND = records.KINDS
_EVENTS = frozenset(
    _KIND[record]
    for record in (
        records.Gap, records.Flow, records.Refused, records.Alarm, records.Decision,
        records.Access, records.Start, records.Stop, records.Recovered, records.Heartbeat,
    )
)  # fmt: skip


class Touched:
    """What a commit, or several, say of one session. Absent texts and times are None."""

    __slots__ = (
        "account", "alarms", "assurance", "bytes_down", "bytes_up", "client", "client_port",
        "closed", "denied", "ended_by", "errors", "gaps", "hidden", "how", "operations", "owner",
        "protocol", "reason", "route", "secrets", "started", "target", "target_port", "texts",
        "unknown", "worker",
    )  # fmt: skip

    def __init__(self, started: int) -> None:
        self.started = started
        self.bytes_up = self.bytes_down = 0  #: half-stream position after the last byte seen
        self.operations = self.denied = self.errors = self.hidden = self.gaps = self.alarms = 0
        self.client: str | None = None
        self.client_port: int | None = None
        self.target: str | None = None
        self.target_port: int | None = None
        self.route: str | None = None
        self.worker: int | None = None
        self.account: str | None = None
        self.assurance: str | None = None
        self.how: str | None = None
        self.unknown: str | None = None
        self.owner: bytes | None = None  #: JSON of the kernel facts
        self.protocol: str | None = None
        self.secrets: str | None = None
        self.closed: int | None = None
        self.reason: str | None = None
        self.ended_by: str | None = None
        self.texts: dict[str, None] = {}  #: what is searched for, each text once

    def copy(self) -> Touched:
        """Return a copy that `add` may change."""
        made = copy(self)
        made.texts = dict(self.texts)
        return made

    def add(self, later: Touched) -> None:
        """Take in what a later commit says."""
        self.started = min(self.started, later.started)
        self.bytes_up = max(self.bytes_up, later.bytes_up)
        self.bytes_down = max(self.bytes_down, later.bytes_down)
        self.operations += later.operations
        self.denied += later.denied
        self.errors += later.errors
        self.hidden += later.hidden
        self.gaps += later.gaps
        self.alarms += later.alarms
        for name in _SET_ONCE:
            value = getattr(later, name)
            if value is not None:
                setattr(self, name, value)
        self.texts.update(later.texts)


_SET_ONCE = (
    "client", "client_port", "target", "target_port", "route", "worker", "account", "assurance",
    "how", "unknown", "owner", "protocol", "closed", "reason", "ended_by", "secrets",
)  # fmt: skip


class Extent(NamedTuple):
    """A row of the table of that name, without session and place."""

    up_at: int | None
    up_bytes: int
    down_at: int | None
    down_bytes: int
    others: int


class Event(NamedTuple):
    """A record that is kept whole."""

    position: int
    kind: int
    time_ns: int
    session: int
    fields: str


class Delta:
    """One commit's part of the index."""

    __slots__ = (
        "events", "extents", "final", "generation", "incarnation", "next", "number", "offset",
        "sessions", "unreadable",
    )  # fmt: skip

    def __init__(self, followed: Followed) -> None:
        """Walk the commit's frames."""
        commit = followed.commit
        self.generation, self.incarnation = followed.generation, followed.incarnation
        self.number, self.offset = commit.number, commit.offset
        self.final = commit.final
        self.next = Cursor(commit.number + 1, commit.offset + commit.total_bytes)
        self.sessions: dict[int, Touched] = {}
        self.extents: dict[int, Extent] = {}
        self.events: list[Event] = []
        self.unreadable = 0  #: records that are not as `capture.records` says
        self._walk(followed.plaintext)

    @property
    def rows(self) -> int:
        """Return about how many rows it will make."""
        return len(self.extents) + len(self.sessions) + len(self.events)

    def _walk(self, plaintext: bytes) -> None:
        """Sort frames by session. The loop is `capture.frames.walk`, without making views."""
        places: dict[int, list[int]] = {}
        unpack, size, at = HEADER.unpack_from, len(plaintext), 0
        up, mark = Kind.UP.value, self.incarnation
        while at + HEADER_BYTES <= size:
            word, session, time_ns, offset = unpack(plaintext, at)
            length = word & 0xFFFFFF
            after = at + HEADER_BYTES + (length + 7 & ~7)
            if word >> 32 != mark or not word & 0xFFFFFFFF or after > size:
                break
            kind = word >> 24 & 0xFF
            place = places.get(session)
            if place is None and session:
                # [time, up at, up bytes, up end, down at, down bytes, down end, others]
                place = places[session] = [time_ns, -1, 0, 0, -1, 0, 0, 0]
            if place is None:
                self._own_record(kind, time_ns, plaintext[at + HEADER_BYTES :][:length], at)
            elif kind in _PEER:
                first = 1 if kind == up else 4
                if place[first] < 0:
                    place[first] = offset
                place[first + 1] += length
                place[first + 2] = offset + length
            else:
                place[7] += 1
                if kind >= FIRST_RECORD:
                    start = at + HEADER_BYTES
                    payload = plaintext[start : start + length]
                    self._record(session, kind, time_ns, payload, at)
            at = after
        self._settle(places)

    def _settle(self, places: dict[int, list[int]]) -> None:
        for session, (
            time_ns,
            up_at,
            up,
            up_end,
            down_at,
            down,
            down_end,
            others,
        ) in places.items():
            touched = self._touched(session, time_ns)
            touched.bytes_up = max(touched.bytes_up, up_end)
            touched.bytes_down = max(touched.bytes_down, down_end)
            self.extents[session] = Extent(
                None if up_at < 0 else up_at, up, None if down_at < 0 else down_at, down, others
            )

    def _touched(self, session: int, time_ns: int) -> Touched:
        touched = self.sessions.get(session)
        if touched is None:
            touched = self.sessions[session] = Touched(time_ns)
        return touched

    def _own_record(self, kind: int, time_ns: int, payload: bytes, at: int) -> None:
        if kind in _EVENTS:
            self.events.append(Event(at, kind, time_ns, 0, payload.decode()))

    def _record(self, session: int, kind: int, time_ns: int, payload: bytes, at: int) -> None:
        touched = self._touched(session, time_ns)
        if kind in _EVENTS:
            self.events.append(Event(at, kind, time_ns, stored(session), payload.decode()))
        reads = _READS.get(kind)
        if reads is not None:
            try:
                reads(touched, orjson.loads(payload), time_ns)
            except (ValueError, KeyError, TypeError):
                self.unreadable += 1


def _open(touched: Touched, fields: dict[str, Any], time_ns: int) -> None:
    touched.started = time_ns
    touched.client, touched.client_port = fields["client"], fields["client_port"]
    touched.target, touched.target_port = fields["target"], fields["target_port"]
    touched.route, touched.worker = fields["route"], fields["worker"]
    _search(touched, f"{fields['client']} {fields['target']}:{fields['target_port']}")


def _attributed(touched: Touched, fields: dict[str, Any], time_ns: int) -> None:
    del time_ns
    touched.account, touched.assurance = fields["account"], fields["assurance"]
    touched.how, touched.unknown = fields["how"], fields["reason"]
    words = [fields["account"] or ""]
    owner = fields["owner"]
    if owner is not None:
        touched.owner = orjson.dumps(owner)
        words += [value for name in OWNER_TEXTS if isinstance(value := owner.get(name), str)]
        words += [word for word in owner.get("argv") or () if isinstance(word, str)]
    _search(touched, " ".join(words))


def _detected(touched: Touched, fields: dict[str, Any], time_ns: int) -> None:
    del time_ns
    touched.protocol = fields["protocol"]
    touched.secrets = fields.get("secrets") or touched.secrets
    _search(touched, fields["protocol"])


def _operation(touched: Touched, fields: dict[str, Any], time_ns: int) -> None:
    del time_ns
    touched.operations += 1
    if fields["verdict"] == "denied":
        touched.denied += 1
    touched.texts[fields["text"]] = None
    if fields["binds"]:
        _search_values(touched, fields["binds"])


def _result(touched: Touched, fields: dict[str, Any], time_ns: int) -> None:
    del time_ns
    if fields["status"] == "error":
        touched.errors += 1
        _search(touched, f"{fields['sqlstate']} {fields['message']}")


def _fact(touched: Touched, fields: dict[str, Any], time_ns: int) -> None:
    del time_ns
    if fields["kind"] == "error":
        touched.errors += 1
    if fields["fields"].get("secrets") == UNPARSED:
        touched.secrets = UNPARSED
    if fields["kind"] not in UNSEARCHED:
        _search_values(touched, fields["fields"])


def _hidden(touched: Touched, fields: dict[str, Any], time_ns: int) -> None:
    del fields, time_ns
    touched.hidden += 1


def _gap(touched: Touched, fields: dict[str, Any], time_ns: int) -> None:
    del time_ns
    touched.gaps += 1
    _search(touched, f"{fields['reason']} {fields['detail']}")


def _alarm(touched: Touched, fields: dict[str, Any], time_ns: int) -> None:
    del time_ns
    touched.alarms += 1
    _search(touched, fields["kind"])
    _search_values(touched, fields["detail"])


def _decision(touched: Touched, fields: dict[str, Any], time_ns: int) -> None:
    del time_ns
    _search(touched, f"{fields['actor']} {fields['action']} {fields['reason']}")


def _close(touched: Touched, fields: dict[str, Any], time_ns: int) -> None:
    touched.closed = time_ns
    touched.reason, touched.ended_by = fields["reason"], fields["by"]
    touched.bytes_up, touched.bytes_down = fields["bytes_up"], fields["bytes_down"]


def _search(touched: Touched, text: str | None) -> None:
    if text:
        touched.texts[text[:MOST_TEXT]] = None


def _search_values(touched: Touched, value: Any) -> None:
    """Search for every text in a JSON value, and for the numbers that statements were given."""
    if isinstance(value, str):
        _search(touched, value)
    elif isinstance(value, dict):
        for inner in value.values():
            _search_values(touched, inner)
    elif isinstance(value, list):
        for inner in value:
            _search_values(touched, inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        _search(touched, str(value))


_READS: dict[int, Callable[[Touched, dict[str, Any], int], None]] = {
    _KIND[records.SessionOpen]: _open,
    _KIND[records.Attributed]: _attributed,
    _KIND[records.Detected]: _detected,
    _KIND[records.Operation]: _operation,
    _KIND[records.Result]: _result,
    _KIND[records.Fact]: _fact,
    _KIND[records.Hidden]: _hidden,
    _KIND[records.Gap]: _gap,
    _KIND[records.Alarm]: _alarm,
    _KIND[records.Decision]: _decision,
    _KIND[records.SessionClose]: _close,
}
