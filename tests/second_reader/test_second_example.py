"""The second reader on the worked example of docs/evidence-format.md."""

import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

import pytest
from second_frames import DOWN, UP, frames, printed
from second_keys import KeySlots, part_keys
from second_ledger import Broken
from second_packs import check_content, check_leaf, commits_of, parse, part_plaintext
from second_packs import segment_header as header_of_pack
from second_segments import FINAL

DOCUMENT = (Path(__file__).parents[2] / "docs" / "evidence-format.md").read_text("utf-8")
SESSION = 0x0000290000000001


def dumps(word):
    """The dumps in the document's code blocks of a name: [(first address, bytes)]."""
    found = []
    for block in re.findall(rf"^```{word}\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL):
        lines = [line.split() for line in block.splitlines()]
        found.append((int(lines[0][0], 16), bytes.fromhex("".join(line[1] for line in lines))))
    return found


@pytest.fixture
def keys(tmp_path):
    [(_, sessions)] = dumps("keys")
    [(at, segments)] = dumps("segments")
    (tmp_path / "00000029").write_bytes(sessions)
    (tmp_path / "segments.0000").write_bytes(bytes(at) + segments)
    return KeySlots(tmp_path, bytes(range(32)))


@pytest.fixture
def pack():
    [(_, data)] = dumps("pack")
    return parse(data, "0000002a.00000000.pack")


def test_the_pack_has_what_the_document_says_of_it(pack):
    assert (pack.first, pack.last, len(pack.table)) == (0, True, 3)
    assert [(entry[0], entry[1]) for entry in pack.parts] == [(0, 0x248), (SESSION, 0x2C0)]
    head = b64encode(sha256(pack.data[:0x248]).digest()).decode()
    assert f"`{head}`" in DOCUMENT
    leaf = {
        "digest": head, "size": len(pack.data), "commits": 3, "parts": 2, "first": 0, "last": True,
    }  # fmt: skip
    check_leaf(pack, leaf)
    with pytest.raises(Broken):
        check_leaf(pack, leaf | {"size": len(pack.data) + 1})


def test_the_keys_are_those_that_the_document_prints(pack, keys):
    for session in (0, SESSION):
        data_key = keys.session_key(session, 0x29)
        for value in (data_key, *part_keys(data_key, pack.salt, session, 0x2A, 0)):
            assert f"`{value.hex()}`" in DOCUMENT


def test_the_parts_have_the_plaintexts_that_the_document_prints(pack, keys):
    plaintexts = [
        part_plaintext(pack, entry, 0x2A, keys.session_key(entry[0], 0x29)) for entry in pack.parts
    ]
    assert plaintexts == [data for _, data in dumps("part")]


def test_the_commits_are_the_sealed_ones_when_they_are_put_together(pack, keys):
    header = header_of_pack(pack, keys)
    assert (header.generation, header.incarnation, header.stream) == (0x2A, 0x29, "gate-7")
    commits = commits_of(pack, header, keys)
    check_content(header, commits)
    assert [commit.flags for commit in commits] == [0, 0, FINAL]
    [(start, data)] = commits[0].runs[SESSION]
    said = [(frame.kind, frame.payload) for frame in frames(data, start)]
    assert said == [(UP, b"hello"), (DOWN, b"01234567")]
    [(start, data)] = commits[1].runs[0]
    [stop] = frames(data, start)
    assert (stop.kind, stop.record) == (32, {"reason": "stopped"})


@pytest.mark.parametrize("at", [0x248, 0x270, 0x2C0, 0x34F])
def test_a_flipped_bit_of_the_example_is_noticed(pack, at):
    data = bytearray(pack.data)
    data[at] ^= 1
    with pytest.raises(Broken):
        parse(bytes(data), pack.name)


def test_a_session_is_printed_as_thirteen_letters():
    assert printed((1 << 64) - 1) == "fzzzzzzzzzzzz"
    assert printed(33) == "0000000000011"
