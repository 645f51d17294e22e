"""Packs of the sealed store: the commits of a segment, put together from its sessions' parts."""

import base64
import struct
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise

import zstandard
from second_keys import opened, part_keys
from second_ledger import expect
from second_segments import BLOCK, Commit, Header, encrypted, header_of

HEAD, LINE, ENTRY = 192, 88, 64
CHUNK = 16384 + 16
LAST = 1


@dataclass(frozen=True, slots=True)
class Pack:
    """A pack whose bytes are those of its leaf; `parts` are the directory's lines."""

    name: str
    last: bool
    first: int
    salt: bytes
    header: bytes
    table: list
    parts: list
    data: bytes


def parse(data, name):
    """Return the Pack that the bytes of a file are, with every part's hash checked."""
    magic, version, flags, first, lines, sessions = struct.unpack_from("<8s5I", data)
    expect((magic, version) == (b"NARPACK1", 1) and flags in (0, LAST), f"{name}: not a pack")
    table = [
        struct.unpack_from("<QIIQQI4x16s32s", data, HEAD + LINE * line) for line in range(lines)
    ]
    start = HEAD + LINE * lines
    parts = [
        struct.unpack_from("<QQIII4x32s", data, start + ENTRY * line) for line in range(sessions)
    ]
    at = start + ENTRY * sessions
    for _, place, length, _, _, digest in parts:
        expect(place == at, f"{name}: a hole between parts")
        at += length
        expect(sha256(data[place:at]).digest() == digest, f"{name}: a part's hash")
    expect(at == len(data), f"{name}: length")
    ascending = all(one[0] < two[0] for one, two in pairwise(parts))
    expect(ascending, f"{name}: the directory's order")
    return Pack(name, flags == LAST, first, data[32:64], data[64:172], table, parts, data)


def check_leaf(pack, leaf):
    """Compare a pack with its leaf."""
    head = HEAD + LINE * len(pack.table) + ENTRY * len(pack.parts)
    digest = base64.b64encode(sha256(pack.data[:head]).digest()).decode()
    found = (digest, len(pack.data), len(pack.table), len(pack.parts), pack.first, pack.last)
    wanted = tuple(leaf[k] for k in ("digest", "size", "commits", "parts", "first", "last"))
    expect(found == wanted, f"{pack.name}: not what its leaf says")


def part_plaintext(pack, entry, generation, data_key):
    """Return the plaintext of a part."""
    session, place, length, plain, method, _ = entry
    what = f"{pack.name}, session {session:016x}"
    key, committed = part_keys(data_key, pack.salt, session, generation, pack.first)
    part = pack.data[place : place + length]
    expect(part[:32] == committed, f"{what}: key commitment")
    chunks = [part[at : at + CHUNK] for at in range(32, length, CHUNK)]
    body = b"".join(
        opened(key, struct.pack("<IQ", number == len(chunks) - 1, number), chunk, None, what)
        for number, chunk in enumerate(chunks)
    )
    expect(method in (0, 1), f"{what}: method")
    if method == 1:
        body = zstandard.ZstdDecompressor().decompress(body, max_output_size=plain)
    expect(len(body) == plain, f"{what}: length")
    return body


def runs_of(plaintext):
    """Yield (commit, start, bytes) of the runs of a part's plaintext."""
    (count,) = struct.unpack_from("<I", plaintext)
    at = 4 + 12 * count
    for line in range(count):
        commit, start, end = struct.unpack_from("<3I", plaintext, 4 + 12 * line)
        yield commit, start, plaintext[at : at + end - start]
        at += end - start
    expect(at == len(plaintext), "part: length of its runs")


def segment_header(pack, keys):
    """Return the Header of the segment that a pack was made of."""
    _, _, generation, incarnation, stream = struct.unpack_from("<8sIII16s", pack.header)
    wrapped = keys.segment_wrapped(generation)
    if wrapped is None:
        return Header(generation, incarnation, stream.rstrip(b"\0").decode(), b"", None)
    facts = pack.header[:76] + wrapped + pack.header[76:]
    block = (facts + sha256(facts).digest()).ljust(BLOCK, b"\0")
    return header_of(block, keys.appliance_key)


def commits_of(pack, header, keys):
    """Return the Commits of a pack; the runs whose key was destroyed are missing."""
    runs = {pack.first + line: {} for line in range(len(pack.table))}
    for entry in pack.parts:
        data_key = keys.session_key(entry[0], header.incarnation)
        if data_key is not None:
            plaintext = part_plaintext(pack, entry, header.generation, data_key)
            for commit, start, data in runs_of(plaintext):
                expect(commit in runs, f"{pack.name}: a run of another pack")
                runs[commit].setdefault(entry[0], []).append((start, data))
    return [
        Commit(number, flags, offset, size, length, position, time, tag, digest, runs[number])
        for number, (offset, size, length, position, time, flags, tag, digest) in enumerate(
            pack.table, pack.first
        )
    ]


def check_content(header, commits):
    """Put every commit together, encrypt it again and compare it with the sealed hash."""
    previous = bytes(16)
    for commit in commits:
        pieces = sorted(run for runs in commit.runs.values() for run in runs)
        plaintext = b"".join(data for _, data in pieces)
        what = f"segment {header.generation:08x}, commit {commit.number} of its packs"
        at = 0
        for start, data in pieces:
            expect(start == at, f"{what}: a hole between runs")
            at += len(data)
        expect(len(plaintext) == commit.length, f"{what}: length")
        block = encrypted(header, commit, previous, plaintext)
        expect(sha256(block).digest() == commit.digest, f"{what}: other content")
        previous = commit.tag


def read_packs(folder, leaves, keys):
    """Return (Header, commits) of a segment from the packs that its `pack` leaves name."""
    commits, header, last = [], None, False
    for leaf in leaves:
        name = f"{leaf['generation']:08x}.{leaf['first']:08x}.pack"
        expect((folder / name).is_file(), f"{name}: missing")
        expect(not last and leaf["first"] == len(commits), f"{name}: not the next one")
        pack = parse((folder / name).read_bytes(), name)
        check_leaf(pack, leaf)
        header = segment_header(pack, keys)
        commits += commits_of(pack, header, keys)
        last = pack.last
    expect(last, f"segment {leaves[0]['generation']:08x}: its last pack is missing")
    if header.key is not None:
        check_content(header, commits)
    return header, commits
