"""`./run bench [WORK ...] [--rounds N] [--sessions N] [--json]`; the works: docs/benchmarks.md."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path

from appliance.lab.interrupt import interruptible
from appliance.lab.running import LabError
from bench.capture_check import CaptureCheck
from bench.idle import idle
from bench.pg import pg
from bench.report import Report
from bench.search import search
from bench.stage import Stage, StageError
from bench.web import http, tls
from bench.works import bulk, connect, pingpong
from capture.crypt import Keys

WORKS = {
    "bulk": bulk, "connect": connect, "pingpong": pingpong, "idle": idle, "pg": pg, "http": http,
    "tls": tls,
}  # fmt: skip
SEARCH = "search"  #: needs no hosts and no gate
VERSIONS = {
    "haproxy": ["haproxy", "-v"],
    "pgbouncer": ["pgbouncer", "--version"],
    "postgresql": ["psql", "--version"],
    "nginx": ["nginx", "-v"],
}


def _machine() -> dict[str, object]:
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cpu": f"{os.cpu_count()} x {model}",
        "kernel": platform.release(),
        "python": f"{platform.python_version()}, {ssl.OPENSSL_VERSION}",
        **{name: _version(argv) for name, argv in VERSIONS.items()},
        "load before": f"{os.getloadavg()[0]:.2f}",
    }


def _version(argv: list[str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    found = re.search(r"\d+\.\d+[\w.]*", done.stdout + done.stderr)
    return found[0] if found else "unknown"


def _warn_of_memory() -> None:
    """Say when TCP's memory is short on this machine: then the kernel, not a proxy, is measured."""
    pages = re.search(r"^TCP:.* mem (\d+)", Path("/proc/net/sockstat").read_text(), re.MULTILINE)
    low = int(Path("/proc/sys/net/ipv4/tcp_mem").read_text().split()[0])
    if pages is not None and int(pages[1]) > low:
        print("bench: other programs use up TCP's memory; wait for them to end", file=sys.stderr)


def _words() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./run bench", description=__doc__)
    parser.add_argument("work", nargs="*", choices=[[], *WORKS, SEARCH], default=[])
    parser.add_argument(
        "--rounds", type=int, default=5, help="counted rounds of every path (default 5)"
    )
    parser.add_argument(
        "--sessions", type=int, default=1_000_000, help="for search (default a million)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    words = parser.parse_args()
    if words.rounds < 1:
        parser.error("--rounds is 1 or more")
    if words.sessions < 1:
        parser.error("--sessions is 1 or more")
    return words


def _run(words: argparse.Namespace, report: Report) -> bool:
    chosen = words.work or [*WORKS, SEARCH]
    correct = True
    if any(name in WORKS for name in chosen):
        correct = _staged([name for name in chosen if name in WORKS], words.rounds, report)
    if SEARCH in chosen:
        print("bench: search", file=sys.stderr, flush=True)
        search(report, words.rounds, words.sessions)
    return correct


def _staged(works: list[str], rounds: int, report: Report) -> bool:
    """Run the works that need hosts; say whether what was captured is what was sent."""
    check = CaptureCheck()
    with Stage() as stage:
        for name in works:
            print(f"bench: {name}", file=sys.stderr, flush=True)
            WORKS[name](stage, report, rounds)
        print("bench: comparing the capture with what was sent", file=sys.stderr, flush=True)
        stage.lab.stop()  # in an orderly way: everything is committed after it
        check.read(stage.store, Keys.load(stage.store.state))
        check.finish(stage.sent)
    report.checks += check.lines()
    return not check.problems


def main() -> int:
    """Run the works and print the report; 1 when a capture differs from what was sent."""
    words = _words()
    interruptible(signal.SIGTERM, signal.SIGHUP)
    _warn_of_memory()
    started = time.monotonic()
    report = Report(_machine())
    try:
        correct = _run(words, report)
    except (StageError, LabError) as wrong:
        print(f"bench: {wrong}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130
    report.machine["load after"] = f"{os.getloadavg()[0]:.2f}"
    report.machine["took"] = f"{time.monotonic() - started:.0f} s, {words.rounds} rounds"
    print(json.dumps(report.as_json()) if words.json else report.text())
    return 0 if correct else 1


if __name__ == "__main__":
    sys.exit(main())
