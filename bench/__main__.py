"""`./run bench [bulk|pg|connect|idle ...] [--rounds N] [--json]`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

from bench.capture_check import check_capture
from bench.report import Report
from bench.stage import Stage
from bench.works import WORKS


def _machine() -> dict[str, object]:
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def main() -> int:
    """Run the works and print the report; 1 when a capture differs from what was sent."""
    parser = argparse.ArgumentParser(prog="./run bench", description=__doc__)
    parser.add_argument("work", nargs="*", choices=[[], *WORKS], default=[])
    parser.add_argument(
        "--rounds", type=int, default=5, help="counted rounds of every path (default 5)"
    )
    parser.add_argument("--json", action="store_true")
    words = parser.parse_args()
    report = Report(_machine())
    with Stage() as stage:
        for name in words.work or list(WORKS):
            print(f"bench: {name}", file=sys.stderr, flush=True)
            WORKS[name](stage, report, words.rounds)
        correct = check_capture(stage, report)
    if words.json:
        print(json.dumps(report.as_json()))
    else:
        print(f"{report.machine}\n\n{report.text()}")
    return 0 if correct else 1


if __name__ == "__main__":
    sys.exit(main())
