"""Questions to the index: sessions by filter, by name and by words; a session's extents and events.

The command line and the reader ask; nothing is changed. Sessions come one by one, newest first, so
that a listing of a million needs no memory. What a search may look like: `capture.index_search`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from capture.frames import NAME_LETTERS, session_name, session_number
from capture.index_schema import number, stored
from capture.index_search import expressions, newest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from capture.index import Index


PAGE = 1_000  #: sessions that are read from the database at once


class State(Enum):
    """What became of a session."""

    RUNNING = "running"
    CLOSED = "closed"
    CUT = "cut"  #: its process is gone and wrote no close (ADR 4)


@dataclass(frozen=True, slots=True)
class Session:
    """A session as the index knows it. Times are ns; texts are None while they are not known."""

    number: int
    started: int
    ended: int | None  #: also of a cut session: when its process was found dead
    state: State
    client: str  #: "address:port"
    target: str
    route: str | None
    worker: int | None
    account: str | None
    assurance: str | None
    how: str | None
    unknown: str | None  #: why there is no account
    owner: dict[str, Any] | None
    protocol: str | None
    bytes_up: int
    bytes_down: int
    operations: int
    denied: int
    errors: int
    hidden: int
    gaps: int
    alarms: int
    reason: str | None
    ended_by: str | None
    secrets: str | None = None  #: "unparsed" when credentials, if there were any, are recorded

    @property
    def name(self) -> str:
        """Return the printed id."""
        return session_name(self.number)


class Place(NamedTuple):
    """Where a session stands in a list; it stays there while sessions come and go."""

    started: int
    session: int


@dataclass(frozen=True, slots=True)
class Filter:
    """Which sessions; what is None or empty does not matter."""

    words: str = ""
    account: str | None = None
    unattributed: bool = False  #: only those without an account
    since: int | None = None  #: started then or later
    until: int | None = None  #: started before
    state: State | None = None
    limit: int = 0  #: 0 for all
    oldest_first: bool = False
    protocol: str | None = None
    target: str | None = None  #: address, or "address:port" as it is printed
    after: Place | None = None  #: only what comes after this session in the list


@dataclass(frozen=True, slots=True)
class Extent:
    """Where one commit holds frames of a session; see `capture.index_schema`."""

    generation: int
    number: int
    offset: int
    up_at: int | None
    up_bytes: int
    down_at: int | None
    down_bytes: int
    others: int


@dataclass(frozen=True, slots=True)
class Event:
    """A record that is found by its kind."""

    kind: int
    time_ns: int
    session: int
    fields: dict[str, Any]


_SESSIONS = """
SELECT s.id, s.started, coalesce(s.closed, e.time), s.closed IS NOT NULL, e.time IS NOT NULL,
    s.client, s.client_port, s.target, s.target_port, s.route, s.worker, s.account, s.assurance,
    s.how, s.unknown, (SELECT facts FROM owner WHERE digest = s.owner), s.protocol, s.bytes_up,
    s.bytes_down, s.operations, s.denied, s.errors, s.hidden, s.gaps, s.alarms, s.reason,
    s.ended_by, s.secrets
FROM session AS s LEFT JOIN ended AS e ON e.incarnation = (s.id >> 40 & 0xffffff)
"""
_STATES = {
    State.CLOSED: "s.closed IS NOT NULL",
    State.CUT: "s.closed IS NULL AND e.time IS NOT NULL",
    State.RUNNING: "s.closed IS NULL AND e.time IS NULL",
}
#: That a session has an expression: of one session, cheap where few sessions are looked at...
_HAS = """EXISTS (
    SELECT 1 FROM search AS f CROSS JOIN text AS t ON t.id = f.rowid
    WHERE f.words MATCH ? AND f.rowid >= (s.started / 1000000 << 20) AND f.rowid <= coalesce(
        (SELECT last FROM overflowing WHERE session = s.id), (s.started / 1000000 + 1 << 20) - 1
    ) AND t.session = s.id
)"""
#: ...and of all sessions.
_FOUND = (
    "s.id IN (SELECT session FROM text WHERE id IN (SELECT rowid FROM search WHERE search MATCH ?))"
)


def sessions(index: Index, chosen: Filter) -> Iterator[Session]:
    """Yield the chosen sessions, the newest first unless told otherwise. NoWords when there is
    nothing to search for.
    """
    if chosen.words and not chosen.oldest_first and chosen.state in (None, State.CLOSED):
        found = _newest_found(index, chosen)
    else:
        found = _listed(index, chosen)
    return islice(found, chosen.limit) if chosen.limit else found


def _listed(index: Index, chosen: Filter) -> Iterator[Session]:
    """Yield in pages, so that a slow reader of the list does not hold the database."""
    tests, values = _tests(chosen)
    few = chosen.state in (State.RUNNING, State.CUT)
    for expression in expressions(chosen.words) if chosen.words else ():
        tests.append(_HAS if few else _FOUND)
        values.append(expression)
    order, after = ("ASC", ">") if chosen.oldest_first else ("DESC", "<")
    more = [] if chosen.after is None else [f"(s.started, s.id) {after} (?, ?)"]
    place: tuple[int, ...] = ()
    if chosen.after is not None:
        place = (chosen.after.started, stored(chosen.after.session))
    size = min(chosen.limit, PAGE) if chosen.limit else PAGE
    while True:
        where = f"WHERE {' AND '.join([*more, *tests])}" if more or tests else ""
        page = index.db.execute(
            f"{_SESSIONS} {where} ORDER BY s.started {order}, s.id {order} LIMIT ?",
            (*place, *values, size),
        ).fetchall()
        yield from map(_session, page)
        if len(page) < size:
            return
        place = (page[-1][1], page[-1][0])
        more = [f"(s.started, s.id) {after} (?, ?)"]


def _newest_found(index: Index, chosen: Filter) -> Iterator[Session]:
    """Yield what a search finds as it goes back in time, without collecting all of it."""
    tests, values = _tests(chosen)
    wanted = expressions(chosen.words)
    host = None if chosen.target is None else _address(chosen.target)[0]
    for text in (chosen.account, chosen.protocol, host):  # they are among a session's words
        if text is not None and any(map(str.isalnum, text)):
            wanted += expressions('"' + text.replace('"', " ") + '"')
    query = f"{_SESSIONS} WHERE {' AND '.join(['s.id = ?', *tests])}"
    before = None if chosen.after is None else (chosen.after.started, stored(chosen.after.session))
    ends = [end for end in (chosen.until, before and before[0] + 1) if end is not None]
    until = max(min(ends), 0) if ends else None
    for rows in newest(index.db, wanted, max(chosen.since or 0, 0), until):
        found = (index.db.execute(query, (row, *values)).fetchone() for row in rows)
        together = [_session(row) for row in found if row is not None]
        for session in sorted(together, key=_place, reverse=True):
            if before is None or _place(session) < before:
                yield session


def _place(session: Session) -> tuple[int, int]:
    return session.started, stored(session.number)


def session(index: Index, wanted: int) -> Session | None:
    """Return one session, or None when the index does not know it."""
    row = index.db.execute(f"{_SESSIONS} WHERE s.id = ?", (stored(wanted),)).fetchone()
    return None if row is None else _session(row)


def named(index: Index, prefix: str, most: int = 2) -> list[int]:
    """Return at most `most` sessions whose printed ids begin with `prefix`."""
    missing = NAME_LETTERS - len(prefix)
    try:
        low, high = session_number(prefix + "0" * missing), session_number(prefix + "z" * missing)
    except ValueError:
        return []
    rows = index.db.execute(
        "SELECT id FROM session WHERE id BETWEEN ? AND ? ORDER BY id LIMIT ?",
        (stored(low), stored(high), most),
    )
    return [number(row[0]) for row in rows]


def extents(index: Index, wanted: int) -> Iterator[Extent]:
    """Yield where the frames of a session are, in their order."""
    rows = index.db.execute(
        "SELECT generation, number, offset, up_at, up_bytes, down_at, down_bytes, others"
        " FROM extent WHERE session = ? ORDER BY generation, number",
        (stored(wanted),),
    )
    return (Extent(*row) for row in rows)


def commit_of(index: Index, wanted: int, offset: int, *, up: bool) -> tuple[int, int]:
    """Return (generation, number) of the commit that holds a byte of a half-stream, or would if it
    had been recorded: the last one whose bytes begin at or before `offset`. (0, 0) when there is
    none.
    """
    at = "up_at" if up else "down_at"
    row = index.db.execute(
        f"SELECT generation, number FROM extent WHERE session = ? AND {at} <= ?"  # noqa: S608 - one of two words
        " ORDER BY generation DESC, number DESC LIMIT 1",
        (stored(wanted), offset),
    ).fetchone()
    return (0, 0) if row is None else (row[0], row[1])


def events(index: Index, *kinds: int) -> Iterator[Event]:
    """Yield the records of these kinds, oldest first."""
    marks = ", ".join("?" * len(kinds))
    query = f"SELECT kind, time, session, fields FROM event WHERE kind IN ({marks}) ORDER BY time"  # noqa: S608 - marks only
    rows = index.db.execute(query, kinds)
    return (Event(row[0], row[1], number(row[2]), json.loads(row[3])) for row in rows)


class EventPlace(NamedTuple):
    """Where an event stands: its time, and the place of its frame."""

    time_ns: int
    generation: int
    commit: int
    position: int


def newest_events(
    index: Index, kinds: Sequence[int], after: EventPlace | None, limit: int
) -> list[tuple[EventPlace, Event]]:
    """Return at most `limit` records of these kinds, the newest first, older than `after`."""
    marks = ", ".join("?" * len(kinds))
    older = "" if after is None else "AND (time, generation, number, position) < (?, ?, ?, ?)"
    rows = index.db.execute(
        "SELECT time, generation, number, position, kind, session, fields FROM event"  # noqa: S608 - marks only
        f" WHERE kind IN ({marks}) {older}"
        " ORDER BY time DESC, generation DESC, number DESC, position DESC LIMIT ?",
        (*kinds, *(after or ()), limit),
    )
    return [
        (EventPlace(*row[:4]), Event(row[4], row[0], number(row[5]), json.loads(row[6])))
        for row in rows
    ]


def endpoint(host: str | None, port: int | None) -> str:
    """Return "address:port", an IPv6 address in brackets; empty when there is none."""
    if host is None:
        return ""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _tests(chosen: Filter) -> tuple[list[str], list[Any]]:
    tests: list[str] = []
    values: list[Any] = []
    if chosen.account is not None:
        tests.append("s.account = ?")
        values.append(chosen.account)
    if chosen.unattributed:
        tests.append("s.account IS NULL")
    if chosen.since is not None:
        tests.append("s.started >= ?")
        values.append(chosen.since)
    if chosen.until is not None:
        tests.append("s.started < ?")
        values.append(chosen.until)
    if chosen.state is not None:
        tests.append(_STATES[chosen.state])
    if chosen.protocol is not None:
        tests.append("s.protocol = ?")
        values.append(chosen.protocol)
    if chosen.target is not None:
        host, port = _address(chosen.target)
        tests.append("s.target = ?" if port is None else "s.target = ? AND s.target_port = ?")
        values += [host] if port is None else [host, port]
    return tests, values


def _address(text: str) -> tuple[str, int | None]:
    """Return (address, port) of "address:port", "[address]:port" or an address alone."""
    host, colon, port = text.rpartition(":")
    if colon and port.isdecimal() and len(port) <= 5 and (host.startswith("[") or ":" not in host):
        return host.strip("[]"), int(port)
    return text.strip("[]"), None


def _session(row: tuple[Any, ...]) -> Session:
    identity, started, ended, closed, gone, client, port, target, target_port, *rest = row
    route, worker, account, assurance, how, unknown, owner, *counts = rest
    state = State.CLOSED if closed else State.CUT if gone else State.RUNNING
    return Session(
        number(identity), started, ended, state, endpoint(client, port),
        endpoint(target, target_port), route, worker, account, assurance, how, unknown,
        None if owner is None else json.loads(owner), *counts,
    )  # fmt: skip
