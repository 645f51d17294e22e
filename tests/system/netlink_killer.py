"""Kills a program before its Nth change of the kernel's networking: the library beside this."""

import os
import subprocess
from pathlib import Path


class NetlinkKiller:
    """The compiled library, and the file in which it notes the changes that it let through."""

    def __init__(self, folder):
        self._library = folder / "netlink_killer.so"
        self._counted = folder / "changes"
        source = Path(__file__).with_suffix(".c")
        flags = ["-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror"]
        subprocess.run(["gcc", *flags, "-o", self._library, source], check=True)

    def environment(self, before):
        """Return the environment of a program that dies before its change number `before`."""
        self._counted.write_text("")
        return os.environ | {
            "LD_PRELOAD": str(self._library),
            "KILL_BEFORE": str(before),
            "KILL_COUNT": str(self._counted),
        }

    def changes(self):
        """Return how many changes the program made."""
        return len(self._counted.read_text().splitlines())
