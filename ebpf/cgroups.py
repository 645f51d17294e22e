"""From a cgroup's id, which is what the kernel's records carry, to its path and what that says.

The id of a cgroup is the inode number of its directory, and is not given twice in one boot. A path
is asked for once and kept. A cgroup that was removed before anyone asked has no path any more.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

from ebpf import procfs, syscalls
from ebpf.cgroup_names import CgroupName, classify

_MOST = 8192


class Place(NamedTuple):
    """One cgroup."""

    identifier: int
    path: str  #: from the root of the hierarchy: "/a/b"; "" when it is gone
    name: CgroupName  #: what the path says


class Cgroups:
    """The cgroups below one mount of the hierarchy."""

    def __init__(self, mount: Path) -> None:
        """OSError when `mount` cannot be opened."""
        self._mount = os.open(mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._root = str(mount.resolve()).rstrip("/")
        self._places: dict[int, Place] = {}

    def place(self, identifier: int) -> Place:
        """Return a cgroup; its path is empty when there is none with this id any more."""
        found = self._places.get(identifier)
        if found is None:
            path = self._look_up(identifier)
            found = Place(identifier, path, classify(path))
            if path:
                if len(self._places) >= _MOST:
                    del self._places[next(iter(self._places))]
                self._places[identifier] = found
        return found

    def identifier(self, path: str) -> int:
        """Return the id of the cgroup at `path`; 0 when there is none."""
        with contextlib.suppress(OSError):
            return Path(self._root, path.lstrip("/")).stat().st_ino
        return 0

    def close(self) -> None:
        """Close the mount."""
        os.close(self._mount)

    def _look_up(self, identifier: int) -> str:
        try:
            fd = syscalls.open_cgroup(self._mount, identifier)
        except OSError:
            return ""
        try:
            path = procfs.link(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)
        if not path.startswith(self._root) or path.endswith(" (deleted)"):
            return ""
        return path[len(self._root) :] or "/"
