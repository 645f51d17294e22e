import random

import pytest
from review_evidence import Evidence
from test_index import SMALL_SEGMENTS

from capture import index_query as query
from capture.export import raw
from capture.frames import Kind, session_name
from capture.reader import Reader
from capture.records import Hidden, SessionClose


@pytest.fixture
def evidence(tmp_path):
    return Evidence(tmp_path)


def exported(evidence, session, folder):
    """Export one session; returns (blanks by file name, files by name)."""
    folder.mkdir(exist_ok=True)
    with evidence.index() as index:
        reader = Reader(evidence.store, evidence.keys, index)
        blanks = [
            (blank.path.name, blank.offset, blank.length, blank.why)
            for blank in raw.export(reader, query.session(index, session), folder)
        ]
        assert not reader.damage
        reader.close()
    name = session_name(session)
    files = {
        path.name.removeprefix(name + "."): path.read_bytes() for path in sorted(folder.iterdir())
    }
    return [(file.removeprefix(name + "."), *rest) for file, *rest in blanks], files


def test_what_each_side_sent_comes_out_byte_for_byte(evidence, tmp_path):
    chance = random.Random(1)
    up, down = chance.randbytes(700_001), chance.randbytes(300_003)
    with evidence.writer(settings=SMALL_SEGMENTS) as gate:
        session, other = gate.open(), gate.open()
        for start in range(0, len(up), 100_000):
            gate.up(session, up[start : start + 100_000])
            gate.down(other, b"not yours")
            gate.down(session, down[start : start + 100_000])
        gate.close(session)
    blanks, files = exported(evidence, session, tmp_path / "out")
    assert blanks == []
    assert files == {"up": up, "down": down}


def test_both_files_are_there_when_nothing_was_said(evidence, tmp_path):
    with evidence.writer() as gate:
        session = gate.open()
    assert exported(evidence, session, tmp_path / "out") == ([], {"up": b"", "down": b""})


def test_hidden_bytes_are_zero_and_told_while_sent_zeros_are_not(evidence, tmp_path):
    with evidence.writer() as gate:
        session = gate.open()
        gate.up(session, b"p\0\0\0\0\0\0tail")
        gate.record(session, Hidden("client", 3, 4, "password", "00"))
        gate.data(session, Kind.DOWN_OWN, b"gate says no")
        gate.data(session, Kind.UP_OWN, b"gate asks")
        gate.close(session)
    blanks, files = exported(evidence, session, tmp_path / "out")
    assert blanks == [("up", 3, 4, "password")]
    assert files == {
        "up": b"p\0\0\0\0\0\0tail", "down": b"", "gate.down": b"gate says no",
        "gate.up": b"gate asks",
    }  # fmt: skip


def test_bytes_keep_their_place_when_some_were_not_recorded(evidence, tmp_path):
    with evidence.writer() as gate:
        session = gate.open()
        gate.down(session, b"before")
        gate.sent[session, Kind.DOWN] += 10
        gate.down(session, b"after")
        gate.record(session, SessionClose("fin", "client", 3, 25, 0, 0))
    blanks, files = exported(evidence, session, tmp_path / "out")
    assert blanks == [
        ("up", 0, 3, "missing"),
        ("down", 6, 10, "missing"),
        ("down", 21, 4, "missing"),
    ]
    assert files == {"up": bytes(3), "down": b"before" + bytes(10) + b"after" + bytes(4)}


def test_files_can_be_read_by_their_owner_only_and_replace_older_ones(evidence, tmp_path):
    with evidence.writer() as gate:
        session = gate.open()
        gate.up(session, b"first")
        gate.commit()
        exported(evidence, session, tmp_path / "out")
        gate.up(session, b" second")
        gate.commit()
        (tmp_path / "out" / f".{session_name(session)}.up.part").write_bytes(b"left by a kill")
        _, files = exported(evidence, session, tmp_path / "out")
    assert files["up"] == b"first second"
    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_mode & 0o077 == 0


def test_an_export_that_is_given_up_leaves_no_half_file(evidence, tmp_path):
    with evidence.writer() as gate:
        session = gate.open()
        gate.up(session, b"p\0\0\0")
        gate.record(session, Hidden("client", 1, 3, "password", "00"))
    with evidence.index() as index:
        reader = Reader(evidence.store, evidence.keys, index)
        blanks = raw.export(reader, query.session(index, session), tmp_path)
        next(blanks)
        blanks.close()
        reader.close()
    assert not list(tmp_path.glob("*.up*"))
    assert not list(tmp_path.glob(".*"))
