"""The tables of the search index. It is never the truth: it can be made anew from the segments.

`capture.index` opens and fills it, `capture.index_query` asks it. A session's number is stored as
SQLite's signed 64-bit integer (`stored`, `number`). Statement texts and other content are not
stored, only their words (FTS5 without content); everything that is shown comes from the segments,
which the extents point into.
"""

from __future__ import annotations

#: Written into the file; an index of another version is thrown away and filled anew.
VERSION = 5

PRAGMAS = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
PRAGMA wal_autocheckpoint = 4000;
PRAGMA temp_store = MEMORY;
PRAGMA cache_size = -32000;
"""

TABLES = """
-- How far each segment has been read: the next commit and where it stands. `done`: nothing more
-- comes from this segment.
CREATE TABLE segment (
    generation INTEGER PRIMARY KEY, incarnation INTEGER NOT NULL, number INTEGER NOT NULL,
    offset INTEGER NOT NULL, done INTEGER NOT NULL
);
-- Times are ns. `closed` is NULL until a SessionClose record came.
CREATE TABLE session (
    id INTEGER PRIMARY KEY, started INTEGER NOT NULL,
    client TEXT, client_port INTEGER, target TEXT, target_port INTEGER, route TEXT, worker INTEGER,
    account TEXT, assurance TEXT, how TEXT, unknown TEXT, owner BLOB,
    protocol TEXT, bytes_up INTEGER NOT NULL, bytes_down INTEGER NOT NULL,
    operations INTEGER NOT NULL, denied INTEGER NOT NULL, errors INTEGER NOT NULL,
    hidden INTEGER NOT NULL, gaps INTEGER NOT NULL, alarms INTEGER NOT NULL,
    closed INTEGER, reason TEXT, ended_by TEXT, secrets TEXT
);
CREATE INDEX session_started ON session (started);
CREATE INDEX session_account ON session (account, started);
CREATE INDEX session_protocol ON session (protocol, started);
CREATE INDEX session_target ON session (target, started);
CREATE INDEX session_open ON session (started) WHERE closed IS NULL;
-- Kernel facts of a process, once for all its sessions; the key is their BLAKE2b, 16 bytes.
CREATE TABLE owner (digest BLOB PRIMARY KEY, facts TEXT NOT NULL) WITHOUT ROWID;
-- Where a session's frames are: one row for each commit that holds any. `up_at` and `down_at` are
-- the offsets of its first bytes in the half-streams, NULL when it holds none; `others` counts
-- the frames that are not bytes received from a peer.
CREATE TABLE extent (
    session INTEGER NOT NULL, generation INTEGER NOT NULL, number INTEGER NOT NULL,
    offset INTEGER NOT NULL, up_at INTEGER, up_bytes INTEGER NOT NULL,
    down_at INTEGER, down_bytes INTEGER NOT NULL, others INTEGER NOT NULL,
    PRIMARY KEY (session, generation, number)
) WITHOUT ROWID;
-- Records that are looked for by their kind: gaps, alarms, decisions, accesses, refused
-- connections, heartbeats, starts, stops... Session 0 is the process itself.
CREATE TABLE event (
    generation INTEGER NOT NULL, number INTEGER NOT NULL, position INTEGER NOT NULL,
    kind INTEGER NOT NULL, time INTEGER NOT NULL, session INTEGER NOT NULL, fields TEXT NOT NULL,
    PRIMARY KEY (generation, number, position)
) WITHOUT ROWID;
CREATE INDEX event_kind ON event (kind, time);
CREATE INDEX event_session ON event (session) WHERE session != 0;
-- Incarnations that are over, by their own Stop record or by the Recovered record of another one:
-- their sessions that have no close were cut (ADR 4).
CREATE TABLE ended (incarnation INTEGER PRIMARY KEY, time INTEGER NOT NULL);
-- What the rows of `search` belong to. Their ids begin with the time at which the session began, so
-- that going through them backwards finds the newest sessions first (`first_text`).
CREATE TABLE text (id INTEGER PRIMARY KEY, session INTEGER NOT NULL);
-- Sessions with so many rows of `search` that they took ids of later milliseconds too, and their
-- last id.
CREATE TABLE overflowing (session INTEGER PRIMARY KEY, last INTEGER NOT NULL);
CREATE VIRTUAL TABLE search USING fts5 (
    words, content = '', columnsize = 0, tokenize = "unicode61 remove_diacritics 2"
);
"""

#: A word that no text contains: it keeps phrases from running over from one text into the next.
BOUNDARY = "\ue000"

_SIGN = 1 << 63
_TEXT_BITS = 20
MOST_TEXTS = 1 << _TEXT_BITS  #: ids of one millisecond; more go on in the next one's


def stored(session: int) -> int:
    """Return a session's number as SQLite stores it."""
    return session - (1 << 64) if session & _SIGN else session


def number(row: int) -> int:
    """Return the session's number of a stored one."""
    return row & ((1 << 64) - 1)


def first_text(started: int) -> int:
    """Return the first id for texts of sessions that began at `started`, in ns; those of the same
    millisecond share the ids up to the next one's.
    """
    return started // 1_000_000 << _TEXT_BITS


def text_moment(identity: int) -> int:
    """Return the millisecond of a text's id."""
    return identity >> _TEXT_BITS


def moment_start(moment: int) -> int:
    """Return the first id of a millisecond."""
    return moment << _TEXT_BITS


def moment_end(moment: int) -> int:
    """Return the id after the last one of a millisecond."""
    return moment + 1 << _TEXT_BITS
