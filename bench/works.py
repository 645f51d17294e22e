"""Bulk, connections and round trips of bytes that no protocol layer knows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from appliance.lab.topology import SERVER4
from bench.runs import DIRECT, Load, Work, interleaved
from bench.stage import LOAD_PORT

if TYPE_CHECKING:
    from bench.report import Report
    from bench.stage import Stage

BULK_BYTES = 300_000_000
CONNECT_S = 1.5
PINGPONG_S = 1.5
CONNECTIONS = 16


def bulk(stage: Stage, report: Report, rounds: int) -> None:
    """One connection, one way: CPU-seconds of the proxy per GB, download and upload."""
    for way in ("down", "up"):

        def run(path: str, way: str = way) -> Load:
            argv = [str(stage.load), way, SERVER4, str(LOAD_PORT), "1", str(BULK_BYTES)]
            answer = json.loads(stage.client(argv))
            if path == "gate":
                stage.sent.bulk(way, BULK_BYTES)
            return Load(BULK_BYTES / 1e9, answer["seconds"])

        paths = ("haproxy", "gate", "haproxy-256k", DIRECT)
        work = Work(f"bulk {way}", "GB", "GB", ("s", 1.0), paths, run)
        interleaved(stage, report, work, rounds)
        report.capacity(work.name, work.cost, "haproxy", 1.0)
        report.capacity(work.name, work.cost, "haproxy-256k", 0.8)


def connect(stage: Stage, report: Report, rounds: int) -> None:
    """Connect, 100 bytes there and back, close; 16 at a time."""
    work = _trips(stage, "connect", "connection", "connections", CONNECT_S)
    interleaved(stage, report, work, rounds)
    report.capacity(work.name, work.cost, "haproxy", 0.7)


def pingpong(stage: Stage, report: Report, rounds: int) -> None:
    """100 bytes there and back on 16 connections that stay; no goal, the base of every protocol."""
    work = _trips(stage, "pingpong", "round trip", "round trips", PINGPONG_S)
    interleaved(stage, report, work, rounds)


def _trips(stage: Stage, mode: str, unit: str, plural: str, seconds: float) -> Work:
    def run(path: str) -> Load:
        argv = [str(stage.load), mode, SERVER4, str(LOAD_PORT), str(CONNECTIONS), str(seconds)]
        answer = json.loads(stage.client(argv))
        if path == "gate":
            stage.sent.trips += answer["trips"]
        extra = {"us p50": answer["p50_us"], "us p99": answer["p99_us"]}
        return Load(answer["trips"], answer["seconds"], extra)

    return Work(mode, unit, plural, ("us", 1e6), ("haproxy", "gate", DIRECT), run)
