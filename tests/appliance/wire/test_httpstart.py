import pytest

from appliance.wire.httphead import Malformed
from appliance.wire.httpsecrets import Secrets
from appliance.wire.httpstart import MOST_FINGERPRINT_CHARS, LineReader, template


@pytest.fixture
def lines():
    return LineReader(Secrets())


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", "/"),
        ("/users/42/orders", "/users/{n}/orders"),
        ("/v1/users/42", "/v1/users/{n}"),
        ("/u/f2504e0-4f89-11d.json", "/u/f2504e0-4f89-11d.json"),
        ("/u/3F2504E0-4f89-11d3-9a0c-0305e82c3301/x", "/u/{uuid}/x"),
        ("/blob/da39a3ee5e6b4b0d3255bfef95601890afd80709", "/blob/{hex}"),
        ("/deadbeef/face", "/deadbeef/face"),
        ("/t/AbC0123456789_-abcdefghij", "/t/{id}"),
        ("/a-long-name-without-digits-in-it/x", "/a-long-name-without-digits-in-it/x"),
        ("/2024/11/05/report", "/{n}/{n}/{n}/report"),
        ("//7//", "//{n}//"),
    ],
)  # fmt: skip
def test_a_template_names_all_paths_of_one_kind(path, expected):
    assert template(path) == expected


def test_a_template_is_bounded():
    assert len(template("/a" * 10_000)) == MOST_FINGERPRINT_CHARS


def test_a_request_line_is_read(lines):
    found = lines.request(b"GET /a/7/b?x=1&token=abc HTTP/1.1")
    assert found.verb == "GET"
    assert found.minor == 1
    assert found.text == "GET /a/7/b?x=1&token=[hidden] HTTP/1.1"
    assert (found.host, found.path, found.template) == ("", "/a/7/b", "/a/{n}/b")
    assert found.spans == [(21, 24, "parameter")]


@pytest.mark.parametrize(
    ("line", "host", "path"),
    [
        (b"GET http://User:pw@H.example:8080/a?x HTTP/1.1", "h.example:8080", "/a"),
        (b"GET HTTPS://h.example HTTP/1.0", "h.example", "/"),
        (b"GET http://h.example?x HTTP/1.0", "h.example", "/"),
        (b"CONNECT Db.example:5432 HTTP/1.1", "db.example:5432", ""),
        (b"CONNECT [2001:db8::1]:443 HTTP/1.1", "[2001:db8::1]:443", ""),
        (b"OPTIONS * HTTP/1.1", "", "*"),
        (b"BREW /pot#lid HTTP/1.1", "", "/pot"),
        ("GET /kä HTTP/1.1".encode(), "", "/kä"),
        (b"GET /\xff HTTP/1.1", "", "/\\xff"),
    ],
)
def test_every_form_of_target_says_where_it_leads(lines, line, host, path):
    found = lines.request(line)
    assert (found.host, found.path) == (host, path)
    assert "pw" not in found.text


def test_user_and_password_before_a_tunnels_host_are_secret(lines):
    found = lines.request(b"CONNECT user:pw@db.example:5432 HTTP/1.1")
    assert found.text == "CONNECT [hidden]@db.example:5432 HTTP/1.1"
    assert found.host == "db.example:5432"


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"", 400),
        (b"GET /", 400),
        (b"GET  / HTTP/1.1", 400),
        (b" GET / HTTP/1.1", 400),
        (b"GET / HTTP/1.1 ", 400),
        (b"GET / a HTTP/1.1", 400),
        (b"GET\t/ HTTP/1.1", 400),
        (b"GET /\ta HTTP/1.1", 400),
        (b"GET /\x00 HTTP/1.1", 400),
        (b"GET /\x7f HTTP/1.1", 400),
        (b"G(T / HTTP/1.1", 400),
        (b"GET a HTTP/1.1", 400),
        (b"GET * HTTP/1.1", 400),
        (b"GET ftp://h/ HTTP/1.1", 400),
        (b"GET http:///a HTTP/1.1", 400),
        (b"CONNECT /a HTTP/1.1", 400),
        (b"CONNECT h.example HTTP/1.1", 400),
        (b"GET / http/1.1", 400),
        (b"GET / HTTP/1", 400),
        (b"GET / HTTP/1.10", 400),
        (b"GET / HTTP/1.2", 505),
        (b"GET / HTTP/2.0", 505),
        (b"GET / HTTP/0.9", 505),
        (b"GET /" + b"a" * 32_800 + b" HTTP/1.1", 414),
    ],
)
def test_a_line_that_could_be_read_in_two_ways_is_refused(lines, line, status):
    with pytest.raises(Malformed) as refused:
        lines.request(line)
    assert refused.value.status == status


def test_status_lines_are_read(lines):
    assert lines.status(b"HTTP/1.1 200 OK") == (200, 1, "200 OK")
    assert lines.status(b"HTTP/1.0 404 Not here, \xfc") == (404, 0, "404 Not here, \\xfc")
    assert lines.status(b"HTTP/1.1 204 ") == lines.status(b"HTTP/1.1 204") == (204, 1, "204")


@pytest.mark.parametrize(
    "line",
    [
        b"", b"HTTP/1.1", b"HTTP/1.1 20 OK", b"HTTP/1.1 099 X", b"HTTP/2 200 OK", b"ICY 200 OK",
        b"HTTP/1.1  200 OK", b"http/1.1 200 OK", b"HTTP/1.1 200 a\0b", b"HTTP/1.1 +20 OK",
        b"HTTP/1.2 200 OK",
    ],
)  # fmt: skip
def test_a_status_line_that_is_none_is_refused(lines, line):
    with pytest.raises(Malformed):
        lines.status(line)


def test_lines_with_secrets_are_not_remembered(lines):
    for number in range(3_000):
        lines.request(b"GET /a?token=canary%d HTTP/1.1" % number)
        lines.request(b"GET /b?page=%d HTTP/1.1" % number)
    assert 0 < len(lines._requests) <= 1_024
    assert not [line for line in lines._requests if b"canary" in line]
