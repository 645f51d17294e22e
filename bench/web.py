"""HTTP and TLS, opened, decoded and recorded: against haproxy, and nginx direct."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.lab.topology import SERVER4
from bench.runs import DIRECT, Load, Work, interleaved
from bench.stage import BIG_BYTES, HTTP_PORT, HTTPS_PORT

if TYPE_CHECKING:
    from bench.report import Report
    from bench.stage import Stage

RUN_S = 2.0
CONNECTIONS = 16
BIG_TIMES = 3
CLIENT = Path(__file__).parent / "webload.py"


def http(stage: Stage, report: Report, rounds: int) -> None:
    """Requests on connections that stay; 100 bytes of body: CPU of the proxy per request."""
    stage.start_web()
    _pages(stage, report, rounds, "http", "haproxy-http")


def tls(stage: Stage, report: Report, rounds: int) -> None:
    """The same over TLS that the proxy opens, and one large download."""
    stage.start_web()
    _pages(stage, report, rounds, "tls", "haproxy-tls")

    def run(path: str) -> Load:
        answer = _client(stage, path, "tls", "big", 1, BIG_TIMES)
        return Load(BIG_TIMES * BIG_BYTES / 1e9, answer["seconds"])

    paths = ("haproxy-tls", "gate", DIRECT)
    work = Work("tls bulk down", "GB", "GB", ("s", 1.0), paths, run)
    interleaved(stage, report, work, rounds)
    report.capacity(work.name, work.cost, "haproxy-tls", 0.5)


def _pages(stage: Stage, report: Report, rounds: int, kind: str, peer: str) -> None:
    def run(path: str) -> Load:
        answer = _client(stage, path, kind, "page", CONNECTIONS, RUN_S)
        return Load(answer["done"], answer["seconds"])

    paths = (peer, "gate", DIRECT)
    work = Work(f"{kind} requests", "request", "requests", ("us", 1e6), paths, run)
    interleaved(stage, report, work, rounds)
    report.capacity(work.name, work.cost, peer, 0.5)


def _client(
    stage: Stage, path: str, kind: str, mode: str, connections: int, amount: float
) -> dict[str, float]:
    """Run the client once; note what it was answered through the gate."""
    port, ca = (HTTPS_PORT, str(stage.trusted)) if kind == "tls" else (HTTP_PORT, "-")
    argv = [sys.executable, str(CLIENT), mode, SERVER4, str(port), ca, str(connections)]
    answer: dict[str, float] = json.loads(stage.client([*argv, str(amount)]))
    if path == "gate":
        stage.sent.requests += int(answer["done"])
        stage.sent.web_bytes += int(answer["bytes"])
    return answer
