"""The layout of segments and chunks, byte by byte, against code that shares nothing with the
writer.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import struct
import zlib

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from written_evidence import TINY, place

from capture.chunk import Remains
from capture.crypt import KeyFileError, Keys, Secret
from capture.errors import EvidenceError, FormatError
from capture.frames import session_name, session_number, walk
from capture.tail import SegmentReader

WRAPPING, DIGEST = bytes(range(32)), bytes(range(32, 64))

#: A segment that was written once and for all: generation 0x2a of incarnation 0x29, stream
#: "gate-7", two commits and the final one. What this does not read, an archive is lost to.
GOLDEN = (
    "eNrzcwwKdnU3MGRkYGDQAmJNIE5PLEnVNWeAA9Gzrbb/5kwXZ2AQgAgwMjGzsLKxc3BycfPw8vELii97"
    "cPWc0MryX3c0Vp9NPff+ratQz6ualRJLPZxkWYKNF93+VOTYsubH481p7R8SW25lqoRZx87e2FJzeU6b"
    "76Euz39vf73MYVqz4/kaX7VaIx1NttdB0h9Znq7YxGtZNNn7jKLd0zW653Q6rxxZK/ha60fcvo9J4rcV"
    "XScc1jbv2KKqadzEtsr2AsMoGAWjYBSMglEwCkbBKBgFo2AUjIJRMApwAj9n3xAtJH4AiBBA8NPa980q"
    "tXktgUt/gn51jF/Lp+S8FUcrSzlZY3e5pURuKLcVX8TDdGTF2b/r5wlPj9ob+lDR6kCH3naz3Bb2Jy8+"
    "96rvn568yKWz2MOvvl7goBdvDn/Gw+/hztdFlvInJboXPLruO++1w2Lt+2sT3UZjaBSMglEwCkbBKBgF"
    "o2AUjIJRMApGwSigXv+fEcq3gPb/A6D8Z/kHwP1/XP3yOo3aT24BfyayeKo4sb299Dt4u8Hm51fPpMl9"
    "ePh8o8ziihl/5v2QnnWnL5yzW0Lr8cWfna5J2w9q8r8W7jX4czVqh5e+0YGAFUdPiI3GxCgYBaNgFIyC"
    "UTAKRsEoGAWjYBSMglFA+/4/E9IYAKj/3wFlXu09CO7/4+qv6y7xFn5Z+tP91BfDTPNHweGjIToKRsEo"
    "GAWjYBSMglEwCkbBKBgFo2AUDD4AACXPyTY="
)
FRAMES = [
    (1, 0x29 << 40 | 1, 5, 0, b"hello"),
    (2, 0x29 << 40 | 1, 6, 0, b"01234567"),
    (32, 0, 7, 0, b'{"reason":"stopped"}'),
]


@pytest.fixture
def golden(tmp_path):
    path = tmp_path / "0000002a.seg"
    path.write_bytes(zlib.decompress(base64.b64decode(GOLDEN)))
    return path


def keys() -> Keys:
    return Keys(Secret(WRAPPING), Secret(DIGEST))


def test_a_segment_of_old_is_read_as_it_was_written(golden):
    with SegmentReader(golden, keys()) as reader:
        header = reader.header
        assert (header.generation, header.incarnation, header.stream) == (0x2A, 0x29, "gate-7")
        assert header.created_ns == 1_700_000_000_123_456_789
        assert (header.capacity, header.boot) == (1 << 20, bytes(range(16)))
        found = []
        for commit in reader.commits():
            frames = walk(reader.plaintext(commit), 0x29)
            found += [(*frame[:4], bytes(frame[4])) for frame in frames]
        assert found == FRAMES
        assert [c.final for c in reader.commits()] == [False, False, True]
        assert [c.base for c in reader.commits()] == [0, 80, 136]


def open_by_hand(raw: bytes, wrapping: bytes) -> list[tuple[int, bytes]]:
    """Return (base, plaintext) of each commit, from the format's description alone."""
    magic, version, generation, _incarnation = struct.unpack_from("<8sIII", raw)
    assert (magic, version) == (b"NARSEG01", 1)
    fixed, at = raw[:76], 76
    nonce, sealed, committed = raw[at : at + 12], raw[at + 12 : at + 60], raw[at + 60 : at + 92]
    assert hashlib.sha256(raw[: at + 92]).digest() == raw[at + 92 : at + 124]
    assert raw[at + 124 : 4096] == bytes(4096 - at - 124)
    assert raw[68:76] == hashlib.sha256(b"narrows key id\0" + wrapping).digest()[:8]
    key = AESGCM(wrapping).decrypt(nonce, sealed, fixed)
    assert hashlib.sha256(b"narrows key commitment\0" + key).digest() == committed
    offset, number, tag, found = 4096, 0, bytes(16), []
    while offset < len(raw):
        head = raw[offset : offset + 64]
        name, owner, count, flags, plain, total = struct.unpack_from("<4s5I", head)
        base, _time, previous, zero = struct.unpack_from("<QQ16sQ", head, 24)
        assert (name, owner, count, previous, zero) == (b"NCMT", generation, number, tag, 0)
        body = raw[offset + 64 : offset + 64 + plain + 16]
        plaintext = AESGCM(key).decrypt(struct.pack("<IQ", generation, number), body, head)
        assert total % 4096 == 0
        assert raw[offset + 64 + plain + 16 : offset + total] == bytes(total - plain - 80)
        tag, number, offset = body[-16:], number + 1, offset + total
        found.append((base, plaintext))
        assert bool(flags & 1) == (offset == len(raw))
    return found


def test_a_fresh_segment_is_what_the_format_says():
    with place() as where:
        writer = where.writer(TINY)
        writer.append(1, 7, b"x" * 50_000, 3, 11)
        writer.wait_durable()
        writer.append(4, 8, b"", 4)
        writer.close()
        wrapping = bytes.fromhex((where.store.state / "appliance.key").read_text())
        (generation,) = where.store.generations()
        commits = open_by_hand(where.store.segment(generation).read_bytes(), wrapping)
    position = 0
    for base, plaintext in commits:
        assert base == position
        position += len(plaintext)
    stream = b"".join(plaintext for _, plaintext in commits)
    at, found = 0, []
    while at < len(stream):
        word, session, time_ns, offset = struct.unpack_from("<4Q", stream, at)
        length = word & 0xFFFFFF
        assert word >> 32 == writer.incarnation
        found.append((word >> 24 & 0xFF, session, time_ns, offset, length))
        assert stream[at + 32 + length : at + 32 + (length + 7 & ~7)] == bytes(-length % 8)
        at += 32 + (length + 7 & ~7)
    assert found[1:3] == [(1, 7, 3, 11, 50_000), (4, 8, 4, 0, 0)]
    assert [kind for kind, *_ in found] == [31, 1, 4, 32]


@pytest.mark.parametrize("at", [8, 12, 30, 60, 76, 100, 150, 190])
def test_any_change_of_a_header_is_found(golden, at):
    raw = bytearray(golden.read_bytes())
    raw[at] ^= 1
    golden.write_bytes(raw)
    with pytest.raises(FormatError):
        SegmentReader(golden, keys())


@pytest.mark.parametrize("at", [4096 + 20, 4096 + 24, 4096 + 40, 4096 + 64, 4096 + 64 + 80])
def test_any_change_of_a_commit_is_found(golden, at):
    raw = bytearray(golden.read_bytes())
    raw[at] ^= 1
    golden.write_bytes(raw)
    with SegmentReader(golden, keys()) as reader:
        commit = reader.commit_at(4096)
        if commit is not None:
            with pytest.raises(FormatError):
                reader.plaintext(commit)


def test_another_key_opens_nothing(golden):
    with pytest.raises(EvidenceError):
        SegmentReader(golden, Keys(Secret(bytes(32)), Secret(DIGEST)))


def frame(word: int, payload: bytes = b"") -> bytes:
    return struct.pack("<4Q", word, 1, 2, 3) + payload + bytes(-len(payload) % 8)


def chunk(*frames: bytes, base: int = 96, incarnation: int = 9) -> bytes:
    head = struct.pack("<8sQQQ", b"NARCHUNK", incarnation, 4, base).ljust(64, b"\0")
    return (head + b"".join(frames)).ljust(4096, b"\0")


WHOLE = frame(9 << 32 | 1 << 24 | 5, b"hello")


@pytest.mark.parametrize(
    "torn",
    [
        frame(0, b"its length word was never stored"),
        frame(8 << 32 | 1 << 24 | 4, b"left by an earlier incarnation"),
        frame(9 << 32 | 1 << 24 | 5000, b"runs over the end"),
    ],
)
def test_a_torn_or_stale_frame_ends_what_a_dead_writer_left(tmp_path, torn):
    (tmp_path / "00.chunk").write_bytes(chunk(WHOLE, WHOLE, torn, WHOLE))
    remains = Remains.read(tmp_path / "00.chunk", 9)
    assert (remains.base, remains.plaintext, remains.end) == (96, WHOLE * 2, 96 + 80)
    assert [(base, bytes(piece), count) for base, piece, count in remains.pieces(0)] == [
        (96, WHOLE * 2, 2)
    ]
    assert [(base, bytes(piece), count) for base, piece, count in remains.pieces(136)] == [
        (136, WHOLE, 1)
    ]
    assert list(remains.pieces(176)) == []


@pytest.mark.parametrize("content", [b"", bytes(4096), b"junk" * 1024, chunk(WHOLE, incarnation=8)])
def test_a_file_that_is_no_chunk_of_the_dead_is_passed_over(tmp_path, content):
    (tmp_path / "00.chunk").write_bytes(content)
    assert Remains.read(tmp_path / "00.chunk", 9) is None


def test_a_session_has_one_printed_name():
    for number in (0, 1, 0x29 << 40 | 77, (1 << 64) - 1):
        name = session_name(number)
        assert len(name) == 13
        assert session_number(name) == session_number(name.upper()) == number
    for wrong in ("", "0" * 12, "u" * 13, "z" * 13):
        with pytest.raises(ValueError):
            session_number(wrong)


def test_the_digest_of_hidden_bytes_is_keyed():
    whole = hmac.new(DIGEST, b"secret", hashlib.sha256).hexdigest()
    assert keys().digest(b"secret") == whole[:32]


def test_equal_hidden_bytes_have_equal_digests_nowhere_else():
    key = hashlib.sha256(b"narrows hidden bytes\0" + DIGEST).digest()
    message = struct.pack("<QQ", 7, 40) + b"client\0" + b"password"
    here = keys().hidden(7, "client", 40, b"password")
    assert here == hmac.new(key, message, hashlib.sha256).hexdigest()[:32]
    elsewhere = [(8, "client", 40), (7, "upstream", 40), (7, "client", 41)]
    found = {keys().hidden(*place, b"password") for place in elsewhere}
    assert len(found | {here, keys().digest(b"password"), keys().digest(message)}) == 6


def test_a_few_hidden_bytes_have_no_digest():
    assert keys().hidden(7, "client", 40, b"secrets") == ""


def test_a_key_file_that_others_may_read_is_refused(tmp_path):
    first = Keys.load_or_create(tmp_path)
    assert Keys.load(tmp_path).key_id == first.key_id == Keys.load_or_create(tmp_path).key_id
    (tmp_path / "appliance.key").chmod(0o640)
    with pytest.raises(KeyFileError, match="may be read by others"):
        Keys.load(tmp_path)


@pytest.mark.parametrize("content", ["", "xyz", "00" * 31, "00" * 33])
def test_a_key_file_with_anything_else_is_refused(tmp_path, content):
    Keys.load_or_create(tmp_path)
    (tmp_path / "digest.key").write_text(content)
    with pytest.raises(KeyFileError) as refused:
        Keys.load(tmp_path)
    assert content not in str(refused.value) or not content


def test_a_key_file_of_another_user_is_refused(tmp_path):
    Keys.load_or_create(tmp_path)
    os.chown(tmp_path / "digest.key", 65534, 65534)
    with pytest.raises(KeyFileError, match="belongs to another user"):
        Keys.load(tmp_path)


def test_no_key_is_shown(tmp_path):
    assert WRAPPING.hex() not in repr(keys()) + repr(Secret(WRAPPING)) + str(Secret(WRAPPING))
