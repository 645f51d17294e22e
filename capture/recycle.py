"""Lets the file of a segment go whose commits are all in packs, with its key and its space.

`capture.sealed` calls it once the packs' leaves are signed. Each step may be the last one before a
kill: the wrapped key is kept first, then the file loses its name, then its header, then its space;
`sweep` does what was left over.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING

from capture.segfile import BLOCK, SegmentHeader
from capture.store import sync_directory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from capture.keystore import KeyStore
    from capture.store import Store


def recycle(store: Store, keystore: KeyStore, generation: int) -> bool:
    """Let a segment's file go; False while a verifier reads, which holds the directory's lock."""
    with _alone(store.segments) as alone:
        if not alone:
            return False
        path = store.segment(generation)
        with contextlib.suppress(FileNotFoundError):
            with path.open("rb") as file:
                _, wrapped, _ = SegmentHeader.parts(file.read(BLOCK))
            keystore.keep_segment(generation, wrapped)
            gone = path.with_suffix(".gone")
            path.rename(gone)  # who opens it from now on finds the packs
            _destroy(gone)
            sync_directory(store.segments)
    return True


def sweep(store: Store) -> None:
    """Finish what a killed seal left: files without their name, and packs without theirs."""
    for path in store.segments.glob("*.gone"):
        _destroy(path)
    for path in store.sealed.glob("*.new"):
        path.unlink(missing_ok=True)


def _destroy(path: Path) -> None:
    """Overwrite the header, which holds the data key, and remove the file."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(fd, bytes(BLOCK), 0)
        os.fsync(fd)
    finally:
        os.close(fd)
    path.unlink()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)
