"""The ledger: an append-only RFC 6962 tree as static files (C2SP tlog-tiles) with signed
checkpoints.

Only the seal appends; anybody may read the files. Theory of operation: `append` writes the tiles
and entry bundles of the longer tree, each under a name that the current checkpoint does not use (a
wider partial, or a full tile), makes them durable, and then replaces the checkpoint in one rename.
So the tree on disk is always exactly the one that was signed last; a kill in between leaves files
that no checkpoint names, and the next `append` writes over them. Partials stay one checkpoint
longer than they are needed, for readers that are on their way.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import struct
import uuid
from functools import lru_cache
from typing import TYPE_CHECKING

from capture.crypt import create_key
from capture.errors import EvidenceError, FormatError
from capture.merkle import EMPTY, HASH_BYTES, WIDTH, leaf_hash, node_hash, root_of, tile_path
from capture.note import Checkpoint, NoteSigner, NoteVerifier

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from capture.store import Store

MAX_ENTRY_BYTES = 4096
_AT_ONCE = 64


def load_signer(store: Store) -> NoteSigner:
    """Return the appliance's log key and origin, making both on the first start.

    The origin is "narrows/<uuid>". EvidenceError when ledger.pub and ledger.key do not belong
    together.
    """
    seed = create_key(store.state / "ledger.key").reveal()
    path = store.state / "ledger.pub"
    if path.exists():
        origin = NoteVerifier.parse(path.read_text("ascii")).name
    else:
        origin = _known_origin(store) or f"narrows/{uuid.uuid4()}"
        write_file(path, NoteSigner(origin, seed).verifier.vkey().encode() + b"\n", mode=0o644)
    signer = NoteSigner(origin, seed)
    if path.read_text("ascii").strip() != signer.verifier.vkey():
        raise EvidenceError(f"{path} is not the public half of ledger.key")
    return signer


def _known_origin(store: Store) -> str | None:
    with contextlib.suppress(OSError):
        return (store.ledger / "checkpoint").read_bytes().split(b"\n", 1)[0].decode()
    return None


def write_file(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Put `content` under `path` in one step that survives power loss, except for the directory's
    own entry.
    """
    fd, scratch = _scratch(path, content, mode)
    try:
        os.fdatasync(fd)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink()
        raise
    finally:
        os.close(fd)


def _scratch(path: Path, content: bytes, mode: int) -> tuple[int, Path]:
    """Write `content` beside `path`; return the open file and its path."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
    except BaseException:
        os.close(fd)
        scratch.unlink(missing_ok=True)
        raise
    return fd, scratch


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive power loss."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class _Edge:
    """The unfinished tiles of every level, and the unfinished entry bundle."""

    __slots__ = ("bundle", "levels", "size")

    def __init__(self, size: int, levels: list[list[bytes]], bundle: list[bytes]) -> None:
        self.size, self.levels, self.bundle = size, levels, bundle

    def copy(self) -> _Edge:
        return _Edge(self.size, [list(level) for level in self.levels], list(self.bundle))

    def add(self, entry: bytes) -> list[tuple[str, bytes]]:
        """Add an entry; return the files that became full."""
        self.bundle.append(struct.pack(">H", len(entry)) + entry)
        full = []
        if len(self.bundle) == WIDTH:
            full.append((tile_path("entries", self.size // WIDTH), b"".join(self.bundle)))
            self.bundle = []
        self.size += 1
        hashed, index = leaf_hash(entry), self.size - 1
        for level in range(9):
            if level == len(self.levels):
                self.levels.append([])
            tile = self.levels[level]
            tile.append(hashed)
            if len(tile) < WIDTH:
                break
            index //= WIDTH
            full.append((tile_path(level, index), b"".join(tile)))
            hashed = root_of(tile)
            self.levels[level] = []
        return full

    def partials(self) -> list[tuple[str, bytes]]:
        """Return the files of the unfinished tiles."""
        index = self.size // WIDTH
        files = []
        if self.bundle:
            files.append((tile_path("entries", index, len(self.bundle)), b"".join(self.bundle)))
        for level, tile in enumerate(self.levels):
            if tile:
                files.append((tile_path(level, index, len(tile)), b"".join(tile)))
            index //= WIDTH
        return files

    def root(self) -> bytes:
        """Return the tree's root: each level's nodes, with what the lower levels came to as the
        last one.
        """
        root: bytes | None = None
        for tile in self.levels:
            if tile or root is not None:
                root = root_of([*tile, root] if root is not None else tile)
        return EMPTY if root is None else root


class Ledger:
    """The log in one directory. Any number may read; the caller sees to it that only one appends.
    Who has the log's public key only can do everything but append.

    A reader sees the log as it was when it was opened, and only as long as its partial tiles are
    there: open, read, let go.
    """

    def __init__(self, directory: Path, key: NoteSigner | NoteVerifier) -> None:
        """Open or begin the log. EvidenceError when what is on disk is not what was signed: nothing
        is repaired.
        """
        self._directory = directory
        self._signer = key if isinstance(key, NoteSigner) else None
        verifier = key.verifier if isinstance(key, NoteSigner) else key
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.checkpoint = Checkpoint(verifier.name, 0, EMPTY)
        self.note = b""  #: the signed checkpoint; empty before the first append
        self._unneeded: list[Path] = []
        path = directory / "checkpoint"
        if path.exists():
            self.note = path.read_bytes()
            self.checkpoint = Checkpoint.parse(verifier.open(self.note))
        self._edge = self._load()
        if self._edge.root() != self.checkpoint.root or self.checkpoint.origin != verifier.name:
            raise EvidenceError(
                f"the ledger in {directory} does not match its checkpoint; run evidence verify"
            )
        self._swept = False
        self._tile = lru_cache(maxsize=256)(self._read_tile)

    @property
    def size(self) -> int:
        """Return the number of signed leaves."""
        return self.checkpoint.size

    def append(self, entries: Sequence[bytes]) -> Checkpoint:
        """Add `entries`, each of 1 to 4096 bytes, and sign the longer tree; all of them or, on
        OSError, none.
        """
        assert self._signer is not None, "without the private key the log is only read"
        edge = self._edge.copy()
        files: list[tuple[str, bytes]] = []
        for entry in entries:
            if not 0 < len(entry) <= MAX_ENTRY_BYTES:
                raise ValueError(f"a leaf of {len(entry)} bytes")
            files += edge.add(entry)
        checkpoint = Checkpoint(self.checkpoint.origin, edge.size, edge.root())
        if not self._swept:
            self._sweep()
            self._swept = True
        self._write(files + edge.partials())
        note = self._signer.sign(checkpoint.text())
        write_file(self._directory / "checkpoint", note, mode=0o644)
        sync_directory(self._directory)
        replaced = {self._directory / name for name, _ in self._edge.partials()}
        kept = {self._directory / name for name, _ in edge.partials()}
        for path in self._unneeded:
            path.unlink(missing_ok=True)
        self._unneeded = sorted(replaced - kept)
        self._edge, self.checkpoint, self.note = edge, checkpoint, note
        self._tile.cache_clear()
        return checkpoint

    def entries(self, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Yield the leaves' data from index `start` to before `end`."""
        end = self.size if end is None else end
        for index in range(start // WIDTH, (end + WIDTH - 1) // WIDTH):
            base = index * WIDTH
            width = min(WIDTH, self.size - base)
            content = (self._directory / tile_path("entries", index, width)).read_bytes()
            at = 0
            for number in range(base, base + width):
                (length,) = struct.unpack_from(">H", content, at)
                if start <= number < end:
                    yield content[at + 2 : at + 2 + length]
                at += 2 + length

    def inclusion(self, index: int, size: int | None = None) -> list[bytes]:
        """Return the audit path of a leaf in the tree of `size` (RFC 6962, 2.1.1)."""
        size = self.size if size is None else size
        if not 0 <= index < size <= self.size:
            raise ValueError("no such leaf in that tree")
        path, low, high = [], 0, size
        while high - low > 1:
            middle = low + _split(high - low)
            if index < middle:
                path.append(self._range(middle, high))
                high = middle
            else:
                path.append(self._range(low, middle))
                low = middle
        return path[::-1]

    def consistency(self, old: int, new: int | None = None) -> list[bytes]:
        """Return the proof that the tree of `new` continues that of `old` (RFC 6962, 2.1.2)."""
        new = self.size if new is None else new
        if not 0 < old <= new <= self.size:
            raise ValueError("no such trees")
        path, low, high, whole = [], 0, new, True
        while high != old:
            middle = low + _split(high - low)
            if old <= middle:
                path.append(self._range(middle, high))
                high = middle
            else:
                path.append(self._range(low, middle))
                low, whole = middle, False
        return path[::-1] if whole else [self._range(low, high), *path[::-1]]

    def root_at(self, size: int) -> bytes:
        """Return the root that the tree had at `size`."""
        return self._range(0, size) if size else EMPTY

    def _range(self, low: int, high: int) -> bytes:
        count = high - low
        if count & (count - 1) == 0 and low % count == 0:
            level, within = divmod(count.bit_length() - 1, 8)
            first = low >> (8 * level)
            tile = self._tile(level, first // WIDTH)
            return root_of(tile[first % WIDTH : first % WIDTH + (1 << within)])
        middle = low + _split(count)
        return node_hash(self._range(low, middle), self._range(middle, high))

    def _read_tile(self, level: int, index: int) -> tuple[bytes, ...]:
        width = min(WIDTH, (self.size >> (8 * level)) - index * WIDTH)
        content = (self._directory / tile_path(level, index, width)).read_bytes()
        if len(content) != width * HASH_BYTES:
            raise FormatError(f"tile {level}/{index} has {len(content)} bytes")
        return tuple(content[at : at + HASH_BYTES] for at in range(0, len(content), HASH_BYTES))

    def _load(self) -> _Edge:
        size = self.checkpoint.size
        edge = _Edge(size, [], [])
        try:
            level = 0
            while size >> (8 * level):
                count = size >> (8 * level)
                edge.levels.append(
                    list(self._read_tile(level, count // WIDTH)) if count % WIDTH else []
                )
                level += 1
            first = size - size % WIDTH
            edge.bundle = [
                struct.pack(">H", len(entry)) + entry for entry in self.entries(first, size)
            ]
            if [leaf_hash(entry[2:]) for entry in edge.bundle] != (
                edge.levels[0] if edge.levels else []
            ):
                raise FormatError("the last entry bundle and its tile differ")
        except (OSError, struct.error) as wrong:
            raise FormatError(f"the ledger's last tiles cannot be read: {wrong}") from wrong
        return edge

    def _sweep(self) -> None:
        """Remove what an append that was killed left beside, and beyond, the current partials."""
        current = {self._directory / name for name, _ in self._edge.partials()}
        left = set(self._directory.glob(".checkpoint.*"))
        levels = range(len(self._edge.levels) + 1)
        names: list[tuple[int | str, int]] = [("entries", 0)]
        names += [(level, level) for level in levels]
        for name, level in names:
            first = (self._edge.size >> (8 * level)) // WIDTH
            for index in (first, first + 1):
                full = self._directory / tile_path(name, index)
                left.add(full)
                left.update(full.parent.glob(".*"))
                left.update(full.with_name(f"{full.name}.p").glob("*"))
        for path in left - current:
            path.unlink(missing_ok=True)

    def _write(self, files: list[tuple[str, bytes]]) -> None:
        """Put tiles in place, durably; many at a time, so that the disk's journal is written once
        for all of them.
        """
        touched: set[Path] = set()
        for start in range(0, len(files), _AT_ONCE):
            scratches: list[tuple[int, Path, Path]] = []
            try:
                for name, content in files[start : start + _AT_ONCE]:
                    path = self._directory / name
                    self._make_parents(path, touched)
                    scratches.append((*_scratch(path, content, 0o644), path))
                for fd, _, _ in scratches:
                    os.fdatasync(fd)
                for _, scratch, path in scratches:
                    os.replace(scratch, path)
            except BaseException:
                for _, scratch, _ in scratches:
                    scratch.unlink(missing_ok=True)
                raise
            finally:
                for fd, _, _ in scratches:
                    os.close(fd)
        for directory in sorted(touched):
            sync_directory(directory)

    def _make_parents(self, path: Path, touched: set[Path]) -> None:
        if path.parent not in touched:
            for parent in reversed(path.relative_to(self._directory).parents):
                directory = self._directory / parent
                if not directory.is_dir():
                    directory.mkdir(mode=0o700)
                    touched.add(directory.parent)
            touched.add(path.parent)


def _split(count: int) -> int:
    """Return the largest power of two below `count`."""
    return 1 << ((count - 1).bit_length() - 1)
