"""Owner records: what a handle means, as the gate gets it.

`ebpf.sensor` makes one for every exec below its cgroups, for every process that was older than it,
and for every process that connected from another cgroup, or as another user, than its exec said.
`Owners` keeps the latest used ones; what it forgot is made again from the kernel's records or from
/proc when it is needed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ebpf.cgroups import Place

MOST_PARENTS = 8

_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


@dataclass(frozen=True, slots=True)
class Parent:
    """Who started a process: the program that forked it, and whoever forked that."""

    pid: int
    exe: str


@dataclass(frozen=True, slots=True)
class Owner:
    """What a handle means. Empty fields are not known; nothing here is a guess."""

    handle: int
    host: str
    pid: int  #: of the process that executed; a child that forked since shares the handle
    started_ns: int  #: UTC; of the exec, or of the process when it is older than the sensor
    exe: str  #: resolved path, as the process sees it
    argv: tuple[str, ...]
    argv_cut: bool  #: there are more arguments than were kept
    uid: int  #: real user id at the exec, or at the first connect as another user
    gid: int
    comm: str
    place: Place
    parents: tuple[Parent, ...]  #: nearest first, 8 at most
    #: where exe comes from: "fanotify" (the file that was opened to be executed), "proc" (of the
    #: running process), "path" (the path leads to that very file), "exec" (the text that execve was
    #: given, not resolved), "none"
    how: str
    exe_sha256: str = ""

    def encoded(self) -> bytes:
        """Return the JSON of an OWNER message."""
        place = self.place
        fields = {
            "handle": f"{self.handle:016x}",
            "host": self.host,
            "pid": self.pid,
            "started_ns": self.started_ns,
            "exe": self.exe,
            "exe_sha256": self.exe_sha256,
            "how": self.how,
            "argv": self.argv,
            "argv_cut": self.argv_cut,
            "uid": self.uid,
            "gid": self.gid,
            "comm": self.comm,
            "cgroup": place.path,
            "cgroup_id": place.identifier,
            "unit": place.name.unit,
            "container": place.name.container,
            "runtime": place.name.runtime,
            "pod": place.name.pod,
            "parents": [{"pid": parent.pid, "exe": parent.exe} for parent in self.parents],
        }
        return _encode(fields).encode()

    def lineage(self) -> tuple[Parent, ...]:
        """Return the parents of a process that this one forks."""
        return (Parent(self.pid, self.exe), *self.parents)[:MOST_PARENTS]


class Owners:
    """Owners by handle: the latest used ones, at most `most`."""

    def __init__(self, most: int = 16_384) -> None:
        self._most = most
        self._owners: dict[int, Owner] = {}

    def get(self, handle: int) -> Owner | None:
        """Return an owner, which then counts as used."""
        owner = self._owners.pop(handle, None)
        if owner is not None:
            self._owners[handle] = owner
        return owner

    def put(self, owner: Owner) -> None:
        """Keep an owner; a later one of the same handle replaces it."""
        self._owners.pop(owner.handle, None)
        if len(self._owners) >= self._most:
            del self._owners[next(iter(self._owners))]
        self._owners[owner.handle] = owner

    def __contains__(self, handle: int) -> bool:
        return handle in self._owners

    def __len__(self) -> int:
        return len(self._owners)
