"""What /proc says of a process that still runs.

`ebpf.sensor` uses it for processes that are older than the sensor, for parents outside the sensor's
cgroups, and where the kernel's record says too little. Everything here may be gone, or may have
become another process, between two reads; `facts` notices the latter by the start time.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import NamedTuple

MOST_PARENTS = 8
_MOST_ARGUMENTS = 4096
_TICKS = os.sysconf("SC_CLK_TCK")


class Facts(NamedTuple):
    """One process at one moment."""

    pid: int
    parent: int
    started_ns: int  #: start of the process, UTC
    uid: int
    gid: int
    comm: str
    exe: str  #: resolved path; "" for kernel threads, and where it may not be read
    argv: list[str]
    argv_cut: bool  #: there is more than 4096 bytes of it
    cgroup: str  #: path in the cgroup v2 hierarchy


def pids() -> list[int]:
    """Return the processes that run now."""
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def facts(pid: int) -> Facts | None:
    """Return what is known of a process; None when it is gone, or was replaced while we looked."""
    try:
        stat = _stat(pid)
        status = _read(pid, "status").decode("utf-8", "backslashreplace")
        words = _read(pid, "cmdline", _MOST_ARGUMENTS + 1)
        cgroup = _read(pid, "cgroup").decode("utf-8", "surrogateescape")
        exe = executable(pid)
        if _stat(pid)[2] != stat[2]:
            return None
    except (OSError, ValueError, IndexError):
        return None
    comm, parent, ticks = stat
    return Facts(
        pid=pid,
        parent=parent,
        started_ns=_utc(ticks),
        uid=_identity(status, "Uid"),
        gid=_identity(status, "Gid"),
        comm=comm,
        exe=exe,
        argv=_words(words[:_MOST_ARGUMENTS]),
        argv_cut=len(words) > _MOST_ARGUMENTS,
        cgroup=next((line[3:] for line in cgroup.splitlines() if line.startswith("0::")), ""),
    )


def executable(pid: int) -> str:
    """Return the path of what a process runs, as it is seen from its own root; "" without one."""
    try:
        return link(f"/proc/{pid}/exe")
    except OSError:
        return ""


def link(path: str) -> str:
    """Return where a link of /proc leads, as text; OSError when it is gone."""
    target = os.readlink(os.fsencode(path))  # noqa: PTH115 - once an exec; pathlib takes 5 times as long
    return target.decode("utf-8", "backslashreplace")


def open_executable(pid: int) -> int | None:
    """Open the very file that a process runs, also one that was removed or replaced; None when it
    is gone.
    """
    try:
        return os.open(f"/proc/{pid}/exe", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def parent(pid: int) -> int:
    """Return the parent's process id; 0 when the process is gone or has none."""
    try:
        return _stat(pid)[1]
    except (OSError, ValueError, IndexError):
        return 0


def ancestors(pid: int, most: int = MOST_PARENTS) -> list[tuple[int, str]]:
    """Return (pid, executable) of the parent, its parent and so on, as they are now."""
    found: list[tuple[int, str]] = []
    while len(found) < most:
        pid = parent(pid)
        if not pid:
            break
        found.append((pid, executable(pid)))
    return found


def cgroup_mount() -> Path:
    """Return where cgroup v2 is mounted; FileNotFoundError when it is not."""
    for mount in mounts():
        if mount.kind == "cgroup2":
            return Path(mount.path)
    raise FileNotFoundError("cgroup v2 is not mounted")


class Mount(NamedTuple):
    """One line of mountinfo."""

    number: int  #: mount id
    device: tuple[int, int]  #: of the file system
    path: str
    kind: str  #: file system type


def mounts(path: str = "/proc/self/mountinfo") -> list[Mount]:
    """Return the mounts that this process sees."""
    found = []
    for line in Path(path).read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        fields = line.split(" ")
        major, _, minor = fields[2].partition(":")
        with contextlib.suppress(ValueError, IndexError):
            kind = fields[fields.index("-") + 1]
            device = (int(major), int(minor))
            found.append(Mount(int(fields[0]), device, _unescaped(fields[4]), kind))
    return found


def _unescaped(path: str) -> str:
    """Undo the escapes of mountinfo: blank, tab, newline and backslash in octal."""
    for code, letter in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(code, letter)
    return path


def _read(pid: int, name: str, most: int = 1 << 16) -> bytes:
    fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, most)
    finally:
        os.close(fd)


def _stat(pid: int) -> tuple[str, int, int]:
    """Return (comm, parent, start in clock ticks after boot)."""
    text = _read(pid, "stat").decode("utf-8", "backslashreplace")
    comm, _, rest = text.partition("(")[2].rpartition(")")  # comm may hold anything, also ")"
    fields = rest.split()
    return comm, int(fields[1]), int(fields[19])


def _identity(status: str, name: str) -> int:
    """Return the real id: the one that the kernel's records carry."""
    return int(status.partition(f"\n{name}:")[2].split()[0])


def _words(data: bytes) -> list[str]:
    if not data:
        return []
    parts = data.removesuffix(b"\0").split(b"\0")
    return [part.decode("utf-8", "backslashreplace") for part in parts]


def _utc(ticks: int) -> int:
    """Return the UTC time of a moment that is given in clock ticks after boot."""
    boot = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    return boot + ticks * 1_000_000_000 // _TICKS
