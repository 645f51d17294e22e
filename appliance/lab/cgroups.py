"""cgroup v2 for the lab: found in mountinfo, made, joined, emptied and removed.

Sensors of the lab and of tests attach to a subtree of their own, never to the root.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path


def root() -> Path:
    """Return where cgroup v2 is mounted; FileNotFoundError when it is not."""
    for line in Path("/proc/self/mountinfo").read_text(encoding="ascii").splitlines():
        fields = line.split(" ")
        if fields[fields.index("-") + 1] == "cgroup2":
            return Path(fields[4])
    raise FileNotFoundError(
        "cgroup v2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup/unified"
    )


def make(path: Path) -> Path:
    """Make a cgroup and its parents."""
    path.mkdir(parents=True, exist_ok=True)
    return path


def pids(path: Path) -> list[int]:
    """Return the processes in `path` and below it."""
    found: list[int] = []
    for folder, _, _ in os.walk(path):
        with contextlib.suppress(OSError):
            found += map(int, Path(folder, "cgroup.procs").read_text(encoding="ascii").split())
    return found


def remove(path: Path, *, longest_s: float = 10.0) -> None:
    """End every process below `path` (by cgroup, with SIGKILL) and remove the subtree."""
    if not path.exists():
        return
    until = time.monotonic() + longest_s
    while (left := pids(path)) and time.monotonic() < until:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    for folder, _, _ in os.walk(path, topdown=False):
        while time.monotonic() < until:
            try:
                os.rmdir(folder)
                break
            except FileNotFoundError:
                break
            except OSError:
                time.sleep(0.02)
