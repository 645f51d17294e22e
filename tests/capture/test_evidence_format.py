"""docs/evidence-format.md describes what is really written."""

import base64
import dataclasses
import json
import re
import struct
import typing
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from sealed_evidence import Evidence, evidence, whole_session

from capture import frames, leaves, pack, records, segfile
from capture.crypt import Keys
from capture.segfile import SegmentHeader
from capture.segments import open_segment
from capture.verify.leaf import FIELDS
from ebpf.cgroup_names import CgroupName
from ebpf.cgroups import Place
from ebpf.owners import Owner

PAGE = (Path(__file__).parents[2] / "docs" / "evidence-format.md").read_text(encoding="utf-8")
LEAVES = typing.get_args(leaves.Leaf)


def section(heading):
    """Return the text below a heading, up to the next one."""
    found = re.search(
        rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", PAGE, re.MULTILINE | re.DOTALL
    )
    assert found, f"there is no section {heading}"
    return found[1]


def documented(heading):
    """Return the names in the first column of a section's table."""
    rows = re.findall(r"^\| (`[^|]*`) \| [^|]+ \| .*\S \|$", section(heading), re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`(\w+)`", row)]


@pytest.mark.parametrize("kind", records.KINDS, ids=lambda kind: kind.__name__)
def test_every_record_is_documented_with_its_number_and_every_field(kind):
    heading = f"{kind.__name__} ({records.KINDS[kind]})"
    assert documented(heading) == [field.name for field in dataclasses.fields(kind)]


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_every_leaf_is_documented_with_every_field(kind):
    fields = {field.name: field.default for field in dataclasses.fields(kind)}
    names = [name for name in fields if name not in ("type", "v")]
    assert documented(f"`{fields['type']}`") == names


def test_no_record_or_leaf_is_documented_that_does_not_exist():
    headings = set(re.findall(r"^### (\w+) \((\d+)\)$", PAGE, re.MULTILINE))
    assert headings == {(kind.__name__, str(number)) for kind, number in records.KINDS.items()}
    assert set(re.findall(r"^### `(\w+)`$", PAGE, re.MULTILINE)) == FIELDS.keys()


def test_every_kind_of_frame_is_documented():
    table = dict(re.findall(r"^\| (\d+) (\w+) \|", section("Frame"), re.MULTILINE))
    assert table == {str(kind.value): kind.name for kind in frames.Kind}


def test_the_owner_is_documented_as_the_sensor_sends_it():
    place = Place(1, "/clients/backup", CgroupName())
    owner = Owner(
        handle=1, host="client", pid=2, started_ns=3, exe="/bin/a", argv=("a",), argv_cut=False,
        uid=0, gid=0, comm="a", place=place, parents=(), how="proc",
    )  # fmt: skip
    assert set(documented("Owner")) == json.loads(owner.encoded()).keys()


def sizes(heading):
    """Return {field: (offset, size)} of a byte table."""
    rows = re.findall(r"^\| (\d+) \| (\d+) \| ([^|:(\\]+)", section(heading), re.MULTILINE)
    return {name.strip(): (int(offset), int(size)) for offset, size, name in rows}


@pytest.fixture(scope="module")
def written():
    with evidence() as place:
        writer = place.writer()
        whole_session(writer)
        writer.close()
        (generation,) = place.store.generations()
        yield generation, place.store.segment(generation).read_bytes()


def test_the_header_block_lies_as_documented(written):
    generation, content = written
    table = sizes("Header block")

    def of(name):
        offset, size = next(where for what, where in table.items() if what.startswith(name))
        return content[offset : offset + size]

    assert of("`NARSEG01`") == b"NARSEG01"
    assert of("version") == struct.pack("<I", 1)
    assert of("generation") == struct.pack("<I", generation)
    assert of("stream").rstrip(b"\0") == b"gate-0"
    assert of("SHA-256 of bytes 0 to 167") == sha256(content[:168]).digest()
    assert not any(of("zeros"))
    ends = [offset + size for offset, size in table.values()]
    assert [offset for offset, _ in table.values()] == [0, *ends[:-1]]  # without holes
    assert ends[-1] == segfile.BLOCK


def test_a_commit_lies_as_documented(written):
    generation, content = written
    table = sizes("Commit")
    first = content[segfile.BLOCK :]
    assert first[:4] == b"NCMT"

    def number(name, at=first):
        offset, size = next(where for what, where in table.items() if what.startswith(name))
        return int.from_bytes(at[offset : offset + size], "little")

    plain, total = number("length of the plaintext"), number("length of the block range")
    assert number("generation") == generation
    assert number("number") == number("stream position") == number("GCM tag of the commit") == 0
    assert total == -(-(64 + plain + 16) // 4096) * 4096
    assert not any(first[64 + plain + 16 : total])
    second = first[total:]
    assert number("GCM tag of the commit", second) == int.from_bytes(
        first[64 + plain : 80 + plain], "little"
    )
    assert number("stream position", second) == plain
    assert sum(size for _, size in table.values()) == segfile.COMMIT_BYTES


# -- the sealed store: a reader that knows the document only


def example(name):
    """Return {offset: bytes} of a dump in the document as one string, and where it begins."""
    (block,) = re.findall(rf"^```{name}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    lines = [line.split("  ") for line in block.splitlines()]
    return int(lines[0][0], 16), bytes.fromhex("".join(text for _, text in lines))


def test_the_example_pack_opens_as_documented():
    _, made_pack = example("pack")
    _, keys = example("keys")
    start, segments = example("segments")
    wrapping = AESGCM(bytes(range(32)))
    generation, first, commits, parts = (
        struct.unpack_from("<I", made_pack, at)[0] for at in (76, 16, 20, 24)
    )
    salt, table = made_pack[32:64], 192 + commits * 88
    assert start == generation * 64
    assert base64.b64encode(sha256(made_pack[: table + parts * 64]).digest()).decode() in PAGE
    bodies = re.findall(r"^```part\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    plain = {}
    for line in range(parts):
        entry = struct.unpack_from("<QQIII4x32s", made_pack, table + line * 64)
        session, offset, length, size, method, digest = entry
        part = made_pack[offset : offset + length]
        assert (sha256(part).digest(), method) == (digest, 0)
        slot = keys[(session & (1 << 40) - 1) * 64 :][:64]
        context = b"narrows session key\0" + struct.pack("<IQ", 0x29, session)
        data_key = wrapping.decrypt(slot[:12], slot[12:60], context)
        info = b"narrows sealed part\0" + salt + struct.pack("<QII", session, generation, first)
        made = HKDFExpand(hashes.SHA256(), 64, info).derive(data_key)
        assert {data_key.hex(), made[:32].hex(), made[32:].hex()} <= set(
            re.findall("[0-9a-f]{64}", section("Example"))
        )
        assert part[:32] == made[32:]
        plain[session] = AESGCM(made[:32]).decrypt(struct.pack("<IQ", 1, 0), part[32:], None)
        assert len(plain[session]) == size
    texts = [b"".join(bytes.fromhex(row[6:]) for row in body.splitlines()) for body in bodies]
    assert texts == list(plain.values())
    assert b"hello" in plain[0x29 << 40 | 1]
    header = made_pack[64:140] + segments[:60] + made_pack[140:172]
    with_sum = header + sha256(header).digest()
    assert wrapping.decrypt(segments[:12], segments[12:60], made_pack[64:140])
    assert SegmentHeader.unpack(with_sum.ljust(4096, b"\0")).stream == "gate-7"


def test_the_example_pack_is_read_by_the_reader_too(tmp_path):
    place = Evidence(tmp_path / "state", tmp_path / "run")
    (tmp_path / "state" / "appliance.key").write_text(bytes(range(32)).hex() + "\n")
    place.store.pack(0x2A, 0).write_bytes(example("pack")[1])
    (place.store.keys / "00000029").write_bytes(example("keys")[1])
    start, slot = example("segments")
    (place.store.keys / "segments.0000").write_bytes(bytes(start) + slot)
    keys = Keys.load(place.state)
    with open_segment(place.store, 0x2A, keys) as segment:
        found = [
            bytes(frame[4])
            for commit in segment.commits()
            for frame in frames.walk(segment.plaintext(commit), 0x29)
        ]
    assert found == [b"hello", b"01234567", b'{"reason":"stopped"}']


@pytest.mark.parametrize(
    ("heading", "struct_size"),
    [("Pack header", pack.HEAD.size), ("Commit table", pack.ROW.size),
     ("Directory", pack.ENTRY.size)],
)  # fmt: skip
def test_the_tables_of_a_pack_have_no_holes(heading, struct_size):
    rows = re.findall(r"^\| (\d+) \| (\d+) \|", section(heading), re.MULTILINE)
    ends = [int(offset) + int(size) for offset, size in rows]
    assert [int(offset) for offset, _ in rows] == [0, *ends[:-1]]
    assert ends[-1] == struct_size
