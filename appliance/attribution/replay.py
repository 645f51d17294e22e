"""The replay cache: which SYNs carried an identity here before, in memory that the workers share.

Every gate worker maps the same tmpfs file (`run/replay`), so that a SYN seen by one is known to
all, and to the next life of a worker. A SYN is kept as its full 64-bit MAC, which nobody without
the key can choose.

The file is a 128-byte header and then buckets of 128 bytes: a cursor and 15 MACs, oldest
overwritten first. A MAC's low bits name its bucket. The cache is bounded and forgets: with N
entries, a SYN is still known after N/2 later ones with better than 98 percent, after N/4 with
99.999 percent. What it forgets can be replayed only by somebody who saw the SYN, and who can also
complete the handshake with the client's address and the same sequence number.

Two connections with one MAC have one 4-tuple, so the kernel hands both to the same worker unless
the number of workers changed between them. Only then two workers can ask for the same MAC at once;
a byte-range lock on the bucket decides who was first. The lock dies with its holder, and a holder
that is merely stopped is waited for 0.1 s.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import struct
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

MAGIC = b"NARREPL1"
_HEADER = struct.Struct("<8sQ")
_START = 128
_BUCKET = 128
_WORDS = _BUCKET // 8
WAYS = _WORDS - 1
_LONGEST_WAIT_S = 0.1


class ReplayCache:
    """A bounded set of MACs, shared by every process that opens the same path."""

    def __init__(self, path: Path, entries: int) -> None:
        """Open or make the file; one of another size is replaced, which forgets what it held."""
        buckets = 1 << max(0, (max(entries, 1) - 1) // WAYS).bit_length()
        self.entries = buckets * WAYS
        self._mask = buckets - 1
        size = _START + buckets * _BUCKET
        self._fd = _opened(path, size, buckets)
        self._memory = mmap.mmap(self._fd, size)
        self._view = memoryview(self._memory)
        self._words = self._view.cast("Q")

    def close(self) -> None:
        """Unmap; the file stays for the others."""
        self._words.release()
        self._view.release()
        self._memory.close()
        os.close(self._fd)

    def seen(self, mac: int) -> bool:
        """Say whether `mac` was asked for before, and remember it."""
        mac = mac or 1  # zero marks a slot that was never used
        at = _START + (mac & self._mask) * _BUCKET
        locked = self._lock(at)
        try:
            words = self._words
            first = at >> 3
            if mac in words[first + 1 : first + _WORDS].tolist():
                return True
            turn = words[first]
            # The cursor first: dying between the two stores forgets nobody but the newest.
            words[first] = (turn + 1) % WAYS
            words[first + 1 + turn % WAYS] = mac
            return False
        finally:
            if locked:
                fcntl.lockf(self._fd, fcntl.LOCK_UN, _BUCKET, at)

    def _lock(self, at: int) -> bool:
        until = 0.0
        while True:
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, _BUCKET, at)
            except OSError as held:
                if held.errno not in {errno.EAGAIN, errno.EACCES}:
                    return False
                now = time.monotonic()
                until = until or now + _LONGEST_WAIT_S
                if now > until:
                    return False
                time.sleep(0)
            else:
                return True


def _opened(path: Path, size: int, buckets: int) -> int:
    """Return a descriptor of the cache file, made complete before it gets its name."""
    header = _HEADER.pack(MAGIC, buckets)
    guard = os.open(
        path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
    )
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            if os.fstat(fd).st_size == size and os.pread(fd, len(header), 0) == header:
                return fd
            os.close(fd)
        # Never truncate in place: a worker that has the old file mapped would die of SIGBUS.
        scratch = path.with_name(path.name + ".new")
        scratch.unlink(missing_ok=True)
        fd = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, size)
            os.pwrite(fd, header, 0)
            scratch.rename(path)
        except BaseException:
            os.close(fd)
            raise
        return fd
    finally:
        os.close(guard)
