"""Memory of sessions that do nothing: private memory of the proxy per open session.

Each sample is of a program that was just started: memory that an earlier round gave back to the
program, but not to the kernel, would hide what a session takes.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from appliance.lab.topology import SERVER4
from bench.accounting import anonymous_kib
from bench.stage import LOAD_PORT, PG_PORT

if TYPE_CHECKING:
    from bench.report import Report
    from bench.stage import Stage

SESSIONS = {"idle": 3000, "pgidle": 1000}
WARM_UP = 32
SETTLE_S = 0.5
UNIT = "KiB/session"


def idle(stage: Stage, report: Report, rounds: int) -> None:
    """Opaque sessions after one round trip, and PostgreSQL sessions after login and one query."""
    stage.start_postgresql()
    for _ in range(rounds):
        for path in ("haproxy", "gate"):
            report.add("idle opaque", path, UNIT, _memory(stage, path, "idle"))
        report.add("idle postgresql", "gate", UNIT, _memory(stage, "gate", "pgidle"))
    report.limit("idle opaque", UNIT, 4.0)
    report.limit("idle postgresql", UNIT, 4.0)


def _memory(stage: Stage, path: str, mode: str) -> float:
    stage.use(path)
    stage.restart(path)
    _held(stage, path, mode, WARM_UP, 0)
    before = anonymous_kib(stage.group(path))
    return _held(stage, path, mode, SESSIONS[mode], before) / SESSIONS[mode]


def _held(stage: Stage, path: str, mode: str, count: int, before: int) -> int:
    """Return by how many KiB a path's memory is above `before` while `count` sessions are open."""
    port = PG_PORT if mode == "pgidle" else LOAD_PORT
    client = stage.open_client([str(stage.load), mode, SERVER4, str(port), str(count)])
    try:
        assert client.stdout is not None
        assert json.loads(client.stdout.readline()) == {"open": count}
        if path == "gate" and mode == "idle":
            stage.sent.trips += count
        time.sleep(SETTLE_S)
        return anonymous_kib(stage.group(path)) - before
    finally:
        client.communicate(timeout=30)
        time.sleep(SETTLE_S)
