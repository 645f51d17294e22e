import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from review_evidence import Evidence
from test_index import SMALL_SEGMENTS, busy_day, by_oracle, kill_a_gate

from capture.frames import Kind
from capture.reader import Frame, Reader, Side, _pieces
from capture.records import KINDS, Hidden, Operation
from capture.tail import SegmentReader


@pytest.fixture
def evidence(tmp_path):
    return Evidence(tmp_path)


def frames_by_oracle(evidence, session):
    return [tuple(frame[2:]) for frame in evidence.frames() if frame[1] == session]


def read(reader, session):
    return [
        (frame.kind, frame.time_ns, frame.offset, bytes(frame.payload))
        for frame in reader.frames(session)
    ]


def joined(reader, session, side):
    content = bytearray()
    for piece in reader.stream(session, side):
        assert piece.offset == len(content)
        content += piece.data
    return bytes(content)


@pytest.mark.parametrize("indexed", [True, False])
def test_every_session_is_read_frame_by_frame_with_and_without_an_index(evidence, indexed):
    with (
        evidence.writer("gate-0", SMALL_SEGMENTS) as first,
        evidence.writer("gate-1", SMALL_SEGMENTS) as second,
    ):
        busy_day(first, 1, sessions=15)
        busy_day(second, 2, sessions=15)
        with evidence.index() as index:
            reader = Reader(evidence.store, evidence.keys, index if indexed else None)
            for session in by_oracle(evidence):
                assert read(reader, session) == frames_by_oracle(evidence, session)
            reader.close()
            assert not reader.damage


def test_a_long_session_over_many_segments_is_read_byte_for_byte(evidence):
    chance = random.Random(7)
    up, down = chance.randbytes(300_000), chance.randbytes(1_500_000)
    with evidence.writer(settings=SMALL_SEGMENTS) as gate:
        session, other = gate.open(), gate.open()
        for start in range(0, len(down), 50_000):
            gate.up(session, up[start // 5 : start // 5 + 10_000])
            gate.down(other, b"not yours" * 100)
            gate.down(session, down[start : start + 50_000])
        gate.commit()
        with evidence.index() as index:
            for which in (index, None):
                reader = Reader(evidence.store, evidence.keys, which, cache_bytes=100_000)
                assert joined(reader, session, Side.UP) == up
                assert joined(reader, session, Side.DOWN) == down
                assert reader._bytes <= 2 * 100_000, "the cache is bounded"
                reader.close()
    assert len(evidence.store.generations()) > 5


def test_what_a_killed_gate_had_only_in_memory_is_read_after_the_recovery(evidence, tmp_path):
    kill_a_gate(evidence, tmp_path)
    with evidence.writer("gate-1"), evidence.index() as index:
        reader = Reader(evidence.store, evidence.keys, index)
        found = {joined(reader, session, Side.UP) for session in by_oracle(evidence)}
        reader.close()
    assert b"half a request, the rest" in found


def test_a_running_session_is_read_while_it_grows(evidence):
    with evidence.writer() as gate:
        session = gate.open()
        for turn in range(5):
            gate.up(session, b"line %d\n" % turn)
            gate.commit()
            with evidence.index() as index:
                reader = Reader(evidence.store, evidence.keys, index)
                assert joined(reader, session, Side.UP).count(b"\n") == turn + 1
                reader.close()


def test_hidden_bytes_are_told_apart_from_zeros_that_were_sent(evidence):
    with evidence.writer() as gate:
        session = gate.open()
        gate.up(session, b"user\0\0\0\0\0\0\0end\0")
        gate.record(session, Hidden("client", 4, 3, "password", "aa"))
        gate.record(session, Hidden("upstream", 4, 3, "cancel-key", "aa"))
        gate.record(session, Hidden("client", 9, 2, "sasl", "aa"))
        gate.up(session, b"more")
        gate.down(session, b"down")
        gate.commit()
        with evidence.index() as index:
            reader = Reader(evidence.store, evidence.keys, index)
            pieces = [
                (piece.offset, bytes(piece.data), piece.hidden)
                for piece in reader.stream(session, Side.UP)
            ]
            reader.close()
    assert pieces == [
        (0, b"user", ""),
        (4, b"\0\0\0", "password"),
        (7, b"\0\0", ""),
        (9, b"\0\0", "sasl"),
        (11, b"end\0", ""),
        (15, b"more", ""),
    ]


@given(
    st.binary(max_size=60),
    st.integers(0, 50),
    st.lists(st.tuples(st.integers(0, 120), st.integers(0, 40), st.just("password")), max_size=6),
)
def test_cutting_a_frame_at_hidden_ranges_loses_and_doubles_nothing(data, offset, hidden):
    pieces = list(_pieces(Frame(Kind.UP, 0, offset, memoryview(data)), hidden))
    assert b"".join(piece.data for piece in pieces) == data
    at = offset
    for piece in pieces:
        assert piece.offset == at
        at += len(piece.data)
        inside = [start <= piece.offset < start + length for start, length, _ in hidden]
        assert bool(piece.hidden) == any(inside)


def test_own_bytes_of_the_gate_are_a_stream_of_their_own(evidence):
    with evidence.writer() as gate:
        session = gate.open()
        gate.up(session, b"ask")
        gate.data(session, Kind.DOWN_OWN, b"refused")
        gate.commit()
        with evidence.index() as index:
            reader = Reader(evidence.store, evidence.keys, index)
            assert joined(reader, session, Side.DOWN_OWN) == b"refused"
            assert joined(reader, session, Side.DOWN) == b""
            assert joined(reader, session, Side.UP_OWN) == b""
            reader.close()


def test_records_that_are_not_understood_are_shown_as_such(evidence):
    with evidence.writer() as gate:
        session = gate.open()
        gate.writer.append(250, session, b"\xff", 1)
        gate.writer.append(KINDS[Operation], session, b"no json", 1)
        gate.commit()
        with evidence.index() as index:
            reader = Reader(evidence.store, evidence.keys, index)
            told = [fields for _, fields in reader.records(session)][3:]
            reader.close()
    assert told == [
        {"record": "unknown", "kind": 250, "hex": "ff"},
        {"record": "unknown", "kind": KINDS[Operation], "hex": b"no json".hex()},
    ]


def test_a_commit_that_was_changed_is_left_out_and_told(evidence):
    with evidence.writer(settings=SMALL_SEGMENTS) as gate:
        session = gate.open()
        for part in (b"one", b"two", b"three"):
            gate.up(session, part)
            gate.commit()
        with evidence.index() as index:
            generation = evidence.store.generations()[0]
            path = evidence.store.segment(generation)
            with SegmentReader(path, evidence.keys) as segment:
                commits = list(segment.commits())
            middle = next(c for c in commits if b"two" in _plain(evidence, generation, c))
            with path.open("r+b") as file:
                file.seek(middle.offset + 70)
                file.write(b"\0\1\2\3")
            for which in (index, None):
                reader = Reader(evidence.store, evidence.keys, which)
                pieces = list(reader.stream(session, Side.UP))
                assert [bytes(piece.data) for piece in pieces] == [b"one", b"three"]
                assert [piece.offset for piece in pieces] == [0, 6]
                list(reader.stream(session, Side.UP))
                [damage] = reader.damage
                assert (damage.generation, damage.offset) == (generation, middle.offset)
                reader.close()


def _plain(evidence, generation, commit):
    with SegmentReader(evidence.store.segment(generation), evidence.keys) as reader:
        return reader.plaintext(commit)


def test_a_segment_that_is_gone_is_told(evidence):
    with evidence.writer() as gate:
        session = gate.open()
        gate.up(session, b"gone")
    with evidence.index() as index:
        evidence.store.segment(evidence.store.generations()[0]).unlink()
        reader = Reader(evidence.store, evidence.keys, index)
        assert list(reader.stream(session, Side.UP)) == []
        assert "No such file" in reader.damage[0].reason
        reader.close()


def test_many_sessions_of_the_same_time_open_each_commit_once(evidence, monkeypatch):
    opened = []
    plaintext = SegmentReader.plaintext

    def counted(self, commit):
        opened.append(commit.number)
        return plaintext(self, commit)

    with evidence.writer() as gate:
        sessions = [gate.open() for _ in range(200)]
        for session in sessions:
            gate.up(session, b"x")
        gate.commit()
        with evidence.index() as index:
            reader = Reader(evidence.store, evidence.keys, index)
            monkeypatch.setattr(SegmentReader, "plaintext", counted)
            for session in sessions:
                assert joined(reader, session, Side.UP) == b"x"
            reader.close()
    assert len(opened) == len(set(opened))
