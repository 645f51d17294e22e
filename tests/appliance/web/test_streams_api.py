"""Bytes over the API: ranges against a plain slice, hidden and missing bytes, exports."""

import json
import random
import socket
import time
from pathlib import Path

import pytest
from review_evidence import SETTINGS

from appliance.web import reading
from appliance.web.problem import Problem
from appliance.web.streams import SIDES, cut, span
from capture import index_query
from capture.export import capturefile, ocsf
from capture.frames import Kind, session_name, session_number
from capture.reader import Reader
from capture.records import Hidden

UP = random.Random(7).randbytes(1_300_001)
DOWN = random.Random(8).randbytes(700_000)


@pytest.fixture(scope="module")
def recorded(shared):
    """One long session over several segments, between others."""
    with shared.evidence.writer(settings=SETTINGS) as gate:
        session, other = gate.open(), gate.open()
        for start in range(0, len(UP), 100_000):
            gate.up(session, UP[start : start + 100_000])
            gate.up(other, b"not yours" * 1000)
            gate.down(session, DOWN[start // 2 : start // 2 + 50_000])
            gate.commit()
        gate.down(session, DOWN[gate.sent[session, Kind.DOWN] :])
        gate.data(session, Kind.DOWN_OWN, b"refused by the gate")
        gate.close(session)
        secret = gate.open()
        gate.up(secret, b"user alice pass " + bytes(6) + b" end")
        gate.record(secret, Hidden("client", 16, 6, "password", "ab"))
        gate.up(secret, b"after")
        gate.record(secret, Hidden("client", 26, 2, "password", "ab"))
        gate.close(secret)
        long = gate.open()
        for _ in range(16):
            gate.up(long, UP)
        gate.close(long)
        shared.long = session_name(long)
        holes = gate.open()
        gate.up(holes, b"first")
        gate.sent[holes, Kind.UP] = 10
        gate.up(holes, b"third")
        gate.close(holes)
        gate.commit()
        shared.session, shared.secret, shared.holes = map(session_name, (session, secret, holes))
        yield shared


def stream(api, session, direction="up", wanted=None):
    headers = {} if wanted is None else {"Range": wanted}
    return api.get(f"/sessions/{session}/streams/{direction}", headers=headers)


def test_a_stream_is_byte_for_byte_what_was_sent(recorded):
    for direction, content in (("up", UP), ("down", DOWN), ("gate-down", b"refused by the gate")):
        answer = stream(recorded, recorded.session, direction)
        assert answer.status == 200
        assert answer.body == content
        assert answer.headers["Content-Length"] == str(len(content))
        assert answer.headers["Accept-Ranges"] == "bytes"
        assert answer.headers["Content-Type"] == "application/octet-stream"
        assert "attachment" in answer.headers["Content-Disposition"]
    assert stream(recorded, recorded.session, "gate-up").body == b""


@pytest.mark.parametrize(
    "wanted",
    ["0-0", "0-", "-1", "-1300001", "-9999999", "1300000-", "5-4095", "4095-4096", "4096-8191",
     "99999-100000", "650000-1299999", "1300000-99999999", "700123-700123"],
)  # fmt: skip
def test_a_range_is_the_slice(recorded, wanted):
    answer = stream(recorded, recorded.session, "up", f"bytes={wanted}")
    first, _, last = wanted.partition("-")
    if first:
        start, end = int(first), min(int(last) + 1 if last else len(UP), len(UP))
    else:
        start, end = max(len(UP) - int(last), 0), len(UP)
    assert answer.status == 206
    assert answer.headers["Content-Range"] == f"bytes {start}-{end - 1}/{len(UP)}"
    assert answer.body == UP[start:end]


@pytest.mark.parametrize("wanted", ["bytes=1300001-", "bytes=9999999-99999999", "bytes=-0"])
def test_a_range_beyond_the_end_is_refused_with_the_length(recorded, wanted):
    answer = stream(recorded, recorded.session, "up", wanted)
    assert (answer.status, answer.problem()) == (416, "range")
    assert answer.headers["Content-Range"] == f"bytes */{len(UP)}"


@pytest.mark.parametrize(
    "wanted", ["bytes=5-4", "bytes=a-b", "lines=1-2", "bytes=-", "bytes=0-1,5-6", "bytes"]
)
def test_what_is_no_single_range_of_bytes_is_passed_over(recorded, wanted):
    answer = stream(recorded, recorded.secret, "up", wanted)
    assert (answer.status, len(answer.body)) == (200, 31)


def test_an_empty_stream_has_no_range(recorded):
    assert stream(recorded, recorded.holes, "down").body == b""
    assert stream(recorded, recorded.holes, "down", "bytes=0-").status == 416


def test_random_ranges_are_slices(recorded):
    chance = random.Random(3)
    for _ in range(40):
        start = chance.randrange(len(DOWN))
        end = min(start + chance.randrange(1, 9000), len(DOWN))
        answer = stream(recorded, recorded.session, "down", f"bytes={start}-{end - 1}")
        assert answer.body == DOWN[start:end], (start, end)


def test_hidden_bytes_are_zero_in_every_range_and_named(recorded):
    whole = stream(recorded, recorded.secret).body
    assert whole == b"user alice pass \0\0\0\0\0\0 endafter"
    named = recorded.ok(f"/sessions/{recorded.secret}/records", kind="hidden")["items"]
    assert [(one["offset"], one["length"]) for one in named] == [(16, 6), (26, 2)]
    for start in range(len(whole)):
        assert stream(recorded, recorded.secret, "up", f"bytes={start}-").body == whole[start:]


def test_bytes_that_were_not_recorded_are_zero_and_keep_their_place(recorded):
    whole = b"first" + bytes(5) + b"third"
    assert stream(recorded, recorded.holes).body == whole
    for start in range(len(whole)):
        for end in range(start + 1, len(whole) + 1):
            answer = stream(recorded, recorded.holes, "up", f"bytes={start}-{end - 1}")
            assert answer.body == whole[start:end]


def test_a_range_near_the_end_opens_no_commit_before_it(recorded):
    with recorded.evidence.index() as index:
        reader = Reader(recorded.evidence.store, recorded.evidence.keys, index)
        number = session_number(recorded.session)
        found = b"".join(cut(reader, number, SIDES["up"], len(UP) - 10, len(UP)))
        opened = len(reader._cache)
        commits = len(list(index_query.extents(index, number)))
        reader.close()
    assert found == UP[-10:]
    assert opened <= 4
    assert commits > 12


def test_an_export_is_the_command_lines(recorded):
    answer = recorded.get(f"/sessions/{recorded.secret}/export", format="ndjson")
    assert answer.headers["Content-Type"] == "application/x-ndjson"
    with recorded.evidence.index() as index:
        reader = Reader(recorded.evidence.store, recorded.evidence.keys, index)
        session = index_query.session(index, session_number(recorded.secret))
        expected = b"".join(ocsf.export(reader, session))
        reader.close()
    assert answer.body == expected
    assert json.loads(answer.body)["class_uid"] == 4001


def test_a_capture_file_is_what_the_command_line_writes(recorded):
    for name in (recorded.session, recorded.secret, recorded.holes):
        answer = recorded.get(f"/sessions/{name}/export", format="pcapng")
        assert answer.headers["Content-Type"] == "application/x-pcapng"
        assert f'filename="{name}.pcapng"' in answer.headers["Content-Disposition"]
        with recorded.evidence.index() as index:
            reader = Reader(recorded.evidence.store, recorded.evidence.keys, index)
            session = index_query.session(index, session_number(name))
            expected = b"".join(capturefile.export(reader, [session]))
            reader.close()
        assert answer.body == expected
        assert len(answer.body) > 500


def children():
    """The programs that this process runs now."""
    return [
        process
        for task in Path("/proc/self/task").iterdir()
        for process in (task / "children").read_text().split()
    ]


def test_the_program_of_a_capture_file_ends_with_its_request(recorded):
    running = len(children())
    with recorded.raw() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        head = (
            f"GET /api/v1/sessions/{recorded.long}/export?format=pcapng HTTP/1.1\r\nHost: x\r\n"
            f"Authorization: Bearer {recorded.tokens['admin']}\r\n\r\n"
        )
        sock.sendall(head.encode())
        assert sock.recv(100).startswith(b"HTTP/1.1 200")
        assert len(children()) == running + 1  # more than its pipes and sockets hold is to come
    until = time.monotonic() + 20
    while len(children()) > running:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_more_streams_than_there_may_be_are_told_to_come_back(recorded):
    recorded.server.review.reading._streams += reading.MOST_STREAMS
    try:
        answer = stream(recorded, recorded.session)
    finally:
        recorded.server.review.reading._streams -= reading.MOST_STREAMS
    assert (answer.status, answer.problem()) == (503, "unavailable")
    assert answer.headers["Retry-After"]
    assert stream(recorded, recorded.secret).status == 200


def test_one_who_stops_reading_holds_no_thread_for_ever(recorded):
    with recorded.raw() as sock:
        head = (
            f"GET /api/v1/sessions/{recorded.session}/streams/up HTTP/1.1\r\nHost: x\r\n"
            f"Authorization: Bearer {recorded.tokens['admin']}\r\n\r\n"
        )
        sock.sendall(head.encode())
        assert sock.recv(100).startswith(b"HTTP/1.1 200")
    until = 100
    while recorded.server.review.reading._streams and until:
        until -= 1
        stream(recorded, recorded.secret)
    assert recorded.server.review.reading._streams == 0


def test_a_range_of_any_header_is_within_the_stream():
    for text in ("bytes=0-", "bytes=3-9", "bytes=-4", "bytes=9-", "bytes=0-0", ""):
        for total in (0, 1, 5, 10):
            try:
                start, end, _ = span(text, total)
            except Problem:
                continue
            assert 0 <= start <= end <= total
