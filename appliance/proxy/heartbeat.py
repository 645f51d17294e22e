"""What the kernel counted in this network namespace: the other half of a heartbeat.

A worker says in its Heartbeat records what it accepted; the kernel says what there was. Their
difference is the only trace of a session that was never recorded.
"""

from __future__ import annotations

import os


def kernel_counts() -> tuple[int, int]:
    """Return (passive opens, dropped or overflowed SYNs) of this network namespace, by the kernel's
    own count.
    """
    found: dict[str, int] = {}
    for path in (f"/proc/{os.getpid()}/net/snmp", f"/proc/{os.getpid()}/net/netstat"):
        with open(path, encoding="ascii") as file:
            lines = file.read().splitlines()
        for names, values in zip(lines[::2], lines[1::2], strict=True):
            keys, numbers = names.split(), values.split()
            for key, number in zip(keys[1:], numbers[1:], strict=True):
                found[keys[0] + key] = int(number)
    drops = found.get("TcpExt:ListenDrops", 0) + found.get("TcpExt:ListenOverflows", 0)
    return found.get("Tcp:PassiveOpens", 0), drops
