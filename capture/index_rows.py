"""Writes what commits add into the tables of the index; `capture.index` calls it in a
transaction.
"""

from __future__ import annotations

import hashlib
import json
from operator import attrgetter
from typing import TYPE_CHECKING

from capture import records
from capture.index_schema import BOUNDARY, MOST_TEXTS, first_text, stored, text_moment

if TYPE_CHECKING:
    import sqlite3

    from capture.index_delta import Delta, Event, Touched

_RECOVERED = records.KINDS[records.Recovered]
_STOP = records.KINDS[records.Stop]

#: Attributes of `capture.index_delta.Touched` and columns of the table, by how a later value is
#: taken in: added, the greater, the smaller, or the one that is set.
_ADDED = ("operations", "denied", "errors", "hidden", "gaps", "alarms")
_GREATEST = ("bytes_up", "bytes_down")
_LEAST = ("started",)
_SET = (
    "client", "client_port", "target", "target_port", "route", "worker", "account", "assurance",
    "how", "unknown", "owner", "protocol", "closed", "reason", "ended_by", "secrets",
)  # fmt: skip
_COLUMNS = (*_ADDED, *_GREATEST, *_LEAST, *_SET)
_values = attrgetter(*_COLUMNS)

_MERGED = ", ".join(
    [
        *[f"{name} = {name} + excluded.{name}" for name in _ADDED],
        *[f"{name} = max({name}, excluded.{name})" for name in _GREATEST],
        *[f"{name} = min({name}, excluded.{name})" for name in _LEAST],
        *[f"{name} = coalesce(excluded.{name}, {name})" for name in _SET],
    ]
)
_UPSERT = (
    f"INSERT INTO session (id, {', '.join(_COLUMNS)}) VALUES (?{', ?' * len(_COLUMNS)})"  # noqa: S608 - names from above
    f" ON CONFLICT (id) DO UPDATE SET {_MERGED}"
)


def apply(db: sqlite3.Connection, deltas: list[Delta]) -> None:
    """Write what `deltas` add, and the cursors after them. The caller holds the transaction."""
    sessions = _by_session(deltas)
    _put_places(db, deltas)
    _put_sessions(db, sessions)
    _put_texts(db, sessions)
    _put_events(db, deltas)


def _by_session(deltas: list[Delta]) -> dict[int, Touched]:
    """Return what all deltas say of each session. They are left as they are: a transaction that
    fails is tried again.
    """
    sessions: dict[int, Touched] = {}
    copied: set[int] = set()
    for delta in deltas:
        for session, touched in delta.sessions.items():
            known = sessions.get(session)
            if known is None:
                sessions[session] = touched
                continue
            if session not in copied:
                copied.add(session)
                known = sessions[session] = known.copy()
            known.add(touched)
    return sessions


def _put_places(db: sqlite3.Connection, deltas: list[Delta]) -> None:
    for generation, row in {
        d.generation: (d.incarnation, *d.next, d.final) for d in deltas
    }.items():
        db.execute("INSERT OR REPLACE INTO segment VALUES (?, ?, ?, ?, ?)", (generation, *row))
    for delta in deltas:
        if delta.number == 0:  # the incarnation went on: nothing comes from its segments before
            db.execute(
                "UPDATE segment SET done = 1 WHERE incarnation = ? AND generation < ?",
                (delta.incarnation, delta.generation),
            )
    db.executemany(
        "INSERT OR IGNORE INTO extent VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (stored(session), delta.generation, delta.number, delta.offset, *extent)
            for delta in deltas
            for session, extent in delta.extents.items()
        ],
    )


def _put_sessions(db: sqlite3.Connection, sessions: dict[int, Touched]) -> None:
    owners: dict[bytes, bytes] = {}
    rows = []
    for session, touched in sessions.items():
        facts = touched.owner
        if facts is not None:
            touched.owner = hashlib.blake2b(facts, digest_size=16).digest()
            owners[touched.owner] = facts
        rows.append((stored(session), *_values(touched)))
        touched.owner = facts
    db.executemany(
        "INSERT OR IGNORE INTO owner VALUES (?, ?)",
        [(digest, facts.decode()) for digest, facts in owners.items()],
    )
    db.executemany(_UPSERT, rows)


def _put_texts(db: sqlite3.Connection, sessions: dict[int, Touched]) -> None:
    boundary = f" {BOUNDARY} "
    texts, words, overflowing = [], [], []
    free: dict[int, int] = {}
    for session, touched in sessions.items():
        if not touched.texts:
            continue
        row, started = stored(session), touched.started
        if touched.client is None:  # its beginning was in an earlier transaction
            (started,) = db.execute("SELECT started FROM session WHERE id = ?", (row,)).fetchone()
        identity = _free_text(db, free, first_text(started))
        if text_moment(identity) != text_moment(first_text(started)):
            overflowing.append((row, identity))
        texts.append((identity, row))
        words.append((identity, boundary.join(touched.texts)))
    words.sort()  # SQLite writes out what it has collected whenever ids do not grow
    db.executemany("INSERT INTO text VALUES (?, ?)", texts)
    db.executemany("INSERT INTO search (rowid, words) VALUES (?, ?)", words)
    db.executemany("INSERT OR REPLACE INTO overflowing VALUES (?, ?)", overflowing)


def _free_text(db: sqlite3.Connection, free: dict[int, int], first: int) -> int:
    """Take the next id from `first` on. `free` has the next one of each millisecond that was asked
    for in this transaction.
    """
    while True:
        if first not in free:
            (last,) = db.execute(
                "SELECT max(id) FROM text WHERE id BETWEEN ? AND ?", (first, first + MOST_TEXTS - 1)
            ).fetchone()
            free[first] = first if last is None else last + 1
        identity = free[first]
        if identity < first + MOST_TEXTS:
            free[first] = identity + 1
            return identity
        first += MOST_TEXTS  # a session with a million texts: go on in the next millisecond


def _put_events(db: sqlite3.Connection, deltas: list[Delta]) -> None:
    db.executemany(
        "INSERT OR IGNORE INTO event VALUES (?, ?, ?, ?, ?, ?, ?)",
        [(delta.generation, delta.number, *event) for delta in deltas for event in delta.events],
    )
    for incarnation, time_ns in filter(None, (_ended(d, e) for d in deltas for e in d.events)):
        db.execute(
            "INSERT INTO ended VALUES (?, ?) ON CONFLICT (incarnation)"
            " DO UPDATE SET time = min(time, excluded.time)",
            (incarnation, time_ns),
        )


def _ended(delta: Delta, event: Event) -> tuple[int, int] | None:
    """Return (incarnation, time) when the event says that an incarnation is over."""
    if event.kind == _STOP:
        return delta.incarnation, event.time_ns
    if event.kind == _RECOVERED:
        return json.loads(event.fields)["incarnation"], event.time_ns
    return None
