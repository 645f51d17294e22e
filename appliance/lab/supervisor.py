"""Starts the lab's processes and starts them again when they die; nothing else.

`python -m appliance.lab.supervisor FOLDER ...` is started by `appliance.lab.running`. On an
appliance systemd does this. It keeps no state that matters: it may be killed at any time, and so
may everything it starts. Which processes run stands in FOLDER/processes.json.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.config import load
from appliance.lab import cgroups, topology

POLL_S = 0.02
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0
ORDERLY_S = 35.0


@dataclass(slots=True)
class Task:
    """One process that is to run; `pause_s` grows while it keeps dying."""

    role: str
    argv: list[str]
    log: Path
    process: subprocess.Popen[Any] | None = None
    started: float = 0.0
    again_at: float = 0.0
    pause_s: float = FIRST_PAUSE_S


class Supervisor:
    """Keeps the tasks of one lab running."""

    def __init__(self, folder: Path, namespace: str, cgroup: Path, config: Path) -> None:
        self._folder, self._namespace, self._cgroup = folder, namespace, cgroup
        narrows = [sys.executable, "-m", "appliance"]
        where = ["--config", str(config)]
        workers = load(config).gate.workers or os.cpu_count() or 1
        self._tasks = [
            Task("sensor", [*narrows, "sensor", *where], folder / "sensor.log"),
            Task("seal", [*narrows, "serve", "seal", *where], folder / "seal.log"),
            Task("review", [*narrows, "serve", "review", *where], folder / "review.log"),
        ]
        for number in range(workers):
            argv = [*narrows, "serve", "gate", "--worker", str(number), *where]
            self._tasks.append(Task("gate", argv, folder / f"gate-{number}.log"))
        self._stopping = False

    def run(self) -> None:
        """Run until SIGTERM or SIGINT, then end everything in an orderly way."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        while not self._stopping:
            if self._look():
                self._write()
            time.sleep(POLL_S)
        for role in ("gate", "review", "seal", "sensor"):
            self._end(role)
        self._write()

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _look(self) -> bool:
        """Start what does not run and may be started now; say whether something changed."""
        changed = False
        now = time.monotonic()
        for task in self._tasks:
            if task.process is not None and task.process.poll() is not None:
                changed = True
                lived = now - task.started
                task.pause_s = (
                    FIRST_PAUSE_S if lived > 5 else min(2 * task.pause_s, LONGEST_PAUSE_S)
                )
                task.again_at = now + task.pause_s
                task.process = None
            if task.process is None and now >= task.again_at:
                changed = True
                self._start(task, now)
        return changed

    def _start(self, task: Task, now: float) -> None:
        with task.log.open("ab") as log:
            task.process = topology.start(
                self._namespace,
                task.argv,
                cgroup=cgroups.make(self._cgroup / task.role),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        task.started = now

    def _end(self, role: str) -> None:
        tasks = [task for task in self._tasks if task.role == role and task.process is not None]
        for task in tasks:
            assert task.process is not None
            task.process.terminate()
        until = time.monotonic() + ORDERLY_S
        for task in tasks:
            assert task.process is not None
            try:
                task.process.wait(max(until - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                task.process.kill()
                task.process.wait()
            task.process = None

    def _write(self) -> None:
        running = [
            {"role": task.role, "pid": task.process.pid}
            for task in self._tasks
            if task.process is not None
        ]
        running.append({"role": "supervisor", "pid": os.getpid()})
        scratch = self._folder / ".processes.json.new"
        scratch.write_text(json.dumps(running) + "\n", encoding="utf-8")
        os.replace(scratch, self._folder / "processes.json")


def main(argv: list[str]) -> int:
    """Run with FOLDER NAMESPACE CGROUP CONFIG."""
    folder, namespace, cgroup, config = argv
    Supervisor(Path(folder), namespace, Path(cgroup), Path(config)).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
