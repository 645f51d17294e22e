"""The bench's capture check finds what is missing or differs in a recorded stream."""

from dataclasses import replace

import pytest

from bench.capture_check import BULK_BODY_BYTES, HEADER, SMALL, CaptureCheck, Sent, pattern
from bench.web_client import BULK_PATH, SMALL_PATH, request
from capture.crypt import Keys
from capture.frames import Kind
from capture.records import Operation
from capture.segment import SegmentWriter
from capture.settings import SMALL as OF_A_COMMAND
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
        small = replace(OF_A_COMMAND, sessions=True)
        self.writer = SegmentWriter(store, keys, "gate-0", role="gate", settings=small)

    def stream(self, session, kind, data):
        for start in range(0, len(data), PIECE):
            self.writer.append(kind, session, data[start : start + PIECE], 1, start)

    def bulk(self, mode, sent, recorded):
        session = self.writer.new_session()
        header = HEADER.pack(mode, sent)
        self.stream(session, Kind.UP, header + (recorded if mode == b"u" else b""))
        self.stream(session, Kind.DOWN, recorded if mode == b"d" else b"\0" * 8)

    def web(self, path, answers):
        session = self.writer.new_session()
        asked = answers.count(b"HTTP/1.1")
        self.stream(session, Kind.UP, request(path) * asked)
        self.stream(session, Kind.DOWN, answers)
        for number in range(asked):
            asks = Operation(number + 1, "GET", f"GET {path} HTTP/1.1", 0, 9)
            self.writer.record(session, asks, 1)

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


def answer(body, date=b"Tue, 24 Nov 2026 10:00:00 GMT"):
    head = b"HTTP/1.1 200 OK\r\nServer: nginx\r\nDate: %s\r\nContent-Length: %d\r\n\r\n"
    return head % (date, len(body)) + body


def test_true_answers_have_no_problems_whatever_the_time_says(recording, store, keys):
    recording.web(SMALL_PATH, answer(content(SMALL)) + answer(content(SMALL), date=b"later"))
    recording.web(BULK_PATH, answer((pattern() * 400)[:BULK_BODY_BYTES]))
    assert problems(recording, store, keys, Sent(requests=2, pages=1)) == []


@pytest.mark.parametrize(
    ("recorded", "problem"),
    [
        (answer(content(SMALL)[::-1]), "differ"),
        (answer(content(SMALL - 1)), "another"),
        (answer(content(SMALL)) + b"more", "answers: 1 are recorded, 2 were made"),
        (answer(content(SMALL))[:-1], "answers: 0 are recorded, 2 were made"),
    ],
)
def test_an_answer_that_is_not_what_the_server_sent_is_found(
    recording, store, keys, recorded, problem
):
    recording.web(SMALL_PATH, recorded)
    assert any(problem in found for found in problems(recording, store, keys, Sent(requests=2)))


def test_requests_without_a_record_are_found(recording, store, keys):
    recording.web(SMALL_PATH, answer(content(SMALL)))
    found = problems(recording, store, keys, Sent(requests=2))
    assert "requests: 1 are recorded, 2 were made" in found
