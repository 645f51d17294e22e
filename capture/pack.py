"""The pack: some commits of a finished segment, rewritten session by session.

`capture.packing` makes packs, `Pack` reads one, `PackedSegment` reads all of a segment as if its
file were still there. See docs/evidence-format.md for the byte tables. A pack holds

    header | commit table | directory | parts

The commit table says what each commit was on disk (its place, its SHA-256), the directory where the
part of each session is. A part is all that the pack holds of a session: the runs of its frames in
the commits, and the frames; compressed, then encrypted under a key of its own.
"""

from __future__ import annotations

import hmac
import os
from dataclasses import dataclass
from hashlib import sha256
from operator import itemgetter
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from capture.compression import decompress
from capture.errors import EvidenceError, FormatError
from capture.frames import HEADER, HEADER_BYTES
from capture.segfile import BLOCK, FINAL, FIXED, SegmentHeader
from capture.tail import CommitInfo

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

    from capture.keystore import KeyStore
    from capture.store import Store

MAGIC = b"NARPACK1"
VERSION = 1
LAST = 1
STORED, ZSTD = 0, 1
CHUNK = 16 << 10
FILLER = 5  #: kind of frames that stand for lost ones
MOST_FILLER = 1 << 20
TAG = 16
HEAD = Struct(f"<8sIIIII4x32s{FIXED.size}s32s20x")
ROW = Struct("<QIIQQI4x16s32s")
ENTRY = Struct("<QQIII4x32s")
RUN = Struct("<III")
_INFO = Struct("<32sQII")
_COUNT = Struct("<I")
_NONCE = Struct("<IQ")


def part_keys(
    data_key: bytes, salt: bytes, session: int, generation: int, first: int
) -> tuple[bytes, bytes]:
    """Return the encryption key and the key commitment of a part: HKDF-Expand (RFC 5869) with
    SHA-256, 64 bytes.
    """
    info = b"narrows sealed part\0" + _INFO.pack(salt, session, generation, first)
    key = hmac.digest(data_key, info + b"\x01", "sha256")
    return key, hmac.digest(data_key, key + info + b"\x02", "sha256")


def encrypt(body: bytes, key: bytes, commitment: bytes) -> bytes:
    """Return the commitment and the chunks of a part's body."""
    box = AESGCM(key)
    if len(body) <= CHUNK:
        return commitment + box.encrypt(_NONCE.pack(1, 0), body, None)
    view, pieces = memoryview(body), [commitment]
    last = (len(body) - 1) // CHUNK
    for number in range(last + 1):
        piece = view[number * CHUNK : (number + 1) * CHUNK]
        pieces.append(box.encrypt(_NONCE.pack(number == last, number), piece, None))
    return b"".join(pieces)


def decrypt(part: bytes, key: bytes, commitment: bytes) -> bytes:
    """Return a part's body; FormatError when the key is another one or a byte was changed."""
    if not hmac.compare_digest(part[:32], commitment):
        raise FormatError("the data key breaks the part's commitment")
    box, view = AESGCM(key), memoryview(part)[32:]
    size = CHUNK + TAG
    last = (len(view) - 1) // size
    try:
        return b"".join(
            box.decrypt(
                _NONCE.pack(number == last, number), view[number * size : (number + 1) * size], None
            )
            for number in range(last + 1)
        )
    except InvalidTag as wrong:
        raise FormatError("the part does not authenticate") from wrong


class Entry(NamedTuple):
    """One line of the directory."""

    session: int
    offset: int  #: in the file
    length: int
    plain: int  #: bytes of the part before compression
    method: int
    digest: bytes  #: SHA-256 of the part as it lies in the file


@dataclass(frozen=True, slots=True)
class Part:
    """What a pack holds of one session."""

    runs: tuple[tuple[int, int, int], ...]  #: commit, start and end in its plaintext
    frames: memoryview  #: the runs, back to back

    def commits(self) -> Iterator[tuple[int, int, memoryview]]:
        """Yield (commit, start in its plaintext, frames) of each run."""
        at = 0
        for number, start, end in self.runs:
            yield number, start, self.frames[at : at + end - start]
            at += end - start

    @classmethod
    def unpack(cls, plain: bytes) -> Part:
        """Return the part of its bytes; FormatError when they are none."""
        view = memoryview(plain)
        (count,) = _COUNT.unpack_from(view)
        end = _COUNT.size + count * RUN.size
        if end > len(view):
            raise FormatError("a part's runs are cut off")
        runs = tuple(RUN.iter_unpack(view[_COUNT.size : end]))
        if sum(stop - start for _, start, stop in runs) != len(view) - end:
            raise FormatError("a part's runs do not fill it")
        return cls(runs, view[end:])

    @staticmethod
    def pack(runs: list[tuple[int, int, int]], frames: list[memoryview]) -> bytes:
        """Return the bytes of a part."""
        return b"".join([_COUNT.pack(len(runs)), *(RUN.pack(*run) for run in runs), *frames])


class Pack:
    """One pack file, open; a context manager."""

    def __init__(self, path: Path, previous_tag: bytes = bytes(TAG)) -> None:
        """Open the file and read its head; FormatError when it is no pack.

        `previous_tag` is the GCM tag of the commit before the first.
        """
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._read_head(previous_tag)
        except BaseException:
            os.close(self._fd)
            raise

    def _read_head(self, previous_tag: bytes) -> None:
        start = os.pread(self._fd, HEAD.size, 0)
        if len(start) < HEAD.size or start[:8] != MAGIC:
            raise FormatError(f"{self.path.name} is no pack")
        _, version, flags, self.first, commits, parts, self.salt, fixed, commitment = HEAD.unpack(
            start
        )
        if version != VERSION:
            raise FormatError(f"{self.path.name}: version {version} of a pack is not known")
        self.last = bool(flags & LAST)
        self.fixed, self.commitment = fixed, commitment
        self.header = SegmentHeader.unpack_fixed(fixed)
        size = commits * ROW.size + parts * ENTRY.size
        tables = os.pread(self._fd, size, HEAD.size)
        if len(tables) != size:
            raise FormatError(f"{self.path.name}: the head is cut off")
        self.digest = sha256(start + tables).digest()
        self.commits: list[CommitInfo] = []
        self.digests: list[bytes] = []
        tag = previous_tag
        for row in ROW.iter_unpack(tables[: commits * ROW.size]):
            offset, total, plain, base, time_ns, kind, tag_after, digest = row
            number = self.first + len(self.commits)
            self.commits.append(
                CommitInfo(number, offset, total, plain, base, time_ns, bool(kind & FINAL), tag)
            )
            self.digests.append(digest)
            tag = tag_after
        self.tag = tag  #: of the last commit
        self.entries = {
            entry[0]: Entry(*entry) for entry in ENTRY.iter_unpack(tables[commits * ROW.size :])
        }

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

    def part(self, session: int, keystore: KeyStore) -> Part | None:
        """Return what the pack holds of a session, None when that is nothing.

        EvidenceError when its key was destroyed; FormatError when it is not as it was written.
        """
        entry = self.entries.get(session)
        if entry is None:
            return None
        data_key = keystore.get(self.header.incarnation, session)
        if data_key is None:
            raise KeyDestroyed("the session's data key is not there: it was destroyed")
        content = os.pread(self._fd, entry.length, entry.offset)
        if len(content) != entry.length:
            raise FormatError(f"{self.path.name} is cut off")
        keys = part_keys(data_key, self.salt, session, self.header.generation, self.first)
        body = decrypt(content, *keys)
        return Part.unpack(body if entry.method == STORED else decompress(body, entry.plain))


class KeyDestroyed(EvidenceError):
    """The data key of a session was destroyed; everything else can be read."""


class PackedSegment:
    """A segment whose file is gone, read from its packs; the same calls as `tail.SegmentReader`."""

    def __init__(self, store: Store, generation: int, keystore: KeyStore | None = None) -> None:
        """Open its packs; FileNotFoundError when the first is not there, FormatError when one is
        not. Without key store no frames can be read.
        """
        self._keystore = keystore
        self.packs: list[Pack] = []
        self._image: tuple[int, dict[int, bytes]] = (-1, {})
        try:
            while not self.packs or not self.packs[-1].last:
                self._next(store, generation)
        except BaseException:
            self.close()
            raise
        self.header = self.packs[0].header
        self._at = {commit.offset: (pack, commit) for pack in self.packs for commit in pack.commits}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _next(self, store: Store, generation: int) -> None:
        first, tag = 0, bytes(TAG)
        if self.packs:
            first, tag = self.packs[-1].first + len(self.packs[-1].commits), self.packs[-1].tag
        try:
            pack = Pack(store.pack(generation, first), tag)
        except FileNotFoundError as wrong:
            if not self.packs:
                raise
            raise FormatError(f"the pack from commit {first} is missing") from wrong
        self.packs.append(pack)
        if (pack.header.generation, pack.first) != (generation, first) or not pack.commits:
            raise FormatError(f"{pack.path.name} is the pack of other commits")

    def close(self) -> None:
        """Close the files."""
        for pack in self.packs:
            pack.close()

    def commit_at(self, offset: int) -> CommitInfo | None:
        """Return the commit that was at `offset` of the segment, None when none was."""
        found = self._at.get(offset)
        return None if found is None else found[1]

    def commits(self, number: int = 0, offset: int = BLOCK) -> Iterator[CommitInfo]:
        """Yield the commits from the one with `number` at `offset` on."""
        while (commit := self.commit_at(offset)) is not None and commit.number == number:
            yield commit
            number, offset = number + 1, offset + commit.total_bytes

    @property
    def ends_final(self) -> int:
        """Return the size that the segment had, 0 when it had no final commit."""
        last = self.packs[-1].commits[-1]
        return last.offset + last.total_bytes if last.final else 0

    def load(self, commit: CommitInfo, *, digest: bool = False) -> tuple[bytes, bytes]:
        """Return the SHA-256 of the commit as it was on disk, and its frames; see `plaintext`."""
        pack = self._at[commit.offset][0]
        return pack.digests[commit.number - pack.first] if digest else b"", self.plaintext(commit)

    def plaintext(self, commit: CommitInfo) -> bytes:
        """Return the frames of a commit. Where those of sessions were whose key was destroyed are
        frames of kind FILLER: the others have the places that they had.
        """
        pack = self._at[commit.offset][0]
        if self._image[0] != pack.first:
            self._image = pack.first, self._assembled(pack)
        return self._image[1].get(commit.number, b"")

    def pack_of(self, number: int) -> Pack:
        """Return the pack that holds a commit."""
        for pack in self.packs:
            if number < pack.first + len(pack.commits):
                return pack
        raise FormatError(f"commit {number} is in no pack")

    def part(self, session: int, number: int) -> Part | None:
        """Return what the pack that holds a commit has of a session; see `Pack.part`."""
        assert self._keystore is not None, "opened without keys"
        return self.pack_of(number).part(session, self._keystore)

    def _assembled(self, pack: Pack) -> dict[int, bytes]:
        assert self._keystore is not None, "opened without keys"
        pieces: dict[int, list[tuple[int, memoryview]]] = {}
        for session in pack.entries:
            try:
                part = pack.part(session, self._keystore)
            except KeyDestroyed:
                continue
            for number, start, frames in part.commits() if part is not None else ():
                pieces.setdefault(number, []).append((start, frames))
        tag = self.header.incarnation << 32
        return {
            commit.number: _joined(pieces.get(commit.number, []), commit.plain_bytes, tag)
            for commit in pack.commits
        }


def _joined(pieces: list[tuple[int, memoryview]], size: int, tag: int) -> bytes:
    """Return a commit's frames, each where it was."""
    found: list[bytes | memoryview] = []
    at = 0
    for start, frames in sorted(pieces, key=itemgetter(0)):
        if start > at:
            found.append(_filler(start - at, tag))
        found.append(frames)
        at = start + len(frames)
    if at < size:
        found.append(_filler(size - at, tag))
    return b"".join(found)


def _filler(size: int, tag: int) -> bytes:
    """Return frames that stand for those that cannot be opened any more: of no session, and of a
    kind that nobody writes.
    """
    found = []
    while size:
        length = size if size <= MOST_FILLER else MOST_FILLER // 2
        word = tag | FILLER << 24 | (length - HEADER_BYTES)
        found.append(HEADER.pack(word, 0, 0, 0) + bytes(length - HEADER_BYTES))
        size -= length
    return b"".join(found)
