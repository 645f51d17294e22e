"""PostgreSQL, decoded and recorded: pgbench's reads against pgbouncer in session mode."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from appliance.lab.topology import GATE_CLIENT4, SERVER4
from bench.runs import DIRECT, Load, Work, interleaved
from bench.stage import PG_PORT, PGBOUNCER_PORT

if TYPE_CHECKING:
    from bench.report import Report
    from bench.stage import Stage

RUN_S = 2
LATENCY = "us latency"


def pg(stage: Stage, report: Report, rounds: int) -> None:
    """Run pgbench -S: CPU microseconds of the proxy per query with 16 clients; latency with one."""
    stage.start_postgresql()
    stage.start_pgbouncer()
    for mode, clients in (("simple", 16), ("prepared", 16), ("simple", 1)):
        work = _pgbench(stage, mode, clients)
        interleaved(stage, report, work, rounds)
        if clients == 1:
            report.added(work.name, LATENCY, "pgbouncer", DIRECT, 1.5)
        else:
            report.capacity(work.name, work.cost, "pgbouncer", 0.35)


def _pgbench(stage: Stage, mode: str, clients: int) -> Work:
    def run(path: str) -> Load:
        host, port = (GATE_CLIENT4, PGBOUNCER_PORT) if path == "pgbouncer" else (SERVER4, PG_PORT)
        argv = ["pgbench", "-h", host, "-p", str(port), "-U", "postgres", "-n", "-S", "-M", mode,
                "-c", str(clients), "-j", "1", "-T", str(RUN_S), "postgres"]  # fmt: skip
        text = stage.client(argv, environment={"PGSSLMODE": "disable"})
        queries = int(_number(r"actually processed: (\d+)", text))
        per_second = _number(r"tps = ([\d.]+)", text)
        if path == "gate":
            stage.sent.queries += queries
        return Load(queries, queries / per_second, {LATENCY: clients / per_second * 1e6})

    paths = ("pgbouncer", "gate", DIRECT)
    return Work(f"pg {mode} c{clients}", "query", "queries", ("us", 1e6), paths, run)


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"pgbench said something else than was expected:\n{text[-400:]}")
    return float(found[1])
