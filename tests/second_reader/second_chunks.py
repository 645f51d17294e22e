"""Chunk files: the memory of a writer, with what it has not committed yet."""

import struct

from second_frames import frames
from second_ledger import expect

HEADER = struct.Struct("<8sQQQ32x")


def content(data, incarnation):
    """Return the frames, as bytes, of a chunk behind its header."""
    at = HEADER.size
    while at + 8 <= len(data):
        (word,) = struct.unpack_from("<Q", data, at)
        if word == 0 or word >> 32 != incarnation:
            break
        at += 32 + -(-(word & 0xFFFFFF) // 8) * 8
    return data[HEADER.size : at]


def uncommitted(folder, position):
    """Return the frames that a dead writer had in memory from a stream position on."""
    incarnation = int(folder.name, 16)
    pieces = []
    for path in folder.glob("*.chunk"):
        data = path.read_bytes()
        if data[:8] == b"NARCHUNK":
            _, owner, sequence, start = HEADER.unpack_from(data)
            expect(owner == incarnation, f"{path.name}: of another writer")
            pieces.append((sequence, start, content(data, incarnation)))
    found = []
    for _, start, data in sorted(pieces):
        if start + len(data) > position:
            expect(start <= position, f"memory of {folder.name}: a hole at {position}")
            found += frames(data[position - start :])
            position = start + len(data)
    return found
