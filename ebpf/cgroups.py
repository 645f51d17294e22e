"""From a cgroup's id, which is what the kernel's records carry, to its path.

The id of a cgroup is the inode number of its directory, and is not given twice in one boot. A path
is asked for once and kept. A cgroup that was removed before anyone asked has no path any more.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ebpf import syscalls

_MOST = 8192


class CgroupPaths:
    """Paths of cgroups below one mount of the hierarchy, from its root: "/a/b"."""

    def __init__(self, mount: Path) -> None:
        """OSError when `mount` cannot be opened."""
        self._mount = os.open(mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._root = str(mount.resolve()).rstrip("/")
        self._paths: dict[int, str] = {}

    def path(self, identifier: int) -> str:
        """Return the path of a cgroup; "" when there is none with this id any more."""
        found = self._paths.get(identifier)
        if found is None:
            found = self._look_up(identifier)
            if found:
                self.learn(identifier, found)
        return found

    def learn(self, identifier: int, path: str) -> None:
        """Keep what somebody else has found out."""
        if len(self._paths) >= _MOST:
            del self._paths[next(iter(self._paths))]
        self._paths[identifier] = path

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
            path = str(Path(f"/proc/self/fd/{fd}").readlink())
        finally:
            os.close(fd)
        if not path.startswith(self._root) or path.endswith(" (deleted)"):
            return ""
        return path[len(self._root) :] or "/"
