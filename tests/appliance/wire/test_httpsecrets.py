import itertools

import pytest

from appliance.wire.httpsecrets import HEADERS, PARAMETERS, Secrets, clip, redact, scheme

SECRETS = Secrets(("X-Our-Login",), ("ourKey",))


def shown(text, spans):
    return redact(text, spans).decode()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"GET /a?access_token=abc HTTP/1.1", "GET /a?access_token=[hidden] HTTP/1.1"),
        (b"GET /a?x=1&api_key=abc&y=2 HTTP/1.1", "GET /a?x=1&api_key=[hidden]&y=2 HTTP/1.1"),
        (b"/a?API-Key=abc", "/a?API-Key=[hidden]"),
        (b"/a?accessToken=abc#token=def", "/a?accessToken=[hidden]#token=[hidden]"),
        (b"/a?access%5Ftoken=abc", "/a?access%5Ftoken=[hidden]"),
        (b"/a?access%255Ftoken=abc", "/a?access%255Ftoken=[hidden]"),
        (b"/a;jsessionid=ABC/b?x=1", "/a;jsessionid=[hidden]/b?x=1"),
        (b"/a?x=1;token=a;b&y=2", "/a?x=1;token=[hidden];b&y=2"),
        (b"/a?token=a;b&y=2", "/a?token=[hidden]&y=2"),
        (b"/a?token=a?b", "/a?token=[hidden]"),
        (b"/a;pwd=%3Ftoken%3Dab?c&d", "/a;pwd=[hidden]&d"),
        (b"/a?token=a&token=b", "/a?token=[hidden]&token=[hidden]"),
        (b"/a?token=", "/a?token="),
        (b"/a?token", "/a?token"),
        (b"/a?ourkey=1&our_key=2", "/a?ourkey=[hidden]&our_key=[hidden]"),
        (
            b"/a?next=http%3A%2F%2Fh%2F%3Ftoken%3Dabc",
            "/a?next=http%3A%2F%2Fh%2F%3Ftoken%3D[hidden]",
        ),
        (b"/a?next=%252F%253Ftoken%253Dabc&z=1", "/a?next=%252F%253Ftoken%253D[hidden]&z=1"),
        (b"/a?next=/b?token=abc&z=1", "/a?next=/b?token=[hidden]&z=1"),
        (b"<http://h/?sig=abc>; rel=next", "<http://h/?sig=[hidden]>; rel=next"),
        (b"http://user:pass@h/a", "http://[hidden]@h/a"),
        (b"http://h/a@b", "http://h/a@b"),
        (b"/tokens?page_token=3&nexttoken=4", "/tokens?page_token=3&nexttoken=4"),
        (b"text/html; q=0.9, charset=utf-8", "text/html; q=0.9, charset=utf-8"),
    ],
)
def test_secret_parameters_are_found_in_a_text(text, expected):
    assert shown(text, SECRETS.in_text(text)) == expected


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_every_parameter_is_found_however_it_is_written(name):
    text = f"/?a=1&{'-'.join(name).upper()}=canary".encode()
    assert b"canary" not in redact(text, SECRETS.in_text(text))


@pytest.mark.parametrize("name", sorted(HEADERS | {"x-our-login"}))
def test_every_secret_header_is_hidden_whole(name):
    for spelled in (name, name.title(), name.upper()):
        line = f"{spelled}: \t Bearer canary ".encode()
        assert shown(line, SECRETS.in_line(line)) == f"{spelled}: \t [hidden]"


def test_a_secret_header_without_a_value_hides_nothing():
    assert SECRETS.in_line(b"Cookie:  ") == []
    assert SECRETS.in_line(b"Cookie") == []


def test_lines_that_are_not_whole_are_hidden_as_far_as_they_go():
    lines = b"Host: a\r\nCookie: a=b\r\nReferer: http://h/?token=x\r\nAuthorization: Bea"
    assert shown(lines, SECRETS.in_lines(lines)).split("\r\n") == [
        "Host: a",
        "Cookie: [hidden]",
        "Referer: http://h/?token=[hidden]",
        "Authorization: [hidden]",
    ]


def test_what_is_hidden_of_lines_does_not_depend_on_where_they_were_cut():
    lines = (
        b"GET /a;sid=7?x=%3Ftoken%3D1&pwd=a;b HTTP/1.1\r\nCookie:  a=b \r\nX: ?sig=1 2\r\n"
        b'authorization:Basic abc\r\nReferer: http://h/?token=a"b'
    )  # fmt: skip
    whole = {at for start, end, _ in SECRETS.in_lines(lines) for at in range(start, end)}
    stepwise = set()
    for end in range(1, len(lines) + 1):
        # a line's end is not looked at before it is whole
        upto = lines[: end - 1] if lines[end - 1 : end] == b"\r" else lines[:end]
        for start, stop, _ in clip(SECRETS.in_lines(upto), end - 1):
            stepwise.update(range(start, stop))
    assert stepwise == whole


@pytest.mark.parametrize(
    "junk",
    [
        b"authorization : Bearer canary",
        b"Authorization\0: canary",
        b"X: a\nAuthorization: canary\n",
        b"X: a\rCookie: canary\r",
        b"Authorization: Bearer\r\n canary",
        b"Authorization: Bearer\n\tcanary\n\tcanary",
        b"proxy_authorization: canary",
        b"GET /?access_token=canary\0 HTTP/1.1",
        b"\0\0Set-Cookie: a=canary; Path=/",
        b"X-Our-Login: canary",
        b"GET http://user:canary@h/",
    ],
)
def test_what_looks_like_a_secret_is_found_in_junk(junk):
    spans = SECRETS.in_junk(junk)
    assert b"canary" not in redact(junk, spans)
    assert all(start < end for start, end, _ in spans)
    assert all(one[1] < two[0] for one, two in itertools.pairwise(spans))


def test_only_schemes_that_are_known_are_shown():
    assert scheme(b"Bearer abc") == b"Bearer "
    assert scheme(b"basic  abc") == b"basic  "
    assert scheme(b"AWS4-HMAC-SHA256 Credential=a") == b"AWS4-HMAC-SHA256 "
    for secret in (b"Bearer", b"abc def", b"Basicabc", b"Bearer\tabc", b""):
        assert scheme(secret) == b""


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text",
    [
        b"?" * 60_000, b"&a" * 30_000, b"%25" * 20_000, b"://" * 20_000, b"?a=" * 20_000,
        b"?token=a" * 8_000,
        b"://" + b"a" * 60_000, b"?" + b"%25" * 20_000, b"Cookie" * 10_000, b"Cookie:\n " * 8_000,
        b"Cookie: a\n\n\n\n\n" * 5_000 + b"\n" * 20_000, b";" * 60_000,
    ],
    ids=lambda text: repr(text[:8]),
)  # fmt: skip
def test_hostile_texts_take_no_longer_than_their_length(text):
    for _ in range(5):
        SECRETS.in_lines(text)
        SECRETS.in_junk(text)
