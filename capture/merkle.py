"""RFC 6962 hashing, and where C2SP tlog-tiles puts hashes and entries. Pure.

The ledger, the sub-roots of sessions and the roots of `segment` leaves use it.
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH = 256
HASH_BYTES = 32
EMPTY = sha256(b"").digest()


def leaf_hash(data: bytes) -> bytes:
    """Return the hash of a leaf."""
    return sha256(b"\0" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the hash of an inner node."""
    return sha256(b"\1" + left + right).digest()


def root_of(hashes: Sequence[bytes]) -> bytes:
    """Return the root over leaf hashes; SHA-256 of nothing when there are none.

    An odd last node goes up unchanged, which gives the tree of RFC 6962. The last element may stand
    for a smaller subtree than the others.
    """
    level = list(hashes)
    if not level:
        return EMPTY
    while len(level) > 1:
        odd = level[-1:] if len(level) & 1 else []
        level = [
            sha256(b"\1" + level[i] + level[i + 1]).digest() for i in range(0, len(level) - 1, 2)
        ] + odd
    return level[0]


class Frontier:
    """The right edge of a growing tree: enough to add leaves and to tell the root, in log2(n)
    hashes.
    """

    __slots__ = ("hashes", "size")

    def __init__(self, size: int = 0, hashes: Sequence[bytes] = ()) -> None:
        self.size = size
        self.hashes = list(hashes)  #: roots of the complete subtrees, largest first

    def add(self, leaf: bytes) -> None:
        """Add a leaf by its hash."""
        count = self.size
        hashes = self.hashes
        while count & 1:
            leaf = sha256(b"\1" + hashes.pop() + leaf).digest()
            count >>= 1
        hashes.append(leaf)
        self.size += 1

    def root(self) -> bytes:
        """Return the root over all leaves so far."""
        if not self.hashes:
            return EMPTY
        root = self.hashes[-1]
        for left in self.hashes[-2::-1]:
            root = node_hash(left, root)
        return root


def tile_path(level: int | str, index: int, width: int = WIDTH) -> str:
    """Return the path of a tile ("entries" for an entry bundle) relative to the log, partial when
    narrower than 256.
    """
    parts = [f"{index % 1000:03d}"]
    index //= 1000
    while index:
        parts.append(f"x{index % 1000:03d}")
        index //= 1000
    path = f"tile/{level}/{'/'.join(reversed(parts))}"
    return path if width == WIDTH else f"{path}.p/{width}"
