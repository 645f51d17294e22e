"""Reads a segment file: its header block and its commits, without any key."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

BLOCK = 4096
TAG = 16
_HEADER = struct.Struct("<8sIII16sQQ16s8s")
_COMMIT = struct.Struct("<4sIIIIIQQ16sQ")
_WRAPPED = 60
_FINAL = 1


class SegmentError(Exception):
    """The file is no segment, or its header was changed."""


@dataclass(frozen=True, slots=True)
class Commit:
    """The header of one commit."""

    number: int
    offset: int
    size: int  #: of the block range
    plain: int  #: bytes of plaintext
    base: int
    time_ns: int
    final: bool
    previous_tag: bytes

    @property
    def end(self) -> int:
        """Return the offset after the block range."""
        return self.offset + self.size

    def tag(self, raw: memoryview) -> bytes:
        """Return the GCM tag in the commit's block range."""
        start = _COMMIT.size + self.plain
        return bytes(raw[start : start + TAG])


class Segment:
    """A segment file, open; a context manager."""

    def __init__(self, path: Path) -> None:
        """Open the file and check its header; OSError, or SegmentError."""
        self._memory = memoryview(b"")
        self._read = (-1, memoryview(b""))
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # not wait on a pipe
        try:
            self.block = os.pread(self._fd, BLOCK, 0)
            self._unpack()
        except BaseException:
            os.close(self._fd)
            raise

    def _unpack(self) -> None:
        block = self.block
        if len(block) != BLOCK or block[:8] != b"NARSEG01":
            raise SegmentError("the file has no segment header")
        end = _HEADER.size + _WRAPPED + 32
        if sha256(block[:end]).digest() != block[end : end + 32]:
            raise SegmentError("the segment header's checksum is wrong")
        self.generation, self.incarnation, self.stream, self.key_id = header_fields(block)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)

    @property
    def size(self) -> int:
        """Return the file's size in bytes."""
        return os.fstat(self._fd).st_size

    @property
    def wrapped(self) -> tuple[bytes, bytes, bytes]:
        """Return the context, the wrapped data key and the key commitment."""
        start, end = _HEADER.size, _HEADER.size + _WRAPPED
        return self.block[:start], self.block[start:end], self.block[end : end + 32]

    def commit(self, offset: int) -> Commit | None:
        """Return the commit at `offset`; None when there is no well-formed one."""
        head = os.pread(self._fd, _COMMIT.size, offset)
        if len(head) != _COMMIT.size:
            return None
        magic, generation, number, flags, plain, size, base, time_ns, previous, zero = (
            _COMMIT.unpack(head)
        )
        least = _COMMIT.size + plain + TAG
        if (
            magic != b"NCMT"
            or generation != self.generation
            or flags & ~_FINAL
            or zero
            or size != (least + BLOCK - 1) // BLOCK * BLOCK
            or offset + size > self.size
        ):
            return None
        return Commit(number, offset, size, plain, base, time_ns, bool(flags), previous)

    def commits(self, number: int, offset: int) -> Iterator[Commit]:
        """Yield the commits from `number` at `offset` on, as far as they follow each other."""
        while (commit := self.commit(offset)) is not None and commit.number == number:
            yield commit
            number, offset = number + 1, commit.end
            if commit.final:
                return

    def raw(self, commit: Commit) -> memoryview:
        """Return the commit's block range; shorter when the file was cut meanwhile.

        It is there until the next call: fresh memory for each costs more than reading.
        """
        if commit.size > len(self._memory):
            self._memory = memoryview(bytearray(commit.size))
        count = os.preadv(self._fd, [self._memory[: commit.size]], commit.offset)
        self._read = commit.offset, self._memory[:count]
        return self._memory[:count]

    def digest(self, commit: Commit) -> bytes:
        """Return the SHA-256 of a commit's block range."""
        return sha256(self.recent(commit)).digest()

    def tag(self, commit: Commit) -> bytes:
        """Return a commit's GCM tag."""
        return commit.tag(self.recent(commit))

    def recent(self, commit: Commit) -> memoryview:
        """Return the commit's block range, without reading it again if it was read last."""
        return self._read[1] if self._read[0] == commit.offset else self.raw(commit)

    def sealed_box(self, raw: memoryview, commit: Commit) -> tuple[bytes, memoryview, memoryview]:
        """Return nonce, ciphertext with tag, and associated data of a commit."""
        nonce = struct.pack("<IQ", self.generation, commit.number)
        end = _COMMIT.size + commit.plain + TAG
        return nonce, raw[_COMMIT.size : end], raw[: _COMMIT.size]


def header_fields(fixed: bytes) -> tuple[int, int, str, bytes]:
    """Return generation, incarnation, stream and key id of a segment's header; SegmentError."""
    _, version, generation, incarnation, stream, _, _, _, key_id = _HEADER.unpack_from(fixed)
    if version != 1:
        raise SegmentError(f"segment version {version} is not known")
    return generation, incarnation, stream.rstrip(b"\0").decode("ascii", "backslashreplace"), key_id
