"""Which file a process runs, as an open descriptor of that very file, or nothing: never a guess.

The kernel's record names the file by device and inode. `Executables.find` looks for it, the first
of these that fits:

    fanotify   what the process opened to execute (`ebpf.opens`); also when it is gone by now
    proc       /proc/PID/exe, while the process runs
    path       the path that execve was given, or one under which the file was found before

The latter two are checked against device and inode. Behind a path another file may have got the
inode of one that was removed: then its ctime is younger than the exec, and it is not taken. The
same holds for a digest: it is of what was executed only when the file did not change after the
exec, or cannot have, because the process still runs it.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, NamedTuple

from ebpf import events, procfs
from ebpf.hashing import GRAIN_NS, FileKey

if TYPE_CHECKING:
    from collections.abc import Callable

    from ebpf.events import Record
    from ebpf.opens import ExecOpens
    from ebpf.owners import Owner

_MOST_PATHS = 8192


class Found(NamedTuple):
    """An executable; `fd` is the caller's."""

    path: str  #: resolved, as the process sees it
    how: str  #: "fanotify", "proc" or "path"
    fd: int
    key: FileKey


class Executables:
    """Finds executables; `runs` says whether a process still runs under a handle."""

    def __init__(self, opens: ExecOpens | None, runs: Callable[[int, int], bool]) -> None:
        self._opens, self._runs = opens, runs
        self._paths: dict[tuple[int, int], str] = {}
        self._devices: dict[int, tuple[int, int]] = {}  # by mount id

    def forget_mounts(self) -> None:
        """Something was mounted or unmounted: mount ids may mean others now."""
        self._devices = {}

    def find(self, record: Record) -> Found | None:
        """Return the file that a record means; None when it cannot be had any more."""
        found = self._opened(record) or self._running(record) or self._named(record)
        if found is not None and record.inode:
            if len(self._paths) >= _MOST_PATHS:
                del self._paths[next(iter(self._paths))]
            self._paths[record.device, record.inode] = found.path
        return found

    def running(self, pid: int) -> Found | None:
        """Return what a process runs now; None when it is gone, or has no executable."""
        fd = procfs.open_executable(pid)
        return None if fd is None else Found(_path(fd), "proc", fd, FileKey.of(fd))

    def unchanged(self, key: FileKey, owner: Owner) -> bool:
        """Say whether a file with this key, read after the exec, is what was executed."""
        return key.ctime_ns < owner.started_ns - GRAIN_NS or self._runs(owner.pid, owner.handle)

    def _opened(self, record: Record) -> Found | None:
        if self._opens is None:
            return None
        found = self._opens.take(record.tgid, lambda fd: self._checked(fd, record))
        return found and Found(_path(found.fd), "fanotify", found.fd, found.key)

    def _running(self, record: Record) -> Found | None:
        fd = procfs.open_executable(record.tgid)
        if fd is None:
            return None
        key = self._checked(fd, record)
        if key is not None:
            return Found(_path(fd), "proc", fd, key)
        os.close(fd)
        return None

    def _named(self, record: Record) -> Found | None:
        known = self._paths.get((record.device, record.inode), "")
        for path in dict.fromkeys([known, events.text(record.path)]):
            if not path.startswith("/"):
                continue
            with contextlib.suppress(OSError):
                place = os.open(path, os.O_PATH | os.O_CLOEXEC)  # touches nothing, whatever it is
                try:
                    if not self._is_executed(place, record):
                        continue
                    fd = os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_CLOEXEC)
                    return Found(_path(fd), "path", fd, FileKey.of(fd))
                finally:
                    os.close(place)
        return None

    def _is_executed(self, fd: int, record: Record) -> bool:
        key = self._checked(fd, record)
        return key is not None and key.ctime_ns < wall_ns(record.ts) - GRAIN_NS

    def _checked(self, fd: int, record: Record) -> FileKey | None:
        """Return the key of an open file if it is the one that a record names.

        stat tells other numbers on file systems that are made of several (btrfs subvolumes,
        overlays of several file systems; the device's major number is 0 there). Then the kernel's
        own stand in fdinfo and mountinfo.
        """
        s = os.fstat(fd)
        major = os.major(s.st_dev)
        wanted = (record.device, record.inode)
        if (_kernel_device(major, os.minor(s.st_dev)), s.st_ino) == wanted:
            return FileKey.said(s)
        if record.inode and not major and self._told_by_kernel(fd) == wanted:
            return FileKey.said(s)
        return None

    def _told_by_kernel(self, fd: int) -> tuple[int, int]:
        """Return device and inode as the kernel has them; zeros when it does not say."""
        try:
            with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
                info = dict(line.split(":\t", 1) for line in file if ":\t" in line)
            inode, number = int(info["ino"]), int(info["mnt_id"])
        except (OSError, ValueError, KeyError):
            return 0, 0
        if number not in self._devices:
            self._devices = {mount.number: mount.device for mount in procfs.mounts()}
        return _kernel_device(*self._devices.get(number, (0, 0))), inode


def wall_ns(monotonic_ns: int) -> int:
    """Return the UTC time of a moment on the kernel's monotonic clock."""
    return monotonic_ns + time.time_ns() - time.monotonic_ns()


def _kernel_device(major: int, minor: int) -> int:
    return major << 20 | minor


def _path(fd: int) -> str:
    return procfs.link(f"/proc/self/fd/{fd}")
