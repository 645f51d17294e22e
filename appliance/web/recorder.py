"""Writes the Access records of the review API: every read is in the evidence before it is answered.

`appliance.web.server` awaits `Recorder.record` before a handler runs. Theory of operation: one
thread owns the writer. It takes whatever is waiting, writes it, makes all of it durable in one
commit, and then tells those who wait; meanwhile more comes together. Between batches it completes
the evidence of dead writers, so that their sessions are seen to be cut also while no gate runs.

On a full disk the writer goes on in the space that is held back for readers (`capture.reserve`).
When that is used up too, `record` raises EvidenceError and nothing is shown; the thread goes on
trying.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple

from capture.errors import EvidenceError
from capture.records import Access
from capture.segment import SegmentWriter
from capture.settings import WriterSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from capture.crypt import Keys
    from capture.store import Store

log = logging.getLogger("narrows.review")

#: Small, without space of its own: what is held back for readers is for it.
SETTINGS = WriterSettings(
    chunk_bytes=512 << 10, chunk_count=3, segment_bytes=4 << 20, commit_s=0.0, reserve_bytes=0,
    ahead=False, spare=True,
)  # fmt: skip
MOST_OBJECTS = 1_000  #: sessions that one record names
MOST_QUERY = 4_096
MOST_WAITING = 256
BATCH = 64
DURABLE_S = 10.0  #: longest wait for a disk that stores
REFUSING_S = 1.5  #: and for one that says it cannot
RECOVER_S = 1.0


class _Waiting(NamedTuple):
    records: list[Access]
    done: Future[None]


class Recorder:
    """The thread and its queue. `failed` says why nothing can be recorded now, or is empty."""

    def __init__(self, store: Store, keys: Keys, config_sha256: str = "") -> None:
        self._store, self._keys, self._config = store, keys, config_sha256
        self._waiting: queue.Queue[_Waiting | None] = queue.Queue(MOST_WAITING)
        self._writer: SegmentWriter | None = None
        self._recovered_at = 0.0
        self.failed = ""
        self.refused = 0  #: reads that could not be recorded, so that nothing was shown
        self.recorded = 0
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    async def record(
        self, actor: str, action: str, query: str, objects: Sequence[str], outcome: str
    ) -> None:
        """Record a read; returns when it survives power loss, EvidenceError when it cannot."""
        asked = query[:MOST_QUERY]
        records = [
            Access(actor, action, asked, tuple(objects[at : at + MOST_OBJECTS]), outcome)
            for at in range(0, len(objects) or 1, MOST_OBJECTS)
        ]
        done: Future[None] = Future()
        try:
            self._waiting.put_nowait(_Waiting(records, done))
        except queue.Full:
            self.refused += 1
            raise EvidenceError("too many reads wait for being recorded") from None
        if not self._thread.is_alive():
            raise EvidenceError("the recorder has ended")
        await asyncio.wrap_future(done)

    def close(self) -> None:
        """Write what waits, and end the stream in an orderly way."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(EvidenceError):
            self._open()  # the start of the process is in the evidence before anybody reads
        while (batch := self._take()) is not None:
            if batch:
                self._write(batch)
            self._recover()
        if self._writer is not None:
            self._writer.close("stopped")

    def _take(self) -> list[_Waiting] | None:
        """Return what waits; None when it is time to end and nothing does."""
        batch: list[_Waiting] = []
        with contextlib.suppress(queue.Empty):
            first = self._waiting.get(timeout=RECOVER_S)
            while first is not None and len(batch) < BATCH:
                batch.append(first)
                first = self._waiting.get_nowait()
            if first is None:
                if not batch:
                    return None
                self._waiting.put(None)
            elif first is not batch[-1]:
                batch.append(first)
        return batch

    def _write(self, batch: list[_Waiting]) -> None:
        batch = [waiting for waiting in batch if waiting.done.set_running_or_notify_cancel()]
        try:
            writer = self._open()
            for waiting in batch:
                for record in waiting.records:
                    writer.record(0, record, time.time_ns())
            writer.sync()
            self._wait(writer)
        except (EvidenceError, OSError) as wrong:
            if not self.failed:
                log.warning("reads cannot be recorded: %s", wrong)
            self.failed = str(wrong)
            self.refused += len(batch)
            for waiting in batch:
                waiting.done.set_exception(EvidenceError(str(wrong)))
        else:
            self.failed = ""
            self.recorded += len(batch)
            for waiting in batch:
                waiting.done.set_result(None)

    def _wait(self, writer: SegmentWriter) -> None:
        """Wait for durability: while the disk refuses, the space held back may still take it."""
        target, began = writer.position, time.monotonic()
        while writer.durable < target:
            passed = time.monotonic() - began
            if passed > (DURABLE_S if writer.failed is None else REFUSING_S):
                raise writer.failed or EvidenceError("the disk does not store evidence")
            time.sleep(0.0005)

    def _open(self) -> SegmentWriter:
        if self._writer is None:
            try:
                self._writer = SegmentWriter(
                    self._store, self._keys, "review", role="review", settings=SETTINGS,
                    config_sha256=self._config,
                )  # fmt: skip
            except OSError as refused:
                raise EvidenceError(f"evidence cannot be written: {refused.strerror}") from refused
        return self._writer

    def _recover(self) -> None:
        now = time.monotonic()
        if self._writer is None or now - self._recovered_at < RECOVER_S:
            return
        self._recovered_at = now
        try:
            self._writer.recover()
        except (EvidenceError, OSError) as wrong:
            log.warning("the evidence of a dead writer cannot be completed now: %s", wrong)
