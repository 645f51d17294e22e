"""The raw export: what each side sent, byte for byte, as files.

    ID.up        what the client sent
    ID.down      what the upstream sent
    ID.gate.up   the gate's own bytes that were sent to the upstream, when there are any
    ID.gate.down the gate's own bytes that were sent to the client, likewise

A byte stands at its place in the half-stream. Bytes that were hidden (credentials) are zero, and so
are bytes that are missing (not recorded, or damaged): both are returned as `Blank`, because zeros
may also have been sent. Nothing is buffered; a file appears under its name when it is whole.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from capture.frames import session_name
from capture.reader import Side

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

    from capture.index_query import Session
    from capture.reader import Reader

_FILES = {Side.UP: "up", Side.DOWN: "down", Side.UP_OWN: "gate.up", Side.DOWN_OWN: "gate.down"}
_ALWAYS = frozenset({Side.UP, Side.DOWN})
MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Blank:
    """`length` bytes at `offset` of a file that are zero, and why."""

    path: Path
    offset: int
    length: int
    why: str


def export(reader: Reader, session: Session, folder: Path) -> Iterator[Blank]:
    """Write the files of one session into `folder`, yielding what is blank in them."""
    totals = {Side.UP: session.bytes_up, Side.DOWN: session.bytes_down}
    for side in Side:
        yield from _write(reader, session.number, side, folder, totals.get(side, 0))


def _write(reader: Reader, session: int, side: Side, folder: Path, total: int) -> Iterator[Blank]:
    path = folder / f"{session_name(session)}.{_FILES[side]}"
    with whole_file(path) as file:
        end = yield from _fill(reader, session, side, path, total, file)
    if not end and side not in _ALWAYS:
        path.unlink()


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Give a file that only its owner can read and that appears as `path` when it is whole."""
    scratch = path.with_name(f".{path.name}.part")
    scratch.unlink(missing_ok=True)
    try:
        with open(scratch, "xb", opener=_owner_only) as file:
            yield file
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _fill(
    reader: Reader, session: int, side: Side, path: Path, total: int, file: BinaryIO
) -> Generator[Blank, None, int]:
    end = 0
    for piece in reader.stream(session, side):
        if piece.offset > end:
            yield Blank(path, end, piece.offset - end, MISSING)
        if piece.hidden:
            yield Blank(path, piece.offset, len(piece.data), piece.hidden)
        file.seek(piece.offset)
        file.write(piece.data)
        end = max(end, piece.offset + len(piece.data))
    if total > end:
        yield Blank(path, end, total - end, MISSING)
        end = total
    file.truncate(end)
    return end


def _owner_only(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
