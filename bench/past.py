"""A store full of generated sessions: written by the real writer, indexed as the seal indexes.

Every second session says more after the index has taken in its beginning, as sessions that last do.
Words are drawn so that few are in most sessions and most are in few.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from capture.follow import Follower
from capture.index import Index, Indexer
from capture.records import (
    Attributed,
    Detected,
    Operation,
    Result,
    SessionClose,
    SessionOpen,
)
from capture.segment import SegmentWriter
from capture.settings import WriterSettings

if TYPE_CHECKING:
    from capture.crypt import Keys
    from capture.records import Record
    from capture.store import Store

SETTINGS = WriterSettings(commit_s=0.05, reserve_bytes=0)
START_NS = 1_780_000_000_000_000_000
STEP_NS = 2_500_000_000  #: between two sessions: a million take a month
TOGETHER = 2_000  #: sessions between two looks of the index
ACCOUNTS = [f"service-{number:02}" for number in range(40)]
TARGETS = [f"198.51.100.{number}" for number in range(1, 61)]
PROTOCOLS = ["postgresql", "postgresql", "postgresql", "http1", "opaque"]
TABLES = [f"table{number:04}" for number in range(3_000)]
OWNERS = [
    {"host": f"host{n:03}", "pid": 4000 + n, "uid": 1000, "exe": f"/opt/app{n:03}/run",
     "exe_sha256": f"{n:064x}", "argv": ["run", "--shard", str(n)],
     "cgroup": f"/system.slice/app{n:03}.service"}
    for n in range(300)
]  # fmt: skip


@dataclass(slots=True)
class _Living:
    number: int
    opened_ns: int
    said: int = 0


class Past:
    """Writes sessions into a store and its index."""

    def __init__(self, store: Store, keys: Keys) -> None:
        store.prepare()
        self._chance = random.Random(1)
        self._writer = SegmentWriter(
            store, keys, "gate-0", role="gate", settings=SETTINGS, wake=lambda: None
        )
        self._index = Index.open(store.index)
        self._indexer = Indexer(self._index)
        self._follower = Follower(store, keys, self._indexer.cursor)
        self._now = START_NS

    def write(self, count: int) -> None:
        """Write `count` sessions, all but the last few of them ended."""
        lasting: list[_Living] = []
        for number in range(count):
            session = self._open()
            self._say(session)
            if number % 2:
                lasting.append(session)
            else:
                self._close(session)
            if number % TOGETHER == TOGETHER - 1:
                self._take_in()
                for session in lasting:
                    self._say(session)
                    self._close(session)
                lasting.clear()
        self._take_in()

    def close(self) -> None:
        """End the writer as if it were killed later: what did not end runs."""
        self._take_in()
        self._follower.close()
        self._index.close()
        self._writer.close("stopped")

    def _open(self) -> _Living:
        chance, self._now = self._chance, self._now + STEP_NS
        living = _Living(self._writer.new_session(), self._now)
        target = chance.choice(TARGETS)
        self._put(living, SessionOpen(
            f"192.0.2.{chance.randrange(1, 250)}", chance.randrange(20_000, 60_000), target, 5432,
            "databases", "write", "client", 0,
        ))  # fmt: skip
        if chance.random() < 0.02:
            self._put(living, Attributed(None, "none", "none", "no-sensor"))
        else:
            account = chance.choice(ACCOUNTS)
            self._put(living, Attributed(account, "kernel", "syn", owner=chance.choice(OWNERS)))
        self._put(living, Detected(chance.choice(PROTOCOLS)))
        return living

    def _say(self, living: _Living) -> None:
        chance = self._chance
        table = TABLES[min(int(chance.paretovariate(0.6)), len(TABLES)) - 1]
        text = (
            f"select id, name, amount from {table} where customer = {chance.randrange(10**7)}"
            f" and region = 'r{chance.randrange(100)}'"
        )
        if chance.random() < 0.1:
            text = f"update {table} set amount = amount + 1 where id = {chance.randrange(10**7)}"
        living.said += 1
        self._put(living, Operation(living.said, text.split()[0].upper(), text, 0, len(text)))
        self._put(living, Result(living.said, "ok", "SELECT 1", 1, 100, 1000))

    def _close(self, living: _Living) -> None:
        close = SessionClose("fin", "client", 500, 900, living.said, living.opened_ns)
        self._put(living, close)

    def _put(self, living: _Living, record: Record) -> None:
        self._writer.record(living.number, record, self._now)

    def _take_in(self) -> None:
        """Bring the index up to date, as the seal does a few times a second."""
        self._writer.wait_durable()
        while found := self._follower.step():
            for followed in found:
                self._indexer.take(followed)
        self._indexer.flush()
