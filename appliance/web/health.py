"""How the appliance is: a short answer for anybody, and metrics for Prometheus.

Neither shows anything of a session, so neither is a read of evidence, and no Access record is
written. What was lost is counted from the evidence: a number here is the number that the records
have.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from aiohttp import web

from appliance import live
from appliance.web.routes import Nothing, Route
from appliance.web.tokens import Right
from capture import records

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from appliance.web.reading import Opened
    from appliance.web.review import Review
    from appliance.web.routes import Asked

TEXT = "text/plain"
LATE_S = 30.0  #: a checkpoint as old as this says that the seal does not run
PULSE_S = 1.0
COUNT_S = 5.0  #: counts of the evidence are this old at most

Sample = tuple[str, str, str, list[tuple[dict[str, Any], float]]]  #: name, type, help, values


class Health(TypedDict):
    """Whether each part does its work; `status` is ok when all do."""

    status: Literal["ok", "degraded"]
    recording: bool  #: reads can be recorded, so they are answered
    index: bool
    gate: bool  #: every gate worker that is there answers and can write evidence
    seal: bool


class Counts:
    """Numbers of the evidence, counted a few times a minute at most."""

    def __init__(self) -> None:
        self._counted_at = -COUNT_S
        self._found: list[Sample] = []

    def of(self, opened: Opened) -> list[Sample]:
        """Return what was lost, alarmed and refused, and what the kernel dropped."""
        if time.monotonic() - self._counted_at >= COUNT_S:
            self._found = list(_losses(opened))
            self._counted_at = time.monotonic()
        return self._found


class Pulse:
    """The answer to whether the appliance works, worked out once a second at most: anybody may
    ask, and asking the workers takes a thread.
    """

    def __init__(self) -> None:
        self._asking = asyncio.Lock()
        self._known: Health | None = None
        self._asked_at = 0.0

    async def of(self, review: Review) -> Health:
        """Return how the parts are, as of a second ago at most."""
        async with self._asking:
            if self._known is None or time.monotonic() - self._asked_at >= PULSE_S:
                self._known = await _health(review)
                self._asked_at = time.monotonic()
        return self._known


async def get_health(review: Review, asked: Asked, given: Nothing) -> Health:
    """Say whether the appliance works, as of a second ago at most; needs no token."""
    del asked, given
    return await review.pulse.of(review)


async def _health(review: Review) -> Health:
    stats = await review.reading.ask(lambda _: _workers(review))
    gate = bool(stats) and all(told is not None and not told["failed"] for told in stats)
    parts = {
        "recording": not review.recorder.failed, "index": not review.reading.stale,
        "gate": gate, "seal": 0 <= _checkpoint_age(review) < LATE_S,
    }  # fmt: skip
    status: Literal["ok", "degraded"] = "ok" if all(parts.values()) else "degraded"
    return {
        "status": status, "recording": parts["recording"], "index": parts["index"],
        "gate": parts["gate"], "seal": parts["seal"],
    }  # fmt: skip


async def get_metrics(review: Review, asked: Asked, given: Nothing) -> web.StreamResponse:
    """Return metrics in the text format of Prometheus."""
    del asked, given
    samples = await review.reading.ask(
        lambda opened: [*_gate(review), *review.counts.of(opened), *_machine(review)]
    )
    body = "".join(_lines(samples)).encode()
    return web.Response(body=body, headers={"Content-Type": f"{TEXT}; version=0.0.4"})


def _workers(review: Review) -> list[dict[str, Any] | None]:
    """Return what each worker says; None for one that does not answer."""
    found: list[dict[str, Any] | None] = []
    for path in live.workers(review.run):
        told: dict[str, Any] | None = None
        with contextlib.suppress(OSError, ValueError):
            told = live.ask(path, {"do": "stats"}, timeout_s=2.0)
        found.append(told)
    return found


def _gate(review: Review) -> Iterator[Sample]:
    told = _workers(review)
    answered = [stats for stats in told if stats is not None]
    yield "narrows_gate_workers", "gauge", "Gate workers that are there.", [({}, len(told))]
    yield (
        "narrows_gate_workers_silent", "gauge", "Gate workers that do not answer.",
        [({}, len(told) - len(answered))],
    )  # fmt: skip
    for name, kind, text in (
        ("open", "gauge", "Sessions that run."),
        ("accepted", "counter", "Sessions accepted since the worker began."),
        ("closed", "counter", "Sessions ended since the worker began."),
        ("refused", "counter", "Connections refused since the worker began."),
        ("stalled", "gauge", "Sessions that wait for memory or disk."),
    ):
        end = "_total" if kind == "counter" else ""
        values = [({"worker": stats["worker"]}, float(stats[name])) for stats in answered]
        yield f"narrows_sessions_{name}{end}", kind, text, values
    failing = [({"worker": s["worker"]}, float(bool(s["failed"]))) for s in answered]
    yield "narrows_evidence_failing", "gauge", "1: evidence cannot be written.", failing
    pending = [
        ({"worker": s["worker"]}, float(s["position"] - s["durable"])) for s in answered
    ]  # fmt: skip
    yield "narrows_evidence_pending_bytes", "gauge", "Evidence that is not durable yet.", pending


def _losses(opened: Opened) -> Iterator[Sample]:
    for name, record, field, text in (
        ("gaps", records.Gap, "reason", "Gap records: what was not, or may not be, recorded."),
        ("alarms", records.Alarm, "kind", "Alarm records."),
        ("refusals", records.Refused, "reason", "Connections that were not let through."),
    ):  # fmt: skip
        rows = opened.index.db.execute(
            "SELECT json_extract(fields, ?), count(*) FROM event WHERE kind = ? GROUP BY 1",
            (f"$.{field}", records.KINDS[record]),
        )
        values = [({field: reason}, float(count)) for reason, count in rows]
        yield f"narrows_{name}_total", "counter", text, values
    drops, lost = 0, 0
    beats = opened.index.db.execute(
        "SELECT fields FROM event WHERE kind = ? ORDER BY time DESC LIMIT 64",
        (records.KINDS[records.Heartbeat],),
    )
    newest: dict[int, dict[str, Any]] = {}
    for (fields,) in beats:
        told = json.loads(fields)
        newest.setdefault(told["worker"], told)
    for told in newest.values():
        drops = max(drops, told["listen_drops"])
        lost = max(lost, told["sensor_lost"])
    text = "Connections that the kernel dropped before a worker took them."
    yield "narrows_listen_drops_total", "counter", text, [({}, drops)]
    text = "Events that the sensor reported lost."
    yield "narrows_sensor_lost_total", "counter", text, [({}, lost)]


def _machine(review: Review) -> Iterator[Sample]:
    reading, recorder = review.reading, review.recorder
    disk = os.statvfs(reading.store.state)
    age, backlog = _checkpoint_age(review), _backlog(review)
    for name, kind, text, value in (
        ("narrows_disk_free_bytes", "gauge", "Free on the disk of the evidence.",
         disk.f_bavail * disk.f_frsize),
        ("narrows_segments", "gauge", "Segments of evidence.", len(reading.store.generations())),
        ("narrows_seal_backlog_segments", "gauge", "Finished segments that are not rewritten yet.",
         backlog["segments"]),
        ("narrows_seal_backlog_bytes", "gauge", "Their bytes.", backlog["bytes"]),
        ("narrows_checkpoint_age_seconds", "gauge", "Age of the newest signed checkpoint.", age),
        ("narrows_index_stale", "gauge", "1: the index is behind.", float(bool(reading.stale))),
        ("narrows_evidence_unreadable_total", "counter", "What the API could not read.",
         reading.damaged),
        ("narrows_api_reads_total", "counter", "Reads that were recorded.", recorder.recorded),
        ("narrows_api_reads_refused_total", "counter", "Reads that could not be recorded.",
         recorder.refused),
        ("narrows_api_unauthenticated_total", "counter", "Requests without a good token.",
         review.failures.total),
        ("narrows_api_connections", "gauge", "Connections to the API.", review.connections.count),
        ("narrows_api_connections_refused_total", "counter", "Connections that were one too many.",
         review.connections.turned_away),
        ("narrows_api_listeners", "gauge", "Listeners of server-sent events.",
         review.feed.listeners),
    ):  # fmt: skip
        yield name, kind, text, [({}, float(value))]
    answered = [({"status": status}, float(n)) for status, n in sorted(review.answered.items())]
    yield "narrows_api_requests_total", "counter", "Requests by status.", answered


def _backlog(review: Review) -> dict[str, int]:
    """Return what the seal told last of its backlog; zeros before it told anything."""
    try:
        told = json.loads((review.reading.store.evidence / "seal.backlog").read_bytes())
        return {"segments": told["segments"], "bytes": told["bytes"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {"segments": 0, "bytes": 0}


def _checkpoint_age(review: Review) -> float:
    """Return the seconds since the newest checkpoint was signed, -1 without one."""
    try:
        return max(time.time() - (review.reading.store.ledger / "checkpoint").stat().st_mtime, 0)
    except OSError:
        return -1.0


def _lines(samples: Iterable[Sample]) -> Iterator[str]:
    for name, kind, text, values in samples:
        yield f"# HELP {name} {text}\n# TYPE {name} {kind}\n"
        for labels, value in values:
            inner = ",".join(f'{label}="{_escaped(word)}"' for label, word in labels.items())
            yield f"{name}{'{' + inner + '}' if inner else ''} {value:.10g}\n"


def _escaped(word: Any) -> str:
    return str(word).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


ROUTES = (
    Route("GET", "/health", None, None, get_health),
    Route("GET", "/metrics", Right.METADATA, None, get_metrics, media=TEXT),
)
