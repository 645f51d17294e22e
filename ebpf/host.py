"""Who this host is, and which start of the sensor this is: what every handle begins with.

The host id is the same for all starts on one host: derived from the machine id, which hosts made
from one image must not share. The epoch counts starts within one boot, in a file on the boot's
tmpfs, from a random number on; so no handle is given twice within 4,096 starts.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MACHINE_ID: Final = Path("/etc/machine-id")
EPOCHS: Final = 1 << 12


class AlreadyRunning(Exception):
    """Another sensor has this run directory."""


@dataclass(frozen=True, slots=True)
class Host:
    """This host and this start."""

    number: int  #: 16 bit
    name: str
    boot: str  #: random id of the boot, by the kernel
    epoch: int  #: 12 bit


class StartLock:
    """The file that counts starts, locked as long as this sensor lives."""

    def __init__(self, path: Path) -> None:
        """AlreadyRunning when another sensor has it."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as held:
            os.close(self._fd)
            raise AlreadyRunning(f"another sensor holds {path}") from held

    def next_epoch(self) -> int:
        """Count this start; return its number, 0 to 4095."""
        text = os.pread(self._fd, 16, 0).strip()
        last = int(text) if text.isdigit() else secrets.randbelow(EPOCHS)
        epoch = (last + 1) % EPOCHS
        os.pwrite(self._fd, f"{epoch:<16}".encode(), 0)
        return epoch

    def close(self) -> None:
        """Let the next one start."""
        os.close(self._fd)


def this_host(name: str, epoch: int, machine_id: Path = MACHINE_ID) -> Host:
    """Return this host; `name` stands for the host name unless it is empty."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    try:
        machine = machine_id.read_text(encoding="ascii").strip()
    except OSError:
        machine = ""
    # Without a machine id the boot's own is stable for as long as handles live.
    digest = hashlib.sha256(b"narrows host " + (machine or boot).encode()).digest()
    return Host(int.from_bytes(digest[:2], "big"), name or socket.gethostname(), boot, epoch)
