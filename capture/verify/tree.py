"""Grows the tree of RFC 6962 from leaves, and says which tiles (C2SP tlog-tiles) it must have."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

TILE = 256


def leaf(data: bytes) -> bytes:
    """Return a leaf's hash."""
    return sha256(b"\x00" + data).digest()


def node(left: bytes, right: bytes) -> bytes:
    """Return an inner node's hash."""
    return sha256(b"\x01" + left + right).digest()


class Tree:
    """A tree that grows; keeps the roots of its perfect subtrees only."""

    def __init__(self) -> None:
        self.size = 0
        self._roots: list[tuple[int, bytes]] = []  #: (leaves, root), largest first

    def add(self, hashed: bytes) -> None:
        """Add a leaf by its hash."""
        self.size += 1
        roots = self._roots
        count = 1
        while roots and roots[-1][0] == count:
            hashed = node(roots.pop()[1], hashed)
            count *= 2
        roots.append((count, hashed))

    def root(self) -> bytes:
        """Return the root, SHA-256 of nothing for an empty tree."""
        if not self._roots:
            return sha256(b"").digest()
        hashed = self._roots[-1][1]
        for _, left in reversed(self._roots[:-1]):
            hashed = node(left, hashed)
        return hashed


def root_of(leaves: Iterable[bytes]) -> bytes:
    """Return the root over leaf data."""
    tree = Tree()
    for data in leaves:
        tree.add(leaf(data))
    return tree.root()


class Tiles:
    """Gives the tiles of a growing tree as they fill."""

    def __init__(self) -> None:
        self._levels: list[list[bytes]] = []
        self._counts: list[int] = []

    def add(self, hashed: bytes) -> Iterator[tuple[str, bytes]]:
        """Add a leaf by its hash; yield (path, content) of each tile that it fills."""
        level = 0
        while True:
            if level == len(self._levels):
                self._levels.append([])
                self._counts.append(0)
            row = self._levels[level]
            row.append(hashed)
            if len(row) < TILE:
                return
            yield path(level, self._counts[level]), b"".join(row)
            self._counts[level] += 1
            while len(row) > 1:
                row = [node(row[at], row[at + 1]) for at in range(0, len(row), 2)]
            hashed = row[0]
            self._levels[level] = []
            level += 1

    def rest(self) -> Iterator[tuple[str, bytes]]:
        """Yield (path, content) of the tiles that are not full."""
        for level, row in enumerate(self._levels):
            if row:
                yield path(level, self._counts[level], len(row)), b"".join(row)


def path(level: int | str, number: int, width: int = TILE) -> str:
    """Return a tile's path below the log's directory; `level` "entries" for an entry bundle."""
    text = f"{number:03d}"
    if len(text) % 3:
        text = text.rjust(len(text) + 3 - len(text) % 3, "0")
    groups = [text[at : at + 3] for at in range(0, len(text), 3)]
    name = "/".join([f"x{group}" for group in groups[:-1]] + groups[-1:])
    return f"tile/{level}/{name}" + ("" if width == TILE else f".p/{width}")
