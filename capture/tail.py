"""Reads a segment file: its header and its commits, while it is being written or after.

The seal, the index, readers and recovery use it. It never changes a file. What does not
authenticate raises FormatError with the offset; the end of what is written is simply the end.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from capture.errors import FormatError
from capture.segfile import (
    BLOCK,
    COMMIT,
    COMMIT_BYTES,
    COMMIT_MAGIC,
    FINAL,
    TAG_BYTES,
    SegmentHeader,
    nonce,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

    from capture.crypt import Keys
    from capture.uncached import Uncached


@dataclass(frozen=True, slots=True)
class CommitInfo:
    """One commit as it lies on disk."""

    number: int
    offset: int
    total_bytes: int
    plain_bytes: int
    base: int
    time_ns: int
    final: bool
    previous_tag: bytes


class SegmentReader:
    """Random and sequential access to the commits of one segment; a context manager."""

    def __init__(
        self, path: Path, keys: Keys | None = None, *, uncached: Uncached | None = None
    ) -> None:
        """Open the file; FormatError when it is no segment. Without keys only `raw` can be read.

        With `uncached` commits are read past the page cache.
        """
        self.path = path
        self._uncached = uncached
        self._direct = -1
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if uncached is not None:
                # Only heads come through the page cache: read nothing ahead of them.
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
                self._direct = uncached.open(path)
            self.block = os.pread(self._fd, BLOCK, 0)
            self.header = SegmentHeader.unpack(self.block)
            self._aead = None if keys is None else AESGCM(SegmentHeader.data_key(self.block, keys))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
        if self._direct >= 0:
            os.close(self._direct)

    def commit_at(self, offset: int) -> CommitInfo | None:
        """Return the commit whose header is at `offset`; None where nothing was written yet."""
        head = os.pread(self._fd, COMMIT_BYTES, offset)
        if len(head) < COMMIT_BYTES or head[:4] != COMMIT_MAGIC:
            return None
        _magic, generation, number, flags, plain, total, base, time_ns, previous, _zero = (
            COMMIT.unpack(head)
        )
        if (
            generation != self.header.generation
            or total % BLOCK
            or plain + COMMIT_BYTES + TAG_BYTES > total
        ):
            return None
        if offset + total > os.fstat(self._fd).st_size:
            return None
        return CommitInfo(
            number, offset, total, plain, base, time_ns, bool(flags & FINAL), previous
        )

    def commits(self, number: int = 0, offset: int = BLOCK) -> Iterator[CommitInfo]:
        """Yield the commits from the one with `number` at `offset` on, as far as they are
        written.
        """
        while (commit := self.commit_at(offset)) is not None and commit.number == number:
            yield commit
            number += 1
            offset += commit.total_bytes
            if commit.final:
                return

    def raw(self, commit: CommitInfo) -> bytes | memoryview:
        """Return the commit's whole block range as it lies on disk; of an uncached read it is there
        until the next one.
        """
        content: bytes | memoryview
        if self._uncached is not None:
            content = self._uncached.read(self._direct, commit.total_bytes, commit.offset)
        else:
            content = os.pread(self._fd, commit.total_bytes, commit.offset)
        if len(content) != commit.total_bytes:
            raise FormatError(f"{self.path.name}: commit at {commit.offset} is cut off")
        return content

    def open(self, raw: bytes | memoryview, commit: CommitInfo) -> bytes:
        """Return the plaintext of a commit's block range; FormatError when it does not
        authenticate.
        """
        assert self._aead is not None, "opened without keys"
        view = memoryview(raw)
        end = COMMIT_BYTES + commit.plain_bytes + TAG_BYTES
        try:
            return self._aead.decrypt(
                nonce(self.header.generation, commit.number),
                view[COMMIT_BYTES:end],
                view[:COMMIT_BYTES],
            )
        except InvalidTag as wrong:
            raise FormatError(
                f"{self.path.name}: commit at {commit.offset} does not authenticate"
            ) from wrong

    def plaintext(self, commit: CommitInfo) -> bytes:
        """Return the frames of a commit."""
        return self.open(self.raw(commit), commit)

    def load(self, commit: CommitInfo, *, digest: bool = False) -> tuple[bytes, bytes]:
        """Return the SHA-256 of a commit's block range (empty unless asked for), and its frames."""
        raw = self.raw(commit)
        plaintext = self.open(raw, commit)
        return self.digest(raw) if digest else b"", plaintext

    @property
    def ends_final(self) -> int:
        """Return the size of a segment that ends with its final commit, 0 of any other."""
        size = os.fstat(self._fd).st_size
        last = self.commit_at(size - BLOCK) if size > BLOCK else None
        return size if last is not None and last.final else 0

    def digest(self, raw: bytes | memoryview) -> bytes:
        """Return the SHA-256 of a commit's block range: what the ledger commits to."""
        return hashlib.sha256(raw).digest()
