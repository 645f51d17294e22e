"""The search index: an SQLite file beside the segments, filled by `Indexer`, asked through
`capture.index_query`.

The seal fills it while it follows the segments; a reader that finds it behind fills the rest itself
(`capture.index_fill`). Theory of operation: what a commit adds is worked out without the database
(`capture.index_delta`) and applied in a transaction that also moves the segment's cursor. Inside
the transaction the cursor is read anew: a commit that another process applied meanwhile is skipped,
one that does not continue the cursor is left out and makes the indexer `behind`. So any number of
processes may fill one index, in any order, and every commit counts once.

The index is never in the way of the evidence: when it cannot be written, `Indexer.failed` says why
and nothing is raised; what was taken is kept for the next flush while it is little. Nor is it the
truth: a damaged file is thrown away and filled anew.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from typing import TYPE_CHECKING, Any, Self

from capture.errors import EvidenceError
from capture.follow import BEGINNING, ENDED, Cursor
from capture.index_delta import Delta
from capture.index_rows import apply
from capture.index_schema import PRAGMAS, TABLES, VERSION

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from capture.follow import Followed

log = logging.getLogger("narrows.index")

BUSY_S = 1.0  #: how long a writer waits for another one; the seal must go on
RETRY_S = 1.0
LOOK_S = 1.0
FULL_ROWS = 4_000  #: a batch of so many rows is written at once
MOST_ROWS = 40_000  #: kept in memory while the index cannot be written

_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


class IndexUnusable(EvidenceError):
    """The index is missing or cannot be read: scan the segments, or reindex."""


class Index:
    """One index file, open; a context manager. `db` is its connection, in autocommit mode."""

    def __init__(self, path: Path | None, db: sqlite3.Connection, *, readonly: bool) -> None:
        self.path, self.db, self._readonly = path, db, readonly
        self._inode = 0 if path is None else path.stat().st_ino

    @classmethod
    def open(cls, path: Path, *, readonly: bool = False) -> Self:
        """Open the index, making it when there is none or it is damaged or of another version.

        With `readonly` nothing is made: IndexUnusable then.
        """
        if readonly:
            return cls(path, _connect_readonly(path), readonly=True)
        try:
            return cls(path, _connect(path), readonly=False)
        except sqlite3.DatabaseError as wrong:
            if not is_damage(wrong):
                raise IndexUnusable(f"the index cannot be opened: {wrong}") from wrong
            log.warning("the index is damaged (%s); it is filled anew", wrong)
            discard(path)
            return cls(path, _connect(path), readonly=False)

    @classmethod
    def in_memory(cls, path: Path) -> Self:
        """Return a copy of an index that the disk cannot take changes to, empty when it cannot be
        read.
        """
        db = sqlite3.connect(":memory:", isolation_level=None)
        try:
            with contextlib.closing(_connect_readonly(path)) as old:
                old.backup(db)
        except (sqlite3.Error, IndexUnusable):
            db.close()
            db = sqlite3.connect(":memory:", isolation_level=None)
            _create(db)
        return cls(None, db, readonly=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self.db.close()

    def follow_path(self) -> bool:
        """Open the file anew when another one lies under its path; say whether that was so."""
        if self.path is None:
            return False
        try:
            same = self.path.stat().st_ino == self._inode
        except FileNotFoundError:
            same = False
        if not same:
            self.db.close()
            self.db = type(self).open(self.path, readonly=self._readonly).db
            self._inode = self.path.stat().st_ino
        return not same

    def throw_away(self) -> None:
        """Remove a damaged index; `follow_path` then opens a fresh one. Nothing is lost by it."""
        if self.path is not None:
            log.warning("the index is damaged and thrown away; it is filled anew")
            discard(self.path)

    def cursors(self) -> dict[int, Cursor]:
        """Return the next commit to read of each segment; ENDED where nothing more comes."""
        rows = self.db.execute("SELECT generation, number, offset, done FROM segment")
        return {
            generation: ENDED if done else Cursor(number, offset)
            for generation, number, offset, done in rows
        }


def is_damage(wrong: Exception) -> bool:
    """Say whether SQLite reports that the file is not what it was."""
    return getattr(wrong, "sqlite_errorcode", 0) & 0xFF in _DAMAGED


def discard(path: Path) -> None:
    """Remove an index file and what SQLite keeps beside it."""
    for suffix in ("-wal", "-shm", ""):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _connect_readonly(path: Path) -> sqlite3.Connection:
    try:
        db = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_S, isolation_level=None
        )
        (version,) = db.execute("PRAGMA user_version").fetchone()
    except sqlite3.Error as wrong:
        raise IndexUnusable(f"the index cannot be read: {wrong}") from wrong
    if version != VERSION:
        db.close()
        raise IndexUnusable(f"the index has version {version}, not {VERSION}")
    return db


def _connect(path: Path) -> sqlite3.Connection:
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, cached_statements=64)
    try:
        db.executescript(PRAGMAS)
        if db.execute("PRAGMA user_version").fetchone()[0] != VERSION:
            _create(db)
    except BaseException:
        db.close()
        raise
    return db


def _create(db: sqlite3.Connection) -> None:
    with _transaction(db):
        if db.execute("PRAGMA user_version").fetchone()[0] == VERSION:
            return  # another process was first
        for (name,) in db.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
            " AND name NOT LIKE 'search_%'"
        ).fetchall():
            db.execute(f'DROP TABLE "{name}"')
        for statement in TABLES.split(";\n"):
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {VERSION}")


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Any:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


class Indexer:
    """Fills an index from commits. A commit that does not continue what it has is not taken."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._batch: list[Delta] = []
        self._rows = 0
        self._cursors = self._first_cursors()
        self._retry_at = self._look_at = 0.0
        self.failed = ""  #: why the index could not be written, or empty
        #: a commit was left out: `capture.index_fill.fill` brings the index up to date, and then
        #: this indexer goes on by itself
        self.behind = False

    def _first_cursors(self) -> dict[int, Cursor]:
        try:
            return self._index.cursors()
        except sqlite3.DatabaseError as wrong:
            if not is_damage(wrong):
                raise
            self._index.throw_away()
            self._index.follow_path()
            return self._index.cursors()

    def cursor(self, generation: int) -> Cursor:
        """Return the next commit that `take` wants of a segment."""
        return self._cursors.get(generation, BEGINNING)

    def take(self, followed: Followed) -> None:
        """Add a commit to the batch; a full batch is written."""
        generation, number = followed.generation, followed.commit.number
        if number > self.cursor(generation).number and not self._batch:
            self._look_again()
        expected = self.cursor(generation).number
        if number != expected:
            self.behind = self.behind or number > expected
            return
        delta = Delta(followed)
        if delta.unreadable:
            log.warning("%d records of segment %08x, commit %d, are not understood",
                        delta.unreadable, generation, number)  # fmt: skip
        self._batch.append(delta)
        self._cursors[generation] = delta.next
        self._rows += delta.rows
        if self._rows >= FULL_ROWS and time.monotonic() >= self._retry_at:
            self.flush()

    def flush(self) -> None:
        """Write the batch, rows and cursors in one transaction; `failed` says when it cannot be."""
        if not self._batch:
            return
        try:
            self._write()
        except (sqlite3.Error, IndexUnusable, OSError) as wrong:
            if not self.failed:
                log.warning("the index cannot be written: %s", wrong)
            self.failed = str(wrong)
            if is_damage(wrong):
                self._index.throw_away()
            self._retry_at = time.monotonic() + RETRY_S
            if self._rows > MOST_ROWS:
                self._drop()
        else:
            self.failed = ""

    def _write(self) -> None:
        self._index.follow_path()
        db = self._index.db
        with _transaction(db):
            cursors = self._index.cursors()
            fresh = []
            for delta in self._batch:
                number = cursors.get(delta.generation, BEGINNING).number
                if delta.number == number:
                    cursors[delta.generation] = delta.next
                    fresh.append(delta)
                elif delta.number > number:
                    self.behind = True
            apply(db, fresh)
        self._cursors = cursors
        self._batch.clear()
        self._rows = 0

    def _drop(self) -> None:
        """Forget the batch: it will be read again from the segments."""
        self._batch.clear()
        self._rows = 0
        self.behind = True
        self._look_again()

    def _look_again(self) -> None:
        """A commit was left out: see whether somebody has brought the index up to date since."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            with contextlib.suppress(sqlite3.Error, IndexUnusable):
                self._index.follow_path()
                self._cursors = self._index.cursors()
