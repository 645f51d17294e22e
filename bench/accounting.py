"""CPU and memory of the programs under measurement, as the kernel accounts them.

CPU comes from cgroup v2's `cpu.stat` (`usage_usec`, which counts without any controller enabled),
so that work done for a process in the kernel on its behalf is in, and the noise of a shared machine
is not.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

WINDOW_S = 0.25
WINDOWS = 3  #: so many idle windows in a row: longer than the seal sleeps between two looks
BUSY = 0.08  #: share of a core above which a window counts as busy


def cpu_seconds(*cgroups: Path) -> float:
    """Return the CPU time that the processes of `cgroups` have used, user and system, in
    seconds.
    """
    return sum(_usage(cgroup) for cgroup in cgroups)


def _usage(cgroup: Path) -> float:
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


def until_idle(cgroups: Iterable[Path], *, longest_s: float = 60.0) -> float:
    """Wait until `cgroups` have nothing left to do; return when (monotonic) the last work ended.

    RuntimeError when they are still busy after `longest_s`.
    """
    groups = tuple(cgroups)
    start = busy = time.monotonic()
    quiet = 0
    while quiet < WINDOWS:
        before = cpu_seconds(*groups)
        time.sleep(WINDOW_S)
        now = time.monotonic()
        if cpu_seconds(*groups) - before < BUSY * WINDOW_S:
            quiet += 1
            continue
        quiet, busy = 0, now
        if now - start > longest_s:
            raise RuntimeError(f"still busy after {longest_s:g} s: {[g.name for g in groups]}")
    return busy
