"""Segment files: the header block and the commits that `segment` leaves seal."""

import struct
from dataclasses import dataclass
from hashlib import sha256

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from second_frames import runs_by_session
from second_keys import commitment, key_id, opened
from second_ledger import expect

BLOCK = 4096
FINAL = 1
COMMIT = struct.Struct("<4sIIIIIQQ16s8x")


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit: where it lay, its hash, and its frames as {session: [(start, bytes)]}.

    What cannot be opened any more is not in `runs`.
    """

    number: int
    flags: int
    offset: int
    block_length: int
    length: int
    position: int
    time: int
    tag: bytes
    digest: bytes
    runs: dict


@dataclass(frozen=True, slots=True)
class Header:
    """The facts of a segment's header; `key` is None when it was destroyed."""

    generation: int
    incarnation: int
    stream: str
    block: bytes
    key: bytes | None


def rounded(length):
    """Return a length rounded up to whole blocks."""
    return -(-length // BLOCK) * BLOCK


def header_of(block, appliance_key):
    """Return the Header of a segment's first 4096 bytes."""
    what = "segment header"
    magic, version, generation, incarnation, stream = struct.unpack_from("<8sIII16s", block)
    expect((magic, version) == (b"NARSEG01", 1), f"{what}: not a segment")
    expect(sha256(block[:168]).digest() == block[168:200], f"{what}: hash")
    expect(not any(block[200:]) and len(block) == BLOCK, f"{what}: not zero behind it")
    expect(block[68:76] == key_id(appliance_key), f"{what}: of another appliance key")
    key = opened(appliance_key, block[76:88], block[88:136], block[:76], what)
    expect(commitment(key) == block[136:168], f"{what}: key commitment")
    return Header(generation, incarnation, stream.rstrip(b"\0").decode("ascii"), block, key)


def nonce(generation, number):
    """Return the nonce of a commit."""
    return struct.pack("<IQ", generation, number)


def commit_header(generation, number, flags, length, position, time, previous):
    """Return the 64 bytes before a commit's ciphertext."""
    size = rounded(64 + length + 16)
    return COMMIT.pack(b"NCMT", generation, number, flags, length, size, position, time, previous)


def encrypted(header, commit, previous, plaintext):
    """Return the block range of a commit as it lay in the segment's file."""
    head = commit_header(
        header.generation, commit.number, commit.flags, len(plaintext), commit.position,
        commit.time, previous,
    )  # fmt: skip
    sealed = AESGCM(header.key).encrypt(nonce(header.generation, commit.number), plaintext, head)
    return (head + sealed).ljust(rounded(len(head + sealed)), b"\0")


def one_commit(header, data, offset, number, previous, *, damaged):
    """Return the Commit at an offset of a segment's bytes; a damaged one has no runs."""
    what = f"segment {header.generation:08x}, commit {number}"
    expect(len(data) >= offset + 64, f"{what}: missing")
    head = data[offset : offset + 64]
    magic, generation, own, flags, length, size, position, time, before = COMMIT.unpack(head)
    expect((magic, generation, own) == (b"NCMT", header.generation, number), f"{what}: header")
    expect(flags in (0, FINAL) and not any(head[56:]), f"{what}: flags")
    expect(before == previous, f"{what}: not chained to the commit before")
    block = data[offset : offset + size]
    expect(size == rounded(64 + length + 16) == len(block), f"{what}: length")
    expect(not any(block[80 + length :]), f"{what}: not zero behind it")
    sealed = block[64 : 80 + length]
    runs = {}
    if not damaged:
        plaintext = opened(header.key, nonce(generation, number), sealed, head, what)
        runs = runs_by_session(plaintext)
    return Commit(
        number, flags, offset, size, length, position, time, sealed[-16:],
        sha256(block).digest(), runs,
    )  # fmt: skip


def read_segment(path, count, end, appliance_key, damaged=()):
    """Return (Header, the first `count` commits) of a segment file, whose runs end at `end`.

    `damaged` are the offsets of commits that the log says were damaged before they were sealed.
    """
    with path.open("rb") as file:  # a running one is longer than its content
        data = file.read(end)
    header = header_of(data[:BLOCK], appliance_key)
    commits, offset, previous = [], BLOCK, bytes(16)
    for number in range(count):
        hurt = offset in damaged
        commits.append(one_commit(header, data, offset, number, previous, damaged=hurt))
        offset += commits[-1].block_length
        previous = commits[-1].tag
    return header, commits
