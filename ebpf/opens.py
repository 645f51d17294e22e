"""Files that were opened to be executed, as open descriptors: fanotify, FAN_OPEN_EXEC.

The kernel queues an event when exec opens a file, and gives its reader a descriptor of that very
file: it can be read after the process is gone and its path names something else. An exec opens the
program, the interpreters of a script, and the dynamic loader; which of them became the executable
is told by the kernel's record (device and inode), never guessed.

Only notifications are asked for. A permission event (the _PERM form) would make every exec on the
file system wait for us.

Where it may be wrong: file systems that are mounted in other mount namespaces only are not marked
(rootless containers), nor are network file systems, whose server might not answer; memfd files
cannot be. What was not seen here can be opened through /proc while its process runs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from ebpf import procfs, syscalls

if TYPE_CHECKING:
    from collections.abc import Callable

    from ebpf.hashing import FileKey

#: How long an open waits for its exec record. A descriptor keeps its file system busy.
KEEP_NS: Final = 100_000_000
_MOST = 4096
_EVENT = struct.Struct("=IBBHQii")
_READ_BYTES = 1 << 14
#: Nothing is executed from these, or looking at them may hang or mount something.
_LEFT_OUT: Final = frozenset({
    "autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts",
    "efivarfs", "fusectl", "hugetlbfs", "mqueue", "nsfs", "proc", "pstore", "rpc_pipefs",
    "securityfs", "selinuxfs", "sysfs", "tracefs", "nfs", "nfs4", "cifs", "smb3", "ceph", "9p",
    "afs", "fuse.sshfs",
})  # fmt: skip


class Opened(NamedTuple):
    """An open file; `fd` is the caller's."""

    fd: int
    key: FileKey


class ExecOpens:
    """The opens whose exec records have not come yet.

    `events_fd` is readable when files were opened, `mounts_fd` is in an exceptional state when
    something was mounted.
    """

    def __init__(self) -> None:
        """OSError where fanotify is not there or not allowed."""
        self.events_fd = syscalls.fanotify_init()
        self.mounts_fd = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        self.overflows = 0  #: times that the kernel's queue was full
        self._marked: set[tuple[int, int]] = set()
        self._opens: dict[int, tuple[int, list[int]]] = {}  # in the order of the first open
        self._count = 0
        self.mark_mounts()

    def mark_mounts(self) -> None:
        """Ask for the opens on every file system that is mounted by now and was not before."""
        mounts = procfs.mounts()
        present = {mount.device for mount in mounts}
        self._marked &= present
        for mount in mounts:
            if mount.device in self._marked or mount.kind in _LEFT_OUT:
                continue
            with contextlib.suppress(OSError):  # gone again, or a file system without marks
                syscalls.fanotify_mark(self.events_fd, mount.path)
                self._marked.add(mount.device)

    def drain(self) -> None:
        """Take in every open that the kernel has queued by now."""
        while True:
            try:
                data = os.read(self.events_fd, _READ_BYTES)
            except BlockingIOError:
                return
            except OSError as wrong:
                if wrong.errno not in (errno.EMFILE, errno.ENFILE):
                    continue  # this one file could not be opened: the next may
                if not self._opens:
                    return
                self._give_up_oldest()
                continue
            self._take(data)
            if len(data) + _EVENT.size <= _READ_BYTES:
                return  # there was room for more

    def take(self, pid: int, checked: Callable[[int], FileKey | None]) -> Opened | None:
        """Return the first file that a process opened to execute and that `checked` knows.

        What was opened before it is closed. What was opened after it stays: it may belong to the
        next exec of the same process.
        """
        first, waiting = self._opens.get(pid, (0, []))
        found = None
        while waiting and found is None:
            fd = waiting.pop(0)
            self._count -= 1
            key = checked(fd)
            if key is None:
                os.close(fd)
            else:
                found = Opened(fd, key)
        if first and not waiting:
            del self._opens[pid]
        return found

    def expire(self) -> int:
        """Close what waits for too long; return when to call again (monotonic ns), 0: no need."""
        limit = time.monotonic_ns() - KEEP_NS
        while self._opens:
            first = next(iter(self._opens.values()))[0]
            if first > limit and self._count <= _MOST:
                return first + KEEP_NS
            self._give_up_oldest()
        return 0

    def close(self) -> None:
        """Close everything."""
        while self._opens:
            self._give_up_oldest()
        os.close(self.events_fd)
        os.close(self.mounts_fd)

    def _give_up_oldest(self) -> None:
        _, given_up = self._opens.pop(next(iter(self._opens)))
        self._count -= len(given_up)
        for fd in given_up:
            os.close(fd)

    def _take(self, data: bytes) -> None:
        at, now = 0, time.monotonic_ns()
        while at < len(data):
            length, _, _, _, mask, fd, pid = _EVENT.unpack_from(data, at)
            at += length
            if mask & syscalls.FAN_Q_OVERFLOW:
                self.overflows += 1
            if fd >= 0:
                self._opens.setdefault(pid, (now, []))[1].append(fd)
                self._count += 1
