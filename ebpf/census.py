"""Every process that the sensor knows, and what its handle means.

`ebpf.sensor` feeds it with the kernel's records and asks it for owners; finished owners are given
to `publish`, each at the latest `HASH_WAIT_NS` after its record: with the digest of the executable,
or at first without, when a large file is still being read.

`scan` is for the processes that are older than the sensor. It runs after the programs were
attached: whoever executes, forks or connects meanwhile is known to the kernel already, and the scan
leaves it alone.
"""

from __future__ import annotations

import collections
import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ebpf import events, procfs
from ebpf.events import Kind, Process, Record
from ebpf.executables import Executables, Found, wall_ns
from ebpf.owners import MOST_PARENTS, Owner, Owners, Parent

if TYPE_CHECKING:
    from collections.abc import Callable

    from ebpf.cgroups import Cgroups
    from ebpf.hashing import FileKey, Hasher
    from ebpf.loader import Programs
    from ebpf.opens import ExecOpens

HASH_WAIT_NS = 30_000_000
_SCANS = 4


@dataclass(slots=True)
class _Pending:
    """An owner whose executable is being read."""

    owner: Owner
    key: FileKey
    published: bool = False


class Census:
    """Turns records and /proc into owners."""

    def __init__(
        self,
        programs: Programs,
        cgroups: Cgroups,
        opens: ExecOpens | None,
        hasher: Hasher,
        host: str,
        base: int,
        within: str,
        publish: Callable[[Owner], None],
    ) -> None:
        """`base` are the bits that handles share, `within` is the path of the sensor's cgroup."""
        self._programs, self._cgroups, self._hasher = programs, cgroups, hasher
        self._host, self._base, self._publish = host, base, publish
        self._within = within.rstrip("/") + "/"
        self.files = Executables(opens, self._runs)
        self._pending: dict[int, _Pending] = {}
        self._due: collections.deque[tuple[int, int]] = collections.deque()
        self.owners = Owners()

    def take(self, record: Record) -> None:
        """Find out what a record of the kernel means."""
        before = self._known(record.parent) if record.parent else None
        if record.kind == Kind.EXEC:
            owner = self._executed(record, before)
        elif before is not None:
            owner = self._moved(before, record)
        else:
            owner = self._seen(record)
        if owner.exe_sha256:
            self._finish(owner)
        else:
            self._admit(owner, self.files.find(record))

    def owner(self, handle: int) -> Owner | None:
        """Return what is published of a handle, or can be had at once; None while it is being
        found out (then it is published soon) and when nothing is known.
        """
        found = self.owners.get(handle)
        if found is None and handle not in self._pending:
            record = self._programs.record(handle)
            if record is not None:
                self.take(record)
                found = self.owners.get(handle)
        return found

    def expected(self, handle: int) -> bool:
        """Say whether an owner is going to be published."""
        return handle in self._pending

    def connected(self, handle: int, pid: int) -> None:
        """A process connected under a handle that is not published: find it out."""
        if handle in self._pending or self.owner(handle) is not None:
            return
        facts = procfs.facts(pid)
        if facts is not None and self._runs(pid, handle):
            identifier = self._cgroups.identifier(facts.cgroup)
            self._admit(self._of_facts(handle, facts, identifier), self.files.running(pid))

    @property
    def due_ns(self) -> int:
        """Return when `expire` has something to do (monotonic); 0: never."""
        while self._due and self._is_settled(self._due[0][1]):
            self._due.popleft()
        return self._due[0][0] if self._due else 0

    def expire(self, now_ns: int) -> None:
        """Publish what waits too long for its digest."""
        while (due := self.due_ns) and due <= now_ns:
            pending = self._pending[self._due.popleft()[1]]
            pending.published = True
            self._finish(pending.owner)

    def scan(self) -> int:
        """Give a handle to every process that has none; return to how many."""
        count = 0
        seen: set[int] = set()
        for _ in range(_SCANS):
            fresh = [pid for pid in procfs.pids() if pid not in seen]
            if not fresh:
                break
            seen.update(fresh)
            count += sum(self._scanned(pid) for pid in fresh)
        return count

    # -- making owners -----------------------------------------------------------------------------

    def _executed(self, record: Record, before: Owner | None) -> Owner:
        exe = events.text(record.path)
        return Owner(
            handle=record.handle,
            host=self._host,
            pid=record.tgid,
            started_ns=wall_ns(record.ts),
            exe=exe,
            argv=tuple(record.arguments),
            argv_cut=record.cut,
            uid=record.uid,
            gid=record.gid,
            comm=events.text(record.comm),
            place=self._cgroups.place(record.cgroup),
            parents=self._parents(record, before),
            how="exec" if exe else "none",
        )

    def _seen(self, record: Record) -> Owner:
        """Return the owner of a process that nobody knew before it connected."""
        facts = procfs.facts(record.tgid)
        if facts is not None and self._runs(record.tgid, record.handle):
            return self._of_facts(record.handle, facts, record.cgroup)
        return self._executed(record, None)

    def _of_facts(self, handle: int, facts: procfs.Facts, cgroup: int) -> Owner:
        return Owner(
            handle=handle,
            host=self._host,
            pid=facts.pid,
            started_ns=facts.started_ns,
            exe=facts.exe,
            argv=tuple(facts.argv),
            argv_cut=facts.argv_cut,
            uid=facts.uid,
            gid=facts.gid,
            comm=facts.comm,
            place=self._cgroups.place(cgroup),
            parents=tuple(Parent(pid, exe) for pid, exe in procfs.ancestors(facts.pid)),
            how="proc" if facts.exe else "none",
        )

    def _moved(self, before: Owner, record: Record) -> Owner:
        """Return the owner of a process that left its cgroup or changed its user."""
        place = self._cgroups.place(record.cgroup)
        return replace(before, handle=record.handle, uid=record.uid, gid=record.gid, place=place)

    def _parents(self, record: Record, before: Owner | None) -> tuple[Parent, ...]:
        if before is not None:
            return before.lineage()
        nearest = record.ptgid or procfs.parent(record.tgid)
        if not nearest:
            return ()
        found = [(nearest, procfs.executable(nearest)), *procfs.ancestors(nearest)]
        return tuple(Parent(pid, exe) for pid, exe in found[:MOST_PARENTS])

    def _scanned(self, pid: int) -> bool:
        facts = procfs.facts(pid)
        if facts is None:
            return False
        identifier = self._cgroups.identifier(facts.cgroup)
        handle = events.fallback(self._base, pid)
        started = facts.started_ns - time.time_ns() + time.monotonic_ns()
        process = Process(handle, max(started, 0), identifier, facts.uid, facts.parent)
        if not self._programs.add_process(pid, process):
            return False
        owner = self._of_facts(handle, facts, identifier)
        if (owner.place.path + "/").startswith(self._within):
            self._admit(owner, self.files.running(pid))
        else:
            self.owners.put(owner)  # it may move in, or fork somebody who does
        return True

    # -- digests and publishing --------------------------------------------------------------------

    def _admit(self, owner: Owner, found: Found | None) -> None:
        """Publish an owner as soon as the digest of its file is there."""
        if found is None:
            self._finish(owner)
            return
        digest = self._hasher.known(found.key)
        if digest is not None:
            os.close(found.fd)
            sha = digest if self.files.unchanged(found.key, owner) else ""
            self._finish(replace(owner, exe=found.path, how=found.how, exe_sha256=sha))
            return
        owner = replace(owner, exe=found.path, how=found.how)
        self._pending[owner.handle] = _Pending(owner, found.key)
        self._due.append((time.monotonic_ns() + HASH_WAIT_NS, owner.handle))
        self._hasher.submit(
            found.fd, found.key, lambda digest: self._digested(owner.handle, digest)
        )

    def _digested(self, handle: int, digest: str) -> None:
        pending = self._pending.pop(handle)
        owner = pending.owner
        if digest and self.files.unchanged(pending.key, owner):
            owner = replace(owner, exe_sha256=digest)
        if not pending.published or owner.exe_sha256:
            self._finish(owner)

    def _finish(self, owner: Owner) -> None:
        self.owners.put(owner)
        self._publish(owner)

    def _known(self, handle: int) -> Owner | None:
        found = self.owner(handle)
        if found is None and handle in self._pending:
            found = self._pending[handle].owner
        return found

    def _is_settled(self, handle: int) -> bool:
        pending = self._pending.get(handle)
        return pending is None or pending.published

    def _runs(self, pid: int, handle: int) -> bool:
        process = self._programs.process(pid)
        return process is not None and process.handle == handle
