"""What is measured: bulk, pg, connect, idle; each path in turn, round after round."""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING

from appliance.lab.topology import GATE_CLIENT4, SERVER4
from bench.accounting import anonymous_kib, cpu_seconds, wait_idle
from bench.stage import LOAD_PORT

if TYPE_CHECKING:
    from bench.report import Report
    from bench.stage import Stage

BULK_BYTES = 200_000_000
CONNECT_S = 3
PG_S = 4
IDLE_SESSIONS = 3000


def _whole(stage: Stage) -> float:
    """Return the CPU of everything behind the gate worker, after it has nothing left to do."""
    wait_idle(stage.group("seal"))
    return cpu_seconds(stage.group("seal"))


def bulk(stage: Stage, report: Report, rounds: int) -> None:
    """One connection, one way: CPU-seconds of the proxy per GB, download and upload."""
    for way in ("down", "up"):
        work = f"bulk {way}"
        for _ in range(rounds):
            for path in ("haproxy", "gate", "haproxy-256k"):
                stage.use(path)
                sealed = _whole(stage) if path == "gate" else 0.0
                before = cpu_seconds(stage.group(path))
                argv = [str(stage.load), way, SERVER4, str(LOAD_PORT), "1", str(BULK_BYTES)]
                answer = json.loads(stage.client(argv))
                spent = cpu_seconds(stage.group(path)) - before
                report.add(work, path, "CPU-s/GB", spent / (BULK_BYTES / 1e9))
                report.add(work, path, "GB/s", BULK_BYTES / 1e9 / answer["seconds"])
                if path == "gate":
                    spent += _whole(stage) - sealed
                    report.add(work, "whole appliance", "CPU-s/GB", spent / (BULK_BYTES / 1e9))
        report.compare(work, "CPU-s/GB", "haproxy", 1.0)
        report.compare(work, "CPU-s/GB", "haproxy-256k", 0.8)


def connect(stage: Stage, report: Report, rounds: int) -> None:
    """Connect, 100 bytes there and back, close; 16 at a time: CPU microseconds of the proxy per
    connection.
    """
    for _ in range(rounds):
        for path in ("haproxy", "gate"):
            stage.use(path)
            sealed = _whole(stage) if path == "gate" else 0.0
            before = cpu_seconds(stage.group(path))
            argv = [str(stage.load), "connect", SERVER4, str(LOAD_PORT), "16", str(CONNECT_S)]
            answer = json.loads(stage.client(argv))
            spent = cpu_seconds(stage.group(path)) - before
            count = answer["connections"]
            report.add("connect", path, "CPU-us/connection", spent / count * 1e6)
            report.add("connect", path, "connections/s", count / answer["seconds"])
            if path == "gate":
                spent += _whole(stage) - sealed
                report.add("connect", "whole appliance", "CPU-us/connection", spent / count * 1e6)
    report.compare("connect", "CPU-us/connection", "haproxy", 0.7)


def idle(stage: Stage, report: Report, rounds: int) -> None:
    """Open sessions, one round trip each, then nothing: private memory per session."""
    for _ in range(rounds):
        for path in ("haproxy", "gate"):
            stage.use(path)
            before = anonymous_kib(stage.group(path))
            argv = [str(stage.load), "idle", SERVER4, str(LOAD_PORT), str(IDLE_SESSIONS)]
            client = stage.open_client(argv)
            try:
                assert client.stdout is not None
                opened = json.loads(client.stdout.readline())["open"]
                time.sleep(1.0)
                used = anonymous_kib(stage.group(path)) - before
                report.add("idle", path, "KiB/session", used / opened)
            finally:
                client.communicate(timeout=30)
            time.sleep(1.0)
    report.compare("idle", "KiB/session", "haproxy", 3.5 / 4.0)


def pg(stage: Stage, report: Report, rounds: int) -> None:
    """Run pgbench -S: CPU microseconds of the proxy per query, 16 clients; and latency with one."""
    stage.start_postgresql()
    paths = {"gate": SERVER4, "pgbouncer": GATE_CLIENT4, "direct": SERVER4}
    for mode, clients in (("simple", 16), ("prepared", 16), ("simple", 1)):
        work = f"pg {mode} c{clients}"
        for _ in range(rounds):
            for path, host in paths.items():
                stage.use("gate" if path == "gate" else "direct")
                sealed = _whole(stage) if path == "gate" else 0.0
                before = cpu_seconds(stage.group(path))
                port = "6432" if path == "pgbouncer" else "5432"
                argv = ["pgbench", "-h", host, "-p", port, "-U", "postgres", "-n", "-S", "-M", mode,
                        "-c", str(clients), "-j", "1", "-T", str(PG_S), "postgres"]  # fmt: skip
                text = stage.client(argv, environment={"PGSSLMODE": "disable"})
                queries = int(re.search(r"actually processed: (\d+)", text)[1])  # type: ignore[index]
                latency = float(re.search(r"latency average = ([\d.]+)", text)[1])  # type: ignore[index]
                report.add(work, path, "queries/s", queries / PG_S)
                report.add(work, path, "latency us", latency * 1000)
                if path == "direct":
                    continue
                spent = cpu_seconds(stage.group(path)) - before
                report.add(work, path, "CPU-us/query", spent / queries * 1e6)
                if path == "gate":
                    spent += _whole(stage) - sealed
                    report.add(work, "whole appliance", "CPU-us/query", spent / queries * 1e6)
        if clients == 16:
            report.compare(work, "CPU-us/query", "pgbouncer", 0.35)


WORKS = {"bulk": bulk, "connect": connect, "idle": idle, "pg": pg}
