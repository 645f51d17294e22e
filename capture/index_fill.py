"""Brings an index up to date from the segments, or makes it anew.

The command line calls `fill` before every answer, so that what it shows is what is on disk now,
whether the seal is up to date, behind or down: most of the time that is the last fraction of a
second. The seal calls it when its indexer is `behind`. `rebuild` is `narrows evidence reindex`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from typing import TYPE_CHECKING

from capture.errors import EvidenceError
from capture.follow import Follower
from capture.index import Index, Indexer, IndexUnusable, discard, is_damage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from capture.crypt import Keys
    from capture.store import Store


PATIENCE_MS = 30_000  #: how long a reader waits for its turn to write


class Busy(EvidenceError):
    """Another process makes the index anew."""


def fill(index: Index, store: Store, keys: Keys) -> None:
    """Read every commit that is on disk now and not in the index; IndexUnusable when it fails.

    An index that turns out to be damaged is thrown away and filled from the beginning.
    """
    for _ in range(3):  # another process may make the index anew meanwhile
        index.follow_path()
        try:
            indexer = _feed(index, store, keys)
        except sqlite3.DatabaseError as wrong:
            if not is_damage(wrong) or index.path is None:
                raise IndexUnusable(f"the index cannot be read: {wrong}") from wrong
            index.throw_away()
            continue
        if not indexer.failed and not indexer.behind:
            return
        if indexer.failed and (index.path is None or index.path.exists()):
            raise IndexUnusable(f"the index cannot be brought up to date: {indexer.failed}")
    raise IndexUnusable("the index cannot be brought up to date while it is made anew")


def _feed(index: Index, store: Store, keys: Keys) -> Indexer:
    index.db.execute(f"PRAGMA busy_timeout = {PATIENCE_MS}")
    indexer = Indexer(index)
    follower = Follower(store, keys, indexer.cursor)
    try:
        while found := follower.step():
            for followed in found:
                indexer.take(followed)
    finally:
        follower.close()
    indexer.flush()
    return indexer


def current(store: Store, keys: Keys) -> Index:
    """Return the index, up to date; on a disk that takes no changes, a copy of it in memory."""
    try:
        index = Index.open(store.index)
        try:
            fill(index, store, keys)
        except BaseException:
            index.close()
            raise
    except (IndexUnusable, OSError):
        index = Index.in_memory(store.index)
        fill(index, store, keys)
    return index


def rebuild(store: Store, keys: Keys) -> int:
    """Make the index anew from the segments; return how many sessions it has.

    It is made beside the old one, which serves until then; then its pages replace the old ones in
    one transaction, which every process that has the file open sees as any other change. Busy when
    another process is at it.
    """
    with _alone(store):
        aside = store.index.with_name("index.new")
        discard(aside)
        try:
            with Index.open(aside) as fresh:
                fill(fresh, store, keys)
                _replace(store.index, fresh)
        finally:
            discard(aside)
    with Index.open(store.index) as index:
        fill(index, store, keys)
        sessions: int = index.db.execute("SELECT count(*) FROM session").fetchone()[0]
    return sessions


@contextlib.contextmanager
def _alone(store: Store) -> Iterator[None]:
    fd = os.open(store.evidence / "reindex.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as wrong:
            raise Busy("another process makes the index anew") from wrong
        yield
    finally:
        os.close(fd)


def _replace(path: Path, fresh: Index) -> None:
    try:
        with Index.open(path) as old:
            fresh.db.backup(old.db)
            old.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.DatabaseError as wrong:
        if not is_damage(wrong):
            raise IndexUnusable(f"the index cannot be replaced: {wrong}") from wrong
        discard(path)
        with Index.open(path) as made:
            fresh.db.backup(made.db)
