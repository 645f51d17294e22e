"""Rewrites commits of a finished segment as a pack: session by session, compressed and encrypted.

`capture.sealed` calls it from the seal. A pack takes about `WINDOW_BYTES` of plaintext, so that
memory is bounded whatever a segment's size. Nothing of the segment is changed here.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from capture.compression import compressor
from capture.errors import EvidenceError
from capture.frames import HEADER, HEADER_BYTES
from capture.pack import (
    ENTRY,
    HEAD,
    LAST,
    MAGIC,
    ROW,
    STORED,
    VERSION,
    ZSTD,
    Part,
    encrypt,
    part_keys,
)
from capture.segfile import FINAL, SegmentHeader
from capture.store import sync_directory

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from capture.keystore import KeyStore
    from capture.store import Store
    from capture.tail import CommitInfo, SegmentReader

WINDOW_BYTES = 32 << 20
LEAST_COMPRESSED = 128  #: shorter parts gain nothing


@dataclass(frozen=True, slots=True)
class Packed:
    """A pack that is on disk, and what its leaf says of it."""

    generation: int
    first: int
    commits: int
    parts: int
    size: int
    digest: bytes  #: SHA-256 of the head
    last: bool


class _Session:
    """What a window holds of one session."""

    __slots__ = ("frames", "runs")

    def __init__(self) -> None:
        self.runs: list[tuple[int, int, int]] = []
        self.frames: list[memoryview] = []


class Packer:
    """Makes packs; one thread uses it."""

    def __init__(self, store: Store, keystore: KeyStore, window_bytes: int = WINDOW_BYTES) -> None:
        self._store, self._keystore, self._window = store, keystore, window_bytes
        self._compress = compressor()

    def pack(
        self, reader: SegmentReader, commits: Sequence[CommitInfo], first: int,
        digests: Sequence[bytes] = (), *, compress: bool = True,
    ) -> Packed:  # fmt: skip
        """Write the pack that begins with commit `first`; `commits` are all of the segment.

        `digests`: the SHA-256 of each commit, if it is known. OSError when the disk refuses,
        EvidenceError when the segment cannot be read: nothing is left behind then.
        """
        taken: list[CommitInfo] = []
        sessions: dict[int, _Session] = {}
        rows: list[bytes] = []
        size = 0
        for commit in commits[first:]:
            if taken and size + commit.plain_bytes > self._window:
                break
            raw = reader.raw(commit)
            digest = digests[commit.number] if digests else sha256(raw).digest()
            rows.append(_row(commit, raw, digest))
            split(reader.open(raw, commit), reader.header.incarnation, commit.number, sessions)
            taken.append(commit)
            size += commit.plain_bytes
        last = first + len(taken) == len(commits)
        made = _Made(reader.header.generation, first, secrets.token_bytes(32), rows, last=last)
        keys = self._keystore.ensure(reader.header.incarnation, sessions)
        fixed, _, commitment = SegmentHeader.parts(reader.block)
        for session in sorted(sessions):
            self._add(made, session, sessions[session], keys[session], compress=compress)
        return made.write(self._store, fixed, commitment)

    def _add(
        self, made: _Made, session: int, held: _Session, data_key: bytes, *, compress: bool
    ) -> None:
        plain = Part.pack(held.runs, held.frames)
        body, method = plain, STORED
        if compress and self._compress is not None and len(plain) >= LEAST_COMPRESSED:
            smaller = self._compress(plain)
            if len(smaller) < len(plain):
                body, method = smaller, ZSTD
        keys = part_keys(data_key, made.salt, session, made.generation, made.first)
        made.add(session, encrypt(body, *keys), len(plain), method)


def split(plaintext: bytes, incarnation: int, number: int, sessions: dict[int, _Session]) -> None:
    """Add the frames of one commit to what is held of each session. EvidenceError when they do
    not fill it.
    """
    view = memoryview(plaintext)
    unpack, size = HEADER.unpack_from, len(plaintext)
    at = start = 0
    current = -1
    while at < size:
        if at + HEADER_BYTES > size:
            raise EvidenceError(f"commit {number} ends within a frame")
        word, session, _, _ = unpack(plaintext, at)
        if word >> 32 != incarnation or not word & 0xFFFFFFFF:
            raise EvidenceError(f"commit {number} has no frame at {at}")
        if session != current:
            _run(sessions, current, number, start, view[start:at])
            current, start = session, at
        at += HEADER_BYTES + ((word & 0xFFFFFF) + 7 & ~7)
    if at != size:
        raise EvidenceError(f"commit {number} ends within a frame")
    _run(sessions, current, number, start, view[start:at])


def _run(
    sessions: dict[int, _Session], session: int, number: int, start: int, frames: memoryview
) -> None:
    if not frames:
        return
    held = sessions.get(session)
    if held is None:
        held = sessions[session] = _Session()
    held.runs.append((number, start, start + len(frames)))
    held.frames.append(frames)


def _row(commit: CommitInfo, raw: bytes | memoryview, digest: bytes) -> bytes:
    end = 64 + commit.plain_bytes
    return ROW.pack(
        commit.offset, commit.total_bytes, commit.plain_bytes, commit.base, commit.time_ns,
        FINAL if commit.final else 0, bytes(raw[end : end + 16]), digest,
    )  # fmt: skip


class _Made:
    """A pack that is being made."""

    def __init__(
        self, generation: int, first: int, salt: bytes, rows: list[bytes], *, last: bool
    ) -> None:
        self.generation, self.first, self.salt, self._rows = generation, first, salt, rows
        self._last = last
        self._parts: list[bytes] = []
        self._entries: list[tuple[int, int, int, int, int, bytes]] = []
        self._end = 0

    def add(self, session: int, part: bytes, plain_bytes: int, method: int) -> None:
        """Add the next session's part."""
        digest = sha256(part).digest()
        self._entries.append((session, self._end, len(part), plain_bytes, method, digest))
        self._parts.append(part)
        self._end += len(part)

    def write(self, store: Store, fixed: bytes, commitment: bytes) -> Packed:
        """Write it under its name, so that it survives power loss."""
        flags = LAST if self._last else 0
        parts = len(self._entries)
        start = HEAD.pack(
            MAGIC, VERSION, flags, self.first, len(self._rows), parts, self.salt, fixed, commitment
        )
        after = HEAD.size + len(self._rows) * ROW.size + parts * ENTRY.size
        head = b"".join(
            [start, *self._rows]
            + [ENTRY.pack(s, after + at, *rest) for s, at, *rest in self._entries]
        )
        path = store.pack(self.generation, self.first)
        _store(path, [head, *self._parts])
        return Packed(
            self.generation, self.first, len(self._rows), parts, after + self._end,
            sha256(head).digest(), self._last,
        )  # fmt: skip


def _store(path: Path, pieces: list[bytes]) -> None:
    scratch = path.with_suffix(".new")
    try:
        with contextlib.ExitStack() as stack:
            fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            file = stack.enter_context(os.fdopen(fd, "wb", buffering=1 << 20))
            file.writelines(pieces)
            file.flush()
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # nobody reads it again soon
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    os.rename(scratch, path)
    sync_directory(path.parent)
