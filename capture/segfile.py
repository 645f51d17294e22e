"""The segment file on disk: its header and its commits.

`capture.committer` and `capture.recover` write through `SegmentFile`; `capture.tail` reads the same
layout. See docs/evidence-format.md for the byte tables. Everything is 4 KiB aligned and stored with
O_DIRECT; a commit is AES-256-GCM under the segment's own key with nonce generation | number, so
nothing is ever written twice under one nonce.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import secrets
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from capture.crypt import KEY_BYTES, WRAPPED_BYTES, commitment
from capture.errors import EvidenceError, FormatError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from capture.crypt import Keys

BLOCK = 4096
MAGIC = b"NARSEG01"
VERSION = 1
FIXED = struct.Struct("<8sIII16sQQ16s8s")
COMMIT = struct.Struct("<4sIIIIIQQ16sQ")
COMMIT_MAGIC = b"NCMT"
COMMIT_BYTES = COMMIT.size
TAG_BYTES = 16
FINAL = 1


def boot_id() -> bytes:
    """Return this boot's id, 16 bytes."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return bytes.fromhex(file.read().strip().replace("-", ""))


def nonce(generation: int, number: int) -> bytes:
    """Return the 12-byte nonce of a commit."""
    return struct.pack("<IQ", generation, number)


def commit_total(plain_bytes: int) -> int:
    """Return the bytes that a commit of `plain_bytes` takes on disk."""
    return (COMMIT_BYTES + plain_bytes + TAG_BYTES + BLOCK - 1) & -BLOCK


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """Block 0 of a segment."""

    generation: int
    incarnation: int
    stream: str
    created_ns: int
    capacity: int
    boot: bytes
    key_id: bytes

    def fixed(self) -> bytes:
        """Return the bytes before the wrapped key; they are its context."""
        return FIXED.pack(
            MAGIC, VERSION, self.generation, self.incarnation, self.stream.encode("ascii"),
            self.created_ns, self.capacity, self.boot, self.key_id,
        )  # fmt: skip

    def pack(self, data_key: bytes, keys: Keys) -> bytes:
        """Return the whole block with `data_key` wrapped."""
        fixed = self.fixed()
        body = fixed + keys.wrap(data_key, fixed) + commitment(data_key)
        return (body + hashlib.sha256(body).digest()).ljust(BLOCK, b"\0")

    @classmethod
    def unpack(cls, block: bytes) -> SegmentHeader:
        """Return the header of `block`; FormatError when it is none or was changed."""
        length = FIXED.size + WRAPPED_BYTES + 32
        if len(block) < BLOCK or block[:8] != MAGIC:
            raise FormatError("no segment header")
        if hashlib.sha256(block[:length]).digest() != block[length : length + 32]:
            raise FormatError("the segment header's checksum is wrong")
        return cls.unpack_fixed(block[: FIXED.size])

    @classmethod
    def unpack_fixed(cls, fixed: bytes) -> SegmentHeader:
        """Return the header of the bytes before the wrapped key; FormatError for an unknown
        version.
        """
        magic, version, generation, incarnation, stream, created, capacity, boot, key_id = (
            FIXED.unpack(fixed)
        )
        if magic != MAGIC or version != VERSION:
            raise FormatError(f"segment version {version} is not known")
        name = stream.rstrip(b"\0").decode("ascii", "backslashreplace")
        return cls(generation, incarnation, name, created, capacity, boot, key_id)

    @staticmethod
    def parts(block: bytes) -> tuple[bytes, bytes, bytes]:
        """Return the bytes before the wrapped key, the wrapped key, and its commitment."""
        start, end = FIXED.size, FIXED.size + WRAPPED_BYTES
        return block[:start], block[start:end], block[end : end + 32]

    @staticmethod
    def data_key(block: bytes, keys: Keys) -> bytes:
        """Return the segment's data key; EvidenceError when it does not open or breaks its
        commitment.
        """
        start = FIXED.size
        key = keys.unwrap(block[start : start + WRAPPED_BYTES], block[:start])
        if commitment(key) != block[start + WRAPPED_BYTES : start + WRAPPED_BYTES + 32]:
            raise FormatError("the segment's key breaks its commitment")
        return key


class SegmentFile:
    """A segment being written: preallocated, one writer, commits appended in order."""

    __slots__ = (
        "_aead", "_fd", "_number", "_tag", "capacity", "damaged", "generation", "path", "used"
    )  # fmt: skip

    def __init__(self, path: Path, header: SegmentHeader, keys: Keys) -> None:
        """Create and preallocate the file; OSError (ENOSPC) leaves nothing behind."""
        self.path = path
        self.generation = header.generation
        self.capacity = header.capacity
        data_key = secrets.token_bytes(KEY_BYTES)
        self._aead = AESGCM(data_key)
        self._number = 0
        self._tag = bytes(TAG_BYTES)
        self.used = BLOCK
        #: the disk refused a commit: its number is used up and readers stop here, so that nothing
        #: may follow it
        self.damaged = False
        self._fd = os.open(
            path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT | os.O_CLOEXEC, 0o600
        )
        try:
            os.posix_fallocate(self._fd, 0, header.capacity)
            with mmap.mmap(-1, BLOCK) as block:
                block[:] = header.pack(data_key, keys)
                os.pwrite(self._fd, block, 0)
        except BaseException:
            os.close(self._fd)
            path.unlink(missing_ok=True)
            raise

    def fits(self, plain_bytes: int) -> bool:
        """Say whether a commit of `plain_bytes` leaves room for the final one."""
        return self.used + commit_total(plain_bytes) + BLOCK <= self.capacity

    def commit(
        self, plaintext: memoryview | bytes, base: int, staging: memoryview, *, final: bool = False
    ) -> int:
        """Encrypt and store `plaintext` as the next commit; return its offset. OSError when the
        disk refuses.
        """
        size = len(plaintext)
        total = commit_total(size)
        header = COMMIT.pack(
            COMMIT_MAGIC, self.generation, self._number, FINAL if final else 0,
            size, total, base, time.time_ns(), self._tag, 0,
        )  # fmt: skip
        staging[:COMMIT_BYTES] = header
        end = COMMIT_BYTES + size + TAG_BYTES
        key_nonce = nonce(self.generation, self._number)
        self._number += 1  # whatever happens now, this nonce is used up
        self._aead.encrypt_into(key_nonce, plaintext, header, staging[COMMIT_BYTES:end])
        staging[end:total] = bytes(total - end)
        offset = self.used
        self.damaged = True
        if os.pwrite(self._fd, staging[:total], offset) != total:
            raise OSError(errno.EIO, "short write of a commit")
        self.damaged = False
        self._tag = bytes(staging[end - TAG_BYTES : end])
        self.used = offset + total
        return offset

    def sync(self) -> None:
        """Make everything stored so far survive power loss.

        EvidenceError when that fails: the kernel reports it once and then forgets what it lost, so
        that trying again would prove nothing.
        """
        self._flush(os.fdatasync)

    def _flush(self, how: Callable[[int], None]) -> None:
        try:
            how(self._fd)
        except OSError as lost:
            raise EvidenceError(f"the disk lost evidence: {lost.strerror}") from lost

    def finish(self, base: int, staging: memoryview) -> None:
        """Cut the file to its length, write the final commit, and close it in any case.

        In this order: a final commit is the end of the file for whoever sees it, also when the
        writer is killed or a verifier looks in between.
        """
        try:
            os.ftruncate(self._fd, self.used + commit_total(0))
            self.commit(b"", base, staging, final=True)
        finally:
            try:
                self._flush(os.fsync)
            finally:
                self.close()

    def close(self) -> None:
        """Close the file as it is."""
        with contextlib.suppress(OSError):
            os.close(self._fd)
        self._fd = -1
