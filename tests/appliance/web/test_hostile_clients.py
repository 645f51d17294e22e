"""What a hostile or broken client sends: nothing of it is served, and others still are."""

import http.client
import json
import socket
import ssl
import stat
import tempfile
import time
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from served_api import Api

from appliance.cli import main
from appliance.config import Review
from appliance.web import certificate, connections, health, server
from appliance.web.failures import MOST_PEERS, PER_PEER, Failures
from capture.errors import KeyFileError

SECURITY = {
    "Strict-Transport-Security", "X-Content-Type-Options", "X-Frame-Options",
    "Content-Security-Policy", "Cache-Control", "Referrer-Policy",
}  # fmt: skip


@pytest.fixture(autouse=True)
def another_minute(request):
    """What one test had logged does not count against the next."""
    if "shared" in request.fixturenames:
        request.getfixturevalue("shared").server.review.strangers = Failures()


def test_plain_http_is_not_answered(shared):
    with socket.create_connection(("127.0.0.1", shared.port), timeout=20) as sock:
        sock.sendall(b"GET /api/v1/health HTTP/1.1\r\nHost: x\r\n\r\n")
        try:
            assert not sock.recv(100).startswith(b"HTTP")
        except ConnectionResetError:
            pass
    assert shared.get("/health", None).status == 200


def test_old_tls_is_refused(shared):
    tls = ssl.create_default_context(cafile=shared.config.paths.state / "review.crt")
    tls.minimum_version = tls.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(("127.0.0.1", shared.port)) as sock,
        tls.wrap_socket(sock, server_hostname="localhost") as old,
    ):
        assert old.version() == "TLSv1.2"
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        tls.minimum_version = tls.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(("127.0.0.1", shared.port)) as sock,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        tls.wrap_socket(sock, server_hostname="localhost")


def test_every_answer_has_the_security_headers_and_none_opens_it_to_other_origins(shared):
    for answer in (
        shared.get("/sessions", headers={"Origin": "https://evil.example"}),
        shared.get("/sessions", None),
        shared.get("/nothing"),
        shared.get("/openapi.json", None),
        shared.ask("OPTIONS", "/sessions", headers={"Origin": "https://evil.example"}),
        shared.post("/sessions", {}),
    ):
        names = {name.lower() for name in answer.headers}
        assert {name.lower() for name in SECURITY} <= names
        assert not [name for name in names if name.startswith("access-control")]
        assert "set-cookie" not in names
        assert answer.headers["Server"] == "narrows"


def test_an_unknown_path_or_method_is_a_problem_object(shared):
    for path in ("/nothing", "/sessions/", "/sessions/../health", "//sessions", "/%00"):
        answer = shared.get(path)
        assert (answer.status, answer.problem()) in [(404, "not-found"), (400, "bad-request")], path
    wrong = shared.ask("DELETE", "/sessions")
    assert (wrong.status, wrong.problem()) == (405, "method-not-allowed")
    assert "GET" in wrong.headers["Allow"]


def test_two_errors_have_two_references_and_the_log_has_them(shared, caplog):
    caplog.set_level("INFO")
    one, two = shared.get("/nothing").json(), shared.get("/nothing").json()
    assert one["reference"] != two["reference"]
    assert one["reference"] in caplog.text


KILL = "/sessions/0000100000001/kill"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[" * 50_000, b"\xff\xfe", b'{"reason": "' + b"x" * 2000 + b'"}', b'"text"',
     b'{"reason": null}', b'{"reason": "x", "session": "y"}', b"1e999", b"NaN"],
)  # fmt: skip
def test_a_body_that_makes_no_sense_is_refused(shared, body):
    headers = {"Content-Type": "application/json"}
    answer = shared.ask("POST", KILL, headers=headers, body=body)
    assert (answer.status, answer.problem()) == (400, "bad-request")


def test_a_form_of_a_web_page_is_no_request(shared):
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = shared.ask("POST", KILL, headers=headers, body=b'{"reason": "x"}')
    assert (answer.status, answer.problem()) == (400, "bad-request")


def test_a_body_that_is_too_large_is_refused(shared):
    headers = {"Content-Type": "application/json"}
    answer = shared.ask("POST", KILL, headers=headers, body=b'{"reason":"' + b"x" * 70_000 + b'"}')
    assert (answer.status, answer.problem()) == (413, "too-large")


@pytest.mark.parametrize(
    "request_head",
    [
        b"GET /api/v1/" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /api/v1/health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET /api/v1/health HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET /api/v1/health HTTP/1.1\r\n" + b"X: y\r\n" * 100 + b"\r\n",
        b"GET /api/v1/health HTTP/1.1\r\nX: \0\r\n\r\n",
        b"\x16\x03\x01garbage\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_a_head_that_is_no_http_or_too_long_is_refused(shared, request_head, caplog):
    caplog.set_level("INFO")
    with shared.raw() as sock:
        sock.sendall(request_head)
        answer = http.client.HTTPResponse(sock)
        answer.begin()
        body = answer.read()
        assert sock.recv(1) == b"", "it is closed"
    told = json.loads(body)
    assert (answer.status, told["type"]) == (400, "urn:narrows:problem:bad-request")
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert {name.lower() for name in SECURITY} <= {name.lower() for name in answer.headers}
    assert b"aaaa" not in body
    [line] = [record for record in caplog.records if told["reference"] in record.getMessage()]
    assert (line.levelname, line.exc_info) == ("INFO", None)
    assert "Traceback" not in caplog.text
    assert shared.get("/health", None).status == 200


def test_what_is_in_a_request_reaches_no_answer_raw(shared):
    answer = shared.get("/sessions", account="\x1b[2J\u202e<script>")
    assert answer.json() == {"items": [], "next": None}
    answer = shared.get("/sessions?%1b[2J%0d%0aSet-Cookie:x=1")
    assert answer.problem() == "bad-request"
    assert all(32 <= byte < 127 or byte == 10 for byte in answer.body)


def test_a_connection_that_never_asks_is_closed(shared):
    shared.server.review.connections.idle_s = 1.0
    with shared.raw() as silent, shared.raw() as half:
        half.sendall(b"GET /api/v1/health HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        for sock in (silent, half):
            sock.settimeout(12)  # well before anything else would close it
            try:
                assert sock.recv(1) == b""
            except (ConnectionError, ssl.SSLError):
                pass
    shared.server.review.connections.idle_s = connections.IDLE_S


def opened(shared, count):
    """TCP connections that say nothing; those that are closed at once are not among them."""
    sockets = [socket.create_connection(("127.0.0.1", shared.port)) for _ in range(count)]
    until = time.monotonic() + 20
    connections = shared.server.review.connections
    while connections.turned_away + connections.count < count and time.monotonic() < until:
        time.sleep(0.01)
    return sockets


def closed(sock):
    sock.settimeout(0.01)
    try:
        return sock.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


@pytest.mark.parametrize("bound", ["most", "most_of_peer"])
def test_a_connection_too_many_is_closed_before_it_costs_a_handshake(api, bound):
    connections = api.server.review.connections
    setattr(connections, bound, 5)
    sockets = opened(api, 40)
    assert (connections.count, connections.turned_away) == (5, 35)
    assert sum(map(closed, sockets)) == 35
    for sock in sockets:
        sock.close()
    until = time.monotonic() + 20
    while connections.count:
        assert time.monotonic() < until, "who went away is counted no more"
        time.sleep(0.01)
    assert not connections._peers
    assert not connections._spoke
    assert api.get("/health", None).status == 200


def test_a_handshake_that_does_not_come_ends(api, monkeypatch):
    monkeypatch.setattr(connections, "HANDSHAKE_S", 0.5)
    api.server.review.connections.idle_s = 3600
    with socket.create_connection(("127.0.0.1", api.port)) as sock:
        sock.settimeout(20)
        sock.sendall(b"\x16\x03\x01\x02\x00")  # a ClientHello's first bytes
        assert sock.recv(1) == b""


def test_a_thousand_silent_connections_leave_the_others_served(api):
    connections = api.server.review.connections
    connections.most_of_peer = 1000
    sockets = opened(api, 1000)
    assert connections.count == connections.most
    for sock in sockets[:1]:
        sock.close()
    until = time.monotonic() + 20
    while connections.count == connections.most:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert api.get("/health", None).status == 200
    for sock in sockets[1:]:
        sock.close()


def test_only_ciphers_with_forward_secrecy_are_spoken(shared):
    tls = ssl.create_default_context(cafile=shared.config.paths.state / "review.crt")
    tls.maximum_version = ssl.TLSVersion.TLSv1_2
    tls.set_ciphers("AES128-GCM-SHA256:ECDHE-ECDSA-AES128-SHA256")
    with (
        socket.create_connection(("127.0.0.1", shared.port)) as sock,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        tls.wrap_socket(sock, server_hostname="localhost")


def said(shared, request):
    with shared.raw() as sock:
        sock.sendall(request)
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
    return answer


def test_http_1_0_is_answered_and_closed(shared):
    head, _, body = said(shared, b"GET /api/v1/health HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200")
    assert json.loads(body)["recording"]


def test_head_is_refused_without_a_body_and_reads_nothing(shared):
    reads = len(shared.reads())
    request = (
        f"HEAD /api/v1/sessions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        f"Authorization: Bearer {shared.tokens['admin']}\r\n\r\n"
    )
    head, _, body = said(shared, request.encode()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 405")
    assert b"Allow: GET" in head
    assert body == b""
    assert len(shared.reads()) == reads


def test_a_body_that_does_not_come_is_not_waited_for(shared, monkeypatch):
    monkeypatch.setattr(server, "BODY_S", 0.3)
    request = (
        f"POST /api/v1{KILL} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {shared.tokens['admin']}\r\nContent-Length: 50\r\n\r\n{{"
    )
    answer = said(shared, request.encode())
    assert answer.startswith(b"HTTP/1.1 408"), answer[:100]


def test_a_compressed_body_is_not_opened(shared):
    headers = {"Content-Type": "application/json", "Content-Encoding": "deflate"}
    bomb = zlib.compress(b" " * 50_000_000)
    answer = shared.ask("POST", KILL, headers=headers, body=bomb)
    assert (answer.status, answer.problem()) == (400, "bad-request")


def test_what_strangers_do_fills_no_log(api, caplog):
    caplog.set_level("INFO")
    for _ in range(40):
        api.get("/nothing", None)
        api.get("/sessions", "narrows_wrong")
    assert len(caplog.records) <= 3 * PER_PEER
    caplog.clear()
    reference = api.get("/sessions?limit=0").json()["reference"]
    assert reference in caplog.text, "who has a token finds every reference there"


def test_many_who_ask_for_health_cost_one_answer(api, monkeypatch):
    asked = []
    monkeypatch.setattr(health, "_workers", lambda _: asked.append(1) or [])
    monkeypatch.setattr(health, "PULSE_S", 3600)
    for _ in range(20):
        assert api.get("/health", None).status == 200
    assert len(asked) == 1


def test_a_kept_connection_serves_again_and_again(shared):
    connection = shared.connection()
    sock = None
    for _ in range(5):
        connection.request("GET", "/api/v1/health")
        answer = connection.getresponse()
        assert json.loads(answer.read())["recording"]
        sock = sock or connection.sock
        assert connection.sock is sock
    connection.close()


def test_failures_are_forgotten_after_a_minute_and_addresses_are_bounded():
    now = [0.0]
    failures = Failures(lambda: now[0])
    assert all(failures.add("a") for _ in range(PER_PEER))
    assert not failures.add("a")
    assert failures.add("b")
    now[0] = 61.0
    assert failures.add("a")
    for number in range(3 * MOST_PEERS):
        failures.add(str(number))
    assert len(failures._peers) <= MOST_PEERS
    assert not failures.add("new"), "all of them together are too many"


def test_the_certificate_is_made_once_and_its_key_is_the_owners(shared):
    state = shared.config.paths.state
    before = (state / "review.crt").read_bytes()
    assert stat.S_IMODE((state / "review.key").stat().st_mode) == 0o600
    certificate.ensure(state / "review.crt", state / "review.key", "127.0.0.1")
    assert (state / "review.crt").read_bytes() == before


def test_a_key_that_others_may_read_is_refused(tmp_path):
    names = (tmp_path / "review.crt", tmp_path / "review.key")
    certificate.ensure(*names, "192.0.2.9")
    certificate.context(*names)
    names[1].chmod(0o640)
    with pytest.raises(KeyFileError, match="chmod 600"):
        certificate.context(*names)


def test_a_certificate_of_ones_own_is_used(shared):
    mine = replace(shared.config, review=Review(certificate="/etc/x/a.pem", key="/etc/x/a.key"))
    assert [str(path) for path in certificate.files(mine)] == ["/etc/x/a.pem", "/etc/x/a.key"]


def test_none_is_made_in_place_of_a_configured_one_that_is_missing(tmp_path):
    api = Api(tmp_path)
    names = [str(tmp_path / name) for name in ("mine.crt", "mine.key")]
    api.config = replace(api.config, review=Review(port=0, certificate=names[0], key=names[1]))
    with pytest.raises(KeyFileError), api:
        pass
    assert not Path(names[0]).exists()


def test_a_process_that_cannot_listen_says_so_in_one_line(shared, tmp_path, capsys):
    config = tmp_path / "narrows.toml"
    with tempfile.TemporaryDirectory(dir="/dev/shm") as run:
        paths = f'[paths]\nstate = "{tmp_path / "state"}"\nrun = "{run}"\n\n[review]\n'
        for listen in (f"port = {shared.port}", 'address = "198.51.100.77"'):
            config.write_text(paths + listen + "\n")
            assert main(["serve", "review", "--config", str(config)]) == 69
            said = capsys.readouterr().err.splitlines()
            assert [line for line in said if line.startswith("narrows: the review cannot listen")]
            assert not [line for line in said if "Traceback" in line]
