"""Reads the evidence off the loop: a bounded number of threads, each with an index of its own.

`Reading.ask` runs one question and gives its answer, `Reading.pieces` reads something long bit by
bit, as fast as whoever wants it takes it. The index is brought up to date from the segments before
a question, at most a few times a second, so that an answer holds what is on disk now, whether or
not the seal runs. Where that is impossible (a full disk) the index is used as it is, and `stale`
says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from appliance.web.problem import Problem
from capture import index_query
from capture.errors import EvidenceError
from capture.frames import session_number
from capture.index import Index, IndexUnusable
from capture.index_fill import fill
from capture.reader import Reader

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator

    from capture.crypt import Keys
    from capture.index_query import Session
    from capture.store import Store

Answer = TypeVar("Answer")

log = logging.getLogger("narrows.review")

THREADS = 4
MOST_WAITING = 64
MOST_STREAMS = 8
ANSWER_S = 20.0
FRESH_S = 0.2
STALE_S = 2.0  #: after the index could not be brought up to date
CACHE_BYTES = 4 << 20
PIECE_BYTES = 256 << 10
BUSY_HEADERS = {"Retry-After": "2"}


class Opened:
    """The evidence as one thread sees it."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self.store = reading.store
        self.index = reading.open_index()
        self.reader = Reader(reading.store, reading.keys, self.index, CACHE_BYTES)

    def session(self, name: str) -> Session:
        """Return the session of this id; Problem when there is none."""
        try:
            found = index_query.session(self.index, session_number(name))
        except ValueError:
            found = None
        if found is None:
            raise Problem("not-found", f"no session is called {name}")
        return found

    def damaged(self) -> None:
        """Tell the log what could not be read since the last time."""
        for damage in self.reader.damage:
            log.warning("segment %08x at %d: %s", damage.generation, damage.offset, damage.reason)
        self._reading.damaged += len(self.reader.damage)
        self.reader.damage.clear()

    def close(self) -> None:
        """Let go of everything."""
        self.reader.close()
        self.index.close()


class Reading:
    """The threads. `stale` is why the index is behind the disk, or empty."""

    def __init__(self, store: Store, keys: Keys, answer_s: float = ANSWER_S) -> None:
        self.store, self.keys, self.answer_s = store, keys, answer_s
        self.stale = ""
        self.damaged = 0  #: pieces of evidence that could not be read
        self._threads = ThreadPoolExecutor(THREADS, "reading")
        self._mine = threading.local()
        self._filling = threading.Lock()
        self._fill_at = 0.0
        self._waiting = self._streams = 0

    async def ask(self, question: Callable[[Opened], Answer]) -> Answer:
        """Return the answer of one question; Problem when there are too many, or it takes too
        long.
        """
        if self._waiting >= MOST_WAITING:
            raise Problem("unavailable", "too many questions at once", headers=BUSY_HEADERS)
        self._waiting += 1
        begun: list[Opened] = []
        try:
            job = asyncio.wrap_future(self._threads.submit(self._answer, question, begun))
            async with asyncio.timeout(self.answer_s):
                return await job
        except TimeoutError as wrong:
            detail = "the question takes too long; ask for less"
            raise Problem("unavailable", detail, headers=BUSY_HEADERS) from wrong
        finally:
            for opened in begun:  # nobody waits for it any more
                opened.index.db.interrupt()
            self._waiting -= 1

    async def pieces(
        self, content: Callable[[Opened], Iterator[bytes]]
    ) -> AsyncGenerator[bytes, None]:
        """Yield something long in pieces of about 256 KiB, each read when it is asked for."""
        if self._streams >= MOST_STREAMS:
            raise Problem("unavailable", "too many streams at once", headers=BUSY_HEADERS)
        self._streams += 1
        thread = ThreadPoolExecutor(1, "stream")
        loop = asyncio.get_running_loop()
        opened: Opened | None = None
        source: Iterator[bytes] | None = None
        try:
            opened = await loop.run_in_executor(thread, self._open)
            source = content(opened)
            while piece := await loop.run_in_executor(thread, _gathered, source):
                yield piece
        finally:
            if opened is not None:
                thread.submit(_end, opened, source)
            thread.shutdown(wait=False)
            self._streams -= 1

    def close(self) -> None:
        """Wait for the questions that are being answered, and end the threads."""
        self._threads.shutdown(cancel_futures=True)

    def open_index(self) -> Index:
        """Return an index of the calling thread's own; Problem when there is none to be had."""
        try:
            return Index.open(self.store.index)
        except (EvidenceError, sqlite3.Error, OSError):
            pass  # a disk that takes nothing: what is there can still be read
        try:
            return Index.open(self.store.index, readonly=True)
        except EvidenceError as wrong:
            raise Problem("unavailable", "the index cannot be used") from wrong

    def _answer(self, question: Callable[[Opened], Answer], begun: list[Opened]) -> Answer:
        opened: Opened | None = getattr(self._mine, "opened", None)
        if opened is None:
            opened = self._mine.opened = Opened(self)
        begun.append(opened)
        try:
            self._freshen(opened.index)
            return question(opened)
        except sqlite3.Error as wrong:
            self._mine.opened = None
            opened.close()
            raise Problem("unavailable", "the index cannot be used now") from wrong
        finally:
            begun.clear()
            opened.damaged()

    def _open(self) -> Opened:
        opened = Opened(self)
        self._freshen(opened.index)
        return opened

    def _freshen(self, index: Index) -> None:
        """Bring the index up to date, unless that was done a moment ago."""
        with self._filling:
            if time.monotonic() >= self._fill_at:
                try:
                    fill(index, self.store, self.keys)
                    self.stale = ""
                except (IndexUnusable, sqlite3.Error, OSError) as wrong:
                    if not self.stale:
                        log.warning("the index is behind: %s", wrong)
                    self.stale = str(wrong)
                self._fill_at = time.monotonic() + (STALE_S if self.stale else FRESH_S)
        with contextlib.suppress(EvidenceError, sqlite3.Error, OSError):
            index.follow_path()


def _gathered(source: Iterator[bytes]) -> bytes:
    """Return the next pieces together; empty at the end."""
    found: list[bytes] = []
    size = 0
    for piece in source:
        found.append(piece)
        size += len(piece)
        if size >= PIECE_BYTES:
            break
    return b"".join(found)


def _end(opened: Opened, source: Iterator[bytes] | None) -> None:
    """Let go of everything, on the thread that read it; a program that a source runs ends too."""
    if isinstance(source, Generator):
        source.close()
    opened.damaged()
    opened.close()
