"""Reads the packs of a segment whose file is gone, as if it were there, without any key."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Self

from capture.verify.segment import Commit, Segment, SegmentError, header_fields

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

_HEAD = struct.Struct("<8sIIIII4x32s76s32s20x")
_ROW = struct.Struct("<QIIQQI4x16s32s")
_ENTRY = struct.Struct("<QQIII4x32s")
_LAST = 1
_SLOT = 64
_MOST = 1 << 28  #: bytes of a head


@dataclass(frozen=True, slots=True)
class Entry:
    """Where the part of a session is in a pack."""

    session: int
    offset: int
    length: int
    plain: int
    method: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Row:
    """What the pack says of a commit."""

    commit: Commit
    tag: bytes
    digest: bytes


class Pack:
    """One pack file: its head; parts are read one by one."""

    def __init__(self, path: Path) -> None:
        """Read the head; OSError, or SegmentError."""
        self.path = path
        with path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            head = file.read(_HEAD.size)
            if len(head) != _HEAD.size or head[:8] != b"NARPACK1":
                raise SegmentError("the file is no pack")
            _, version, flags, self.first, commits, parts, self.salt, fixed, commitment = (
                _HEAD.unpack(head)
            )
            if version != 1 or flags & ~_LAST:
                raise SegmentError(f"version {version} of a pack is not known")
            length = commits * _ROW.size + parts * _ENTRY.size
            if length > min(self.size, _MOST):
                raise SegmentError("the pack's head is cut off")
            head += file.read(length)
        self.last = bool(flags & _LAST)
        self.fixed, self.commitment = fixed, commitment
        self.digest = sha256(head).digest()
        self.length = len(head)
        self._rows = head[_HEAD.size : _HEAD.size + commits * _ROW.size]
        entries = head[_HEAD.size + commits * _ROW.size :]
        self.commits = commits
        self.entries = [Entry(*entry) for entry in _ENTRY.iter_unpack(entries)]

    def rows(self, tag: bytes) -> Iterator[Row]:
        """Yield what it says of each commit; `tag` is that of the commit before the first."""
        for number, row in enumerate(_ROW.iter_unpack(self._rows), self.first):
            offset, total, plain, base, time_ns, flags, own, digest = row
            commit = Commit(number, offset, total, plain, base, time_ns, bool(flags & 1), tag)
            yield Row(commit, own, digest)
            tag = own

    def faults(self) -> Iterator[str]:
        """Yield what is wrong with its parts: every byte after the head is in one."""
        at, before = self.length, -1
        with self.path.open("rb") as file:
            for entry in self.entries:
                if entry.session <= before or entry.offset != at:
                    yield f"its directory is out of order at session {entry.session}"
                    return
                file.seek(at)
                if sha256(file.read(entry.length)).digest() != entry.digest:
                    yield f"the part at {at} is not as sealed"
                at, before = at + entry.length, entry.session
        if at != self.size:
            yield f"the file has {self.size} bytes, not {at}"

    def parts(self) -> Iterator[tuple[Entry, bytes]]:
        """Yield each part as it lies in the file."""
        with self.path.open("rb") as file:
            for entry in self.entries:
                file.seek(entry.offset)
                yield entry, file.read(entry.length)


class Packs:
    """A segment, from its packs: the same calls as `segment.Segment`; a context manager."""

    def __init__(self, evidence: Path, generation: int) -> None:
        """Read the heads of its packs; OSError, or SegmentError."""
        self.packs: list[Pack] = []
        self._rows: dict[int, Row] = {}
        first, tag = 0, bytes(16)
        while not self.packs or not self.packs[-1].last:
            path = evidence / "sealed" / f"{generation:08x}.{first:08x}.pack"
            try:
                pack = Pack(path)
            except FileNotFoundError as wrong:
                raise SegmentError(f"{path.name} is missing") from wrong
            if pack.first != first or not pack.commits or pack.fixed[:8] != b"NARSEG01":
                raise SegmentError(f"{path.name} is the pack of other commits")
            if self.packs and (pack.fixed, pack.commitment) != (
                self.packs[0].fixed, self.packs[0].commitment,
            ):  # fmt: skip
                raise SegmentError(f"{path.name} is the pack of another segment")
            self.packs.append(pack)
            for row in pack.rows(tag):
                self._rows[row.commit.offset] = row
                tag = row.tag
            first += pack.commits
        self._fixed, self._commitment = self.packs[0].fixed, self.packs[0].commitment
        self.generation, self.incarnation, self.stream, self.key_id = header_fields(self._fixed)
        name = f"segments.{generation >> 16:04x}"
        slot = _slot(evidence / "keys" / name, generation & 0xFFFF)
        self._wrapped = slot[:60] if any(slot) else b""
        self.block: bytes | None = None
        if self._wrapped:
            body = self._fixed + self._wrapped + self._commitment
            self.block = (body + sha256(body).digest()).ljust(4096, b"\0")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing is open."""

    @property
    def size(self) -> int:
        """Return the size that the segment had, as far as its commits say."""
        return max((row.commit.end for row in self._rows.values()), default=4096)

    @property
    def wrapped(self) -> tuple[bytes, bytes, bytes]:
        """Return the context, the wrapped data key (empty: destroyed) and the key commitment."""
        return self._fixed, self._wrapped, self._commitment

    def commit(self, offset: int) -> Commit | None:
        """Return the commit that was at `offset`; None when none was."""
        row = self._rows.get(offset)
        return None if row is None else row.commit

    def commits(self, number: int, offset: int) -> Iterator[Commit]:
        """Yield the commits from `number` at `offset` on."""
        while (commit := self.commit(offset)) is not None and commit.number == number:
            yield commit
            number, offset = number + 1, commit.end

    def digest(self, commit: Commit) -> bytes:
        """Return the SHA-256 that the commit's block range had."""
        return self._rows[commit.offset].digest

    def tag(self, commit: Commit) -> bytes:
        """Return the commit's GCM tag."""
        return self._rows[commit.offset].tag

    def pack_of(self, number: int) -> Pack:
        """Return the pack of a commit."""
        return next(p for p in self.packs if number < p.first + p.commits)


AnySegment = Segment | Packs


class Slots:
    """The wrapped keys of sessions; a context manager, which keeps the files open."""

    def __init__(self, evidence: Path, incarnation: int) -> None:
        self._folder, self._incarnation = evidence / "keys", incarnation
        self._files: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for fd in self._files.values():
            if fd >= 0:
                os.close(fd)

    def get(self, session: int) -> tuple[bytes, bytes]:
        """Return a session's wrapped key, empty when it was destroyed, and its context."""
        owner, counter = session >> 40, session & ((1 << 40) - 1)
        if session == 0:
            owner = self._incarnation
        if owner not in self._files:
            try:
                fd = os.open(self._folder / f"{owner:08x}", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                fd = -1
            self._files[owner] = fd
        fd = self._files[owner]
        slot = os.pread(fd, _SLOT, counter * _SLOT) if fd >= 0 else b""
        context = b"narrows session key\0" + struct.pack("<IQ", owner, session)
        return (slot[:60] if any(slot) else b""), context


def _slot(path: Path, number: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(number * _SLOT)
            return file.read(_SLOT)
    except OSError:
        return b""
