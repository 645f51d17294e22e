"""The bench's capture check finds what is missing or differs in a recorded stream."""

import pytest

from bench.capture_check import HEADER, CaptureCheck, Sent, pattern
from capture.crypt import Keys
from capture.frames import Kind
from capture.records import Operation
from capture.segment import SegmentWriter
from capture.settings import SMALL
from capture.store import Store

PIECE = 10_000


@pytest.fixture
def store(tmp_path, request):
    return Store(tmp_path / "state", tmp_path / "run")


@pytest.fixture
def keys(store):
    return Keys.load_or_create(store.state)


class Recording:
    """Sessions of load.c as a gate would have recorded them."""

    def __init__(self, store, keys):
        self.writer = SegmentWriter(store, keys, "gate-0", role="gate", settings=SMALL)

    def stream(self, session, kind, data):
        for start in range(0, len(data), PIECE):
            self.writer.append(kind, session, data[start : start + PIECE], 1, start)

    def bulk(self, mode, sent, recorded):
        session = self.writer.new_session()
        header = HEADER.pack(mode, sent)
        self.stream(session, Kind.UP, header + (recorded if mode == b"u" else b""))
        self.stream(session, Kind.DOWN, recorded if mode == b"d" else b"\0" * 8)

    def trips(self, up, down):
        session = self.writer.new_session()
        self.stream(session, Kind.UP, HEADER.pack(b"p", 0) + up)
        self.stream(session, Kind.DOWN, down)


@pytest.fixture
def recording(store, keys):
    return Recording(store, keys)


def problems(recording, store, keys, sent):
    recording.writer.close()
    check = CaptureCheck()
    check.read(store, keys)
    check.finish(sent)
    return check.problems


def content(size):
    return (pattern() * 3)[:size]


@pytest.mark.parametrize(("mode", "way"), [(b"d", "down"), (b"u", "up")])
def test_a_true_recording_has_no_problems(recording, store, keys, mode, way):
    sent = Sent(trips=2, queries=1)
    sent.bulk(way, 600_000)
    recording.bulk(mode, 600_000, content(600_000))
    recording.trips(content(100) * 2, content(100) * 2)
    recording.writer.record(7, Operation(1, "SELECT", "SELECT abalance FROM a", 0, 9), 1)
    assert problems(recording, store, keys, sent) == []


@pytest.mark.parametrize(("mode", "way"), [(b"d", "down"), (b"u", "up")])
@pytest.mark.parametrize("at", [0, 299_999, 599_999])
def test_one_changed_byte_is_found(recording, store, keys, mode, way, at):
    sent = Sent()
    sent.bulk(way, 600_000)
    planted = bytearray(content(600_000))
    planted[at] ^= 1
    recording.bulk(mode, 600_000, bytes(planted))
    (problem,) = problems(recording, store, keys, sent)
    assert "differ" in problem


@pytest.mark.parametrize(("mode", "way"), [(b"d", "down"), (b"u", "up")])
def test_a_missing_end_is_found(recording, store, keys, mode, way):
    sent = Sent()
    sent.bulk(way, 600_000)
    recording.bulk(mode, 600_000, content(599_999))
    assert any("599999 of 600000" in problem for problem in problems(recording, store, keys, sent))


def test_a_frame_that_is_left_out_is_found(recording, store, keys):
    sent = Sent()
    sent.bulk("down", 600_000)
    session = recording.writer.new_session()
    recording.stream(session, Kind.UP, HEADER.pack(b"d", 600_000))
    data = content(600_000)
    for start in range(0, len(data), PIECE):
        if start != 200_000:
            recording.writer.append(Kind.DOWN, session, data[start : start + PIECE], 1, start)
    (problem,) = problems(recording, store, keys, sent)
    assert "offset 210000 follows 200000" in problem


def test_a_session_that_was_never_recorded_is_found(recording, store, keys):
    sent = Sent(trips=2)
    sent.bulk("down", 1000)
    sent.bulk("down", 1000)
    recording.bulk(b"d", 1000, content(1000))
    recording.trips(content(100), content(100))
    found = problems(recording, store, keys, sent)
    assert found == ["downloads: 1 are recorded, 2 were made", "trips: 1 are recorded, 2 were made"]


def test_an_echo_that_differs_is_found(recording, store, keys):
    recording.trips(content(100), content(100)[::-1])
    (problem,) = problems(recording, store, keys, Sent())
    assert "DOWN: bytes 0 to 100 differ" in problem


def test_a_query_without_a_record_is_found(recording, store, keys):
    assert problems(recording, store, keys, Sent(queries=1)) == [
        "queries: 0 are recorded, 1 were made"
    ]


@pytest.mark.parametrize(
    ("sent", "missing"),
    [
        (Sent(requests=1, web_bytes=300), []),
        (Sent(requests=2, web_bytes=300), ["requests: 1 are recorded, 2 were made"]),
        (Sent(requests=1, web_bytes=301), ["web_bytes: 300 are recorded, 301 were made"]),
    ],
)
def test_a_request_or_a_part_of_its_answer_without_a_record_is_found(
    recording, store, keys, sent, missing
):
    session = recording.writer.new_session()
    recording.stream(session, Kind.UP, b"GET /page HTTP/1.1\r\nHost: a\r\n\r\n")
    asked = Operation(1, "GET", "GET /page", 0, 31, kind="http")
    recording.writer.record(session, asked, 1)
    recording.stream(session, Kind.DOWN, b"a" * 300)
    assert problems(recording, store, keys, sent) == missing
