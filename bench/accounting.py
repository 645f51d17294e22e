"""CPU and memory of the programs under measurement, as the kernel accounts them.

CPU comes from cgroup v2's `cpu.stat` (`usage_usec`, which counts without any controller enabled),
so that work done for a process in the kernel on its behalf is in, and the noise of a shared machine
is not.
"""

from __future__ import annotations

import time
from pathlib import Path


def cpu_seconds(cgroup: Path) -> float:
    """Return the CPU time that the processes of `cgroup` have used, user and system, in seconds."""
    for line in (cgroup / "cpu.stat").read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == "usage_usec":
            return int(value) / 1e6
    raise ValueError(f"{cgroup} has no usage_usec")


def anonymous_kib(cgroup: Path) -> int:
    """Return the private memory (RssAnon) of the processes of `cgroup`, in KiB."""
    total = 0
    for pid in (cgroup / "cgroup.procs").read_text().split():
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                total += int(line.split()[1])
    return total


def wait_idle(cgroup: Path, *, longest_s: float = 120.0) -> float:
    """Wait until `cgroup` uses under 8 % of a core over one second; return the seconds waited."""
    started = time.monotonic()
    while time.monotonic() - started < longest_s:
        before = cpu_seconds(cgroup)
        time.sleep(1.0)
        if cpu_seconds(cgroup) - before < 0.08:
            break
    return time.monotonic() - started
