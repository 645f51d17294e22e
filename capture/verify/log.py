"""Reads a log's files: the checkpoint, the tiles, and the entries, all against the signed root.

A log that is being written is read as of one checkpoint: its partial tiles, which the seal removes
later, are read first; everything else that the checkpoint names never changes.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from capture.verify.note import NoteError, Signed
from capture.verify.tree import TILE, Tiles, Tree, leaf, path

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from capture.verify.note import LogKey
    from capture.verify.report import Report

_TRIES = 50
_RECENT = 64


class Log:
    """The log in `directory` as of its present checkpoint."""

    def __init__(self, directory: Path, key: LogKey, report: Report) -> None:
        """Read the checkpoint and the partial tiles; what is wrong goes to `report`.

        NoteError when there is no checkpoint that `key` signed: then there is no log to check.
        """
        self._directory, self._report = directory, report
        self._edge: dict[str, bytes] = {}
        self._recent: dict[int, list[bytes]] = {}  #: entries of bundles that were asked for
        for attempt in range(_TRIES):
            note = (directory / "checkpoint").read_bytes()
            self.signed = Signed.read(note, key)
            missing = self._read_edge()
            if not missing:
                break
            if attempt == _TRIES - 1 or note == (directory / "checkpoint").read_bytes():
                for name in missing:
                    report.invalid("the tile is missing", file=name)
                break

    def leaves(self, kept: Sequence[Signed]) -> Iterator[tuple[int, bytes]]:
        """Yield (index, data) of every leaf; after the last one, report what is not as signed.

        `kept` are older checkpoints, whose roots must have been this tree's too.
        """
        tree, tiles = Tree(), Tiles()
        strange: list[str] = []
        size = self.signed.size
        sizes = {old.size for old in kept}
        whole = True
        for number in range((size + TILE - 1) // TILE):
            width = min(TILE, size - number * TILE)
            name = path("entries", number, width)
            entries = self._bundle(name, width)
            if entries is None:
                whole = False
                break
            for within, entry in enumerate(entries):
                hashed = leaf(entry)
                tree.add(hashed)
                strange += [t for t, content in tiles.add(hashed) if self._file(t) != content]
                if tree.size in sizes:
                    self._compare(tree, kept)
                yield number * TILE + within, entry
        if whole:
            strange += [t for t, content in tiles.rest() if self._file(t) != content]
            self._judge(tree.root() == self.signed.root, strange)

    def entry(self, index: int) -> bytes:
        """Return one leaf's data again; OSError or ValueError when it cannot be read."""
        number, within = divmod(index, TILE)
        if number not in self._recent:
            width = min(TILE, self.signed.size - number * TILE)
            content = self._file(path("entries", number, width))
            if content is None:
                raise ValueError("the entries are missing")
            if len(self._recent) >= _RECENT:
                del self._recent[next(iter(self._recent))]
            self._recent[number] = _split(content, width)
        return self._recent[number][within]

    def _compare(self, tree: Tree, kept: Sequence[Signed]) -> None:
        for old in kept:
            if old.size == tree.size and old.root != tree.root():
                self._report.invalid(
                    f"the log does not continue the kept checkpoint of {old.size} leaves",
                    file="checkpoint",
                )

    def _read_edge(self) -> list[str]:
        """Read the partial tiles of the checkpoint; return those that are missing."""
        self._edge, missing = {}, []
        size = self.signed.size
        names = [path("entries", size // TILE, size % TILE)] if size % TILE else []
        level = 0
        while size:
            if size % TILE:
                names.append(path(level, size // TILE, size % TILE))
            size //= TILE
            level += 1
        for name in names:
            try:
                self._edge[name] = (self._directory / name).read_bytes()
            except OSError:
                missing.append(name)
        return missing

    def _file(self, name: str) -> bytes | None:
        if name in self._edge:
            return self._edge[name]
        try:
            return (self._directory / name).read_bytes()
        except OSError:
            return None

    def _bundle(self, name: str, width: int) -> list[bytes] | None:
        content = self._file(name)
        if content is None:
            self._report.invalid("the entries are missing; later leaves are not checked", file=name)
            return None
        try:
            return _split(content, width)
        except ValueError as wrong:
            self._report.invalid(f"{wrong}; later leaves are not checked", file=name)
            return None

    def _judge(self, authentic: bool, strange: list[str]) -> None:  # noqa: FBT001 - private
        """Report tiles, or leaves, that are not as signed: the signature says which are."""
        if authentic:
            for name in strange:
                self._report.invalid("the tile is not of the signed tree", file=name)
            return
        tree, changed = Tree(), []
        for number in range((self.signed.size + TILE - 1) // TILE):
            width = min(TILE, self.signed.size - number * TILE)
            hashes = self._file(path(0, number, width)) or b""
            entries = _split(self._file(path("entries", number, width)) or b"", width)
            for within, entry in enumerate(entries):
                signed = hashes[within * 32 : within * 32 + 32]
                tree.add(signed)
                if leaf(entry) != signed:
                    changed.append(number * TILE + within)
        if tree.root() != self.signed.root:
            self._report.invalid("the tree is not the signed one", file="checkpoint")
        for index in changed:
            name = path(
                "entries", index // TILE, min(TILE, self.signed.size - index // TILE * TILE)
            )
            self._report.invalid("the leaf is not as signed", leaf=index, file=name)


def read_kept(file: Path, key: LogKey) -> Signed:
    """Return the checkpoint that an auditor kept; NoteError when it is none of this log."""
    try:
        return Signed.read(file.read_bytes(), key)
    except OSError as wrong:
        raise NoteError(f"{file}: {wrong.strerror}") from wrong


def _split(content: bytes, width: int) -> list[bytes]:
    """Return the entries of a bundle; ValueError when it is not `width` entries exactly."""
    found, at = [], 0
    for _ in range(width):
        if at + 2 > len(content):
            raise ValueError("the entries are cut off")
        (length,) = struct.unpack_from(">H", content, at)
        at += 2
        if at + length > len(content):
            raise ValueError("the entries are cut off")
        found.append(content[at : at + length])
        at += length
    if at != len(content):
        raise ValueError("there are bytes after the last entry")
    return found
