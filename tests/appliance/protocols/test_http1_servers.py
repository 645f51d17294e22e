"""Real clients and a real nginx through the real driver; nginx's own log is the oracle."""

import base64
import hashlib
import http.client
import os
import re
import socket
import subprocess
import time
import urllib.parse

import pytest
from driven import half_stream
from web_gate import WebGate, of
from webserver import API_KEY, COOKIE, PASSWORD, QUERY, SESSION, TOKEN, Nginx, answers

from capture.frames import Kind, session_name

PLANTED = (TOKEN, PASSWORD, COOKIE, SESSION, API_KEY, QUERY)
LARGE = 12_000_000


@pytest.fixture(scope="module")
def nginx():
    with Nginx() as server:
        (server.www / "large").write_bytes(os.urandom(1_000_000) * (LARGE // 1_000_000))
        yield server


@pytest.fixture(scope="module")
def other():
    with answers() as port:
        yield port


@pytest.fixture
def gate(nginx, tmp_path):
    made = WebGate(tmp_path, nginx.port)
    yield made
    if made.sessions is not None:
        made.close()


def close(gate):
    frames = gate.close()
    sessions, gate.sessions = gate.sessions, None
    return frames, sessions


def curl(url, *words, **more):
    argv = ["curl", "-sS", "--noproxy", "behind.nothing", "--max-time", "20", *words, url]
    return subprocess.run(argv, capture_output=True, check=True, **more).stdout


def spoken(port, data, until):
    """Send, and return what came until it ends in `until`, or until the end."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(data)
        found = b""
        while until is None or until not in found:
            piece = sock.recv(1 << 20)
            if not piece:
                break
            found += piece
        return found


def logged(nginx, before, count):
    """Return the lines that nginx logged since `before`."""
    until = time.monotonic() + 10
    while len(lines := nginx.asked()[before:]) < count:
        assert time.monotonic() < until, lines
        time.sleep(0.02)
    return lines


def forms(secret):
    """Yield a secret in every form in which it might be written down."""
    raw = secret.encode()
    yield raw
    yield raw.hex().encode()
    yield urllib.parse.quote(secret, safe="").encode()
    yield secret.encode("utf-16-le")
    yield secret.encode("utf-16-be")
    for shift in range(3):
        coded = base64.b64encode(b"\0" * shift + raw)
        yield coded[(0, 2, 3)[shift] : len(coded) // 4 * 4 - 4]


def assert_nothing_planted(frames):
    everything = b"\n".join(payload for *_, payload in frames)
    for secret in PLANTED:
        for form in forms(secret):
            assert form not in everything, secret


def test_what_nginx_logged_is_what_was_recorded(gate, nginx):
    before = len(nginx.asked())
    basic = f"svc-report:{PASSWORD}"
    more = ("--next", "-sS", "-o", "/dev/null")
    url = gate.url
    curl(f"{url}/", "-H", f"Authorization: Bearer {TOKEN}", "-b", f"sid={COOKIE}",
         "-o", "/dev/null", f"{url}/page.txt?access_token={QUERY}&page=1",
         *more, "-I", f"{url}/page.txt",
         *more, "-u", basic, f"{url}/nowhere/4711",
         *more, "-r", "5-9", f"{url}/page.txt",
         *more, "-H", "If-None-Match: *", f"{url}/page.txt",
         *more, "-H", f"Referer: http://user:{PASSWORD}@x/?token={QUERY}", f"{url}/moved?q=1",
         *more, "-d", "a=1&b=2", "-H", f"X-Api-Key: {API_KEY}", "-X", "PUT",
         f"{url}/kept/form",
         *more, "--compressed", f"{url}/gzip/page.txt",
         *more, "-X", "DELETE", f"{url}/kept/nothing",
         *more, "-H", "Upgrade: h2c", "-H", "Connection: Upgrade", f"{url}/echo?page=2",
         *more, "-0")  # fmt: skip
    lines = logged(nginx, before, 11)
    frames, sessions = close(gate)
    found = []
    for session in sessions:
        operations, ended = of(frames, session, "Operation"), of(frames, session, "Result")
        for operation, result in zip(operations, ended, strict=True):
            status = int(result["tag"].split()[0])
            found.append(
                (operation["text"], status, result["detail"]["body"], operation["length"],
                 result["bytes"])
            )  # fmt: skip
    hidden = [(line.replace(QUERY, "[hidden]"), *rest) for line, *rest in lines]
    # of an answer in chunks nginx counts the chunks' sizes as body
    chunked = next(entry for entry in hidden if "/gzip" in entry[0])
    assert sorted(entry for entry in found if "/gzip" not in entry[0]) == sorted(
        entry for entry in hidden if entry is not chunked
    )
    assert [entry[4] for entry in found if "/gzip" in entry[0]] == [chunked[4]]
    assert_nothing_planted(frames)


def test_every_result_says_what_the_client_got(gate, nginx):
    body = curl(f"{gate.url}/page.txt")
    assert body == (nginx.www / "page.txt").read_bytes()
    frames, (session,) = close(gate)
    (result,) = of(frames, session, "Result")
    assert result["detail"]["body"] == len(body)
    assert result["detail"]["content_type"] == "text/plain"
    assert result["detail"]["response"]["server"].startswith("nginx/")
    assert result["detail"]["request"]["user-agent"].startswith("curl/")
    assert 0 < result["duration_ns"] < 20e9
    assert of(frames, session, "Detected")[0]["protocol"] == "http1"


def test_large_bodies_pass_in_both_directions(gate, nginx):
    large = (nginx.www / "large").read_bytes()
    connection = http.client.HTTPConnection("127.0.0.1", gate.port, timeout=20)
    for _ in range(2):
        connection.request("GET", "/large", headers={"Cookie": COOKIE})
        got = connection.getresponse().read()
        assert hashlib.sha256(got).digest() == hashlib.sha256(large).digest()
        connection.request("PUT", "/kept/up", body=large, headers={"X-Api-Key": API_KEY})
        assert connection.getresponse().read() is not None
        assert (nginx.www / "kept" / "up").read_bytes() == large
        pieces = (large[at : at + 300_000] for at in range(0, len(large), 300_000))
        connection.request("PUT", "/kept/chunks", body=pieces, encode_chunked=True,
                           headers={"Transfer-Encoding": "chunked"})  # fmt: skip
        connection.getresponse().read()
        assert (nginx.www / "kept" / "chunks").read_bytes() == large
    connection.close()
    frames, (session,) = close(gate)
    sizes = [
        (result["detail"]["request_body"], result["detail"]["body"])
        for result in of(frames, session, "Result")
    ]
    assert [max(pair) for pair in sizes] == [len(large)] * 6
    assert [result["status"] for result in of(frames, session, "Result")] == ["ok"] * 6
    assert half_stream(frames, session.number, Kind.DOWN).count(large) == 2
    assert_nothing_planted(frames)


def test_a_thousand_pipelined_requests_are_answered_in_order(gate):
    asked = [
        f"GET /echo?n={n}&token={QUERY} HTTP/1.1\r\nHost: h\r\nCookie: {COOKIE}\r\n\r\n".encode()
        for n in range(1000)
    ]
    last = b"GET /echo?last HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
    got = spoken(gate.port, b"".join(asked) + last, None)
    assert re.findall(rb"/echo\?n=(\d+)&", got) == [b"%d" % n for n in range(1000)]
    frames, (session,) = close(gate)
    assert [operation["op"] for operation in of(frames, session, "Operation")] == [*range(1, 1002)]
    assert [result["op"] for result in of(frames, session, "Result")] == [*range(1, 1002)]
    recorded = half_stream(frames, session.number, Kind.UP)
    assert recorded == b"".join([*asked, last]).replace(QUERY.encode(), bytes(len(QUERY))).replace(
        COOKIE.encode(), bytes(len(COOKIE))
    )
    up = [frame for frame in frames if frame[0] != Kind.DOWN]  # nginx says it back in a body
    assert_nothing_planted(up)


def test_a_smuggled_request_never_reaches_the_server(gate, nginx):
    before = len(nginx.asked())
    inside = f"GET /echo?smuggled HTTP/1.1\r\nHost: h\r\nCookie: {COOKIE}\r\n\r\n".encode()
    attacks = [
        b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG" + inside,
        b"Transfer-Encoding: chunked\r\nTransfer-encoding: cow\r\n\r\n0\r\n\r\n" + inside,
        b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + inside,
        b"Content-Length: 0\r\n Content-Length: 9\r\n\r\n" + inside,
        b"Content-Length: 0\r\n\n" + inside,
    ]
    for attack in attacks:
        good = b"GET /echo?good HTTP/1.1\r\nHost: h\r\n\r\n"
        got = spoken(gate.port, good + b"POST /echo?bad HTTP/1.1\r\nHost: h\r\n" + attack, None)
        assert got.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"HTTP/1.1 400 Bad Request\r\n" in got
        reference = session_name(gate.sessions[-1].number).encode()
        assert got.endswith(b"(reference " + reference + b")\n")
    assert [line for line, *_ in logged(nginx, before, len(attacks))] == [
        "GET /echo?good HTTP/1.1"
    ] * len(attacks)
    frames, sessions = close(gate)
    for session in sessions:
        verdicts = [operation["verdict"] for operation in of(frames, session, "Operation")]
        assert verdicts == ["allowed", "denied"]
        assert b"smuggled" in half_stream(frames, session.number, Kind.UP), "it is evidence"
        (end,) = of(frames, session, "SessionClose")
        assert (end["reason"], end["by"]) == ("protocol", "gate")
        assert end["reference"] == session_name(session.number)
    assert_nothing_planted(frames)


def test_a_kill_is_answered_in_http(other, tmp_path):
    gate = WebGate(tmp_path, other)
    with socket.create_connection(("127.0.0.1", gate.port), timeout=20) as sock:
        sock.sendall(b"GET /silent HTTP/1.1\r\nHost: h\r\n\r\n")
        until = time.monotonic() + 20
        while not (gate.sessions and gate.sessions[0].operations):
            assert time.monotonic() < until
            time.sleep(0.01)
        gate.kill(gate.sessions[0])
        got = b""
        while piece := sock.recv(65536):
            got += piece
    assert got.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert session_name(gate.sessions[0].number).encode() in got
    frames, (session,) = close(gate)
    assert of(frames, session, "Result")[0]["tag"] == "503 Service Unavailable"
    assert half_stream(frames, session.number, Kind.DOWN_OWN) == got


@pytest.mark.parametrize("durability", ["write", "fsync"])
def test_what_nginx_does_not_do_passes_too(other, tmp_path, durability):
    gate = WebGate(tmp_path, other, durability=durability)
    assert curl(f"{gate.url}/trailers") == b"hello world"
    assert curl(f"{gate.url}/hints") == b"ok"
    assert curl(f"{gate.url}/endless") == b"until the end"
    connect = b"CONNECT behind.example:80 HTTP/1.1\r\nHost: behind.example\r\n\r\nearly"
    assert b"\r\n\r\nylrae" in spoken(gate.port, connect, b"ylrae")  # it says all backwards
    frames, sessions = close(gate)
    texts = [
        operation["text"] for session in sessions for operation in of(frames, session, "Operation")
    ]
    assert texts == [
        "GET /trailers HTTP/1.1", "GET /hints HTTP/1.1", "GET /endless HTTP/1.1",
        "CONNECT behind.example:80 HTTP/1.1",
    ]  # fmt: skip
    interim = of(frames, sessions[1], "Result")[0]["detail"]["interim"]
    assert interim == [103]
    assert of(frames, sessions[3], "Fact")[0]["kind"] == "upgraded"
    assert_nothing_planted(frames)


def test_an_upgraded_connection_carries_anything(other, tmp_path):
    gate = WebGate(tmp_path, other)
    frame = b"\x81\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58" * 50_000
    with socket.create_connection(("127.0.0.1", gate.port), timeout=20) as sock:
        sock.sendall(
            b"GET /socket HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nAuthorization: Bearer "
            + TOKEN.encode() + b"\r\n\r\n"
        )  # fmt: skip
        got = b""
        while not got.endswith(b"\r\n\r\n"):
            got += sock.recv(65536)
        back = bytearray()
        for at in range(0, len(frame), 50_000):
            sock.sendall(frame[at : at + 50_000])
            while len(back) < min(at + 50_000, len(frame)):
                back += sock.recv(65536)
    assert back == frame
    frames, (session,) = close(gate)
    assert of(frames, session, "Fact")[1]["fields"]["to"] == "websocket"
    assert half_stream(frames, session.number, Kind.UP).endswith(frame)
    assert_nothing_planted(frames)
