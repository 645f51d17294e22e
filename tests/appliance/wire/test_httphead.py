import random

import pytest

from appliance.wire.httphead import MOST_FACT_CHARS, FieldReader, Malformed, check_lines
from appliance.wire.httpsecrets import Secrets


@pytest.fixture
def reader():
    return FieldReader(Secrets(("X-Our-Login",)))


def test_fields_are_read(reader):
    fields = reader.read(
        b"HOST: H.Example:80\r\ncontent-length: 12 \r\nConnection: Keep-Alive, close\r\n"
        b"User-Agent:curl\r\nUpgrade: h2c\r\nUpgrade: websocket\r\nX-Other: 1\r\n"
    )
    assert fields.host == "h.example:80"
    assert fields.length == 12
    assert fields.upgrade == "h2c, websocket"
    assert fields.facts == {"user-agent": "curl"}
    assert not fields.spans
    assert not fields.credentials


def test_no_fields_at_all_are_fields(reader):
    assert reader.read(b"").host is None


def test_chunked_is_read_however_it_is_spelled(reader):
    for coding in (b"chunked", b"Chunked", b" \tCHUNKED  "):
        fields = reader.read(b"Transfer-Encoding:" + coding + b"\r\n")
        assert fields.coding == b"chunked"
    assert reader.read(b"Transfer-Encoding: gzip, chunked\r\n").coding == b"gzip, chunked"


def test_credentials_are_told_apart_from_their_scheme(reader):
    block = b"X: 1\r\nAuthorization: Bearer abc\r\nX-Our-Login: open sesame\r\n"
    fields = reader.read(block)
    assert fields.credentials == (
        ("authorization", "Bearer", b"abc"),
        ("x-our-login", "", b"open sesame"),
    )
    assert [block[start:end] for start, end, _ in fields.spans] == [b"Bearer abc", b"open sesame"]
    assert [kind for *_, kind in fields.spans] == ["authorization", "x-our-login"]


def test_facts_hold_no_secret_and_are_bounded(reader):
    fields = reader.read(
        b"Referer: http://h/?token=canary&x=1\r\nUser-Agent: " + b"a" * 1000 + b"\r\n"
        b"Via: 1.1 a\r\nVia: 1.1 b\r\nOrigin: \xff\r\n"
    )  # fmt: skip
    assert fields.facts["referer"] == "http://h/?token=[hidden]&x=1"
    assert len(fields.facts["user-agent"]) == MOST_FACT_CHARS
    assert fields.facts["via"] == "1.1 a, 1.1 b"
    assert fields.facts["origin"] == "\\xff"


def test_a_header_of_facts_that_is_configured_as_secret_is_no_fact():
    fields = FieldReader(Secrets(("User-Agent",))).read(b"User-Agent: canary\r\n")
    assert fields.facts == {}
    assert fields.spans


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (b"Content-Length: 1\r\nContent-Length: 1\r\n", "more than one Content-Length"),
        (b"Content-Length: 1, 1\r\n", "no plain number"),
        (b"Content-Length: +1\r\n", "no plain number"),
        (b"Content-Length: -1\r\n", "no plain number"),
        (b"Content-Length: 0x1\r\n", "no plain number"),
        (b"Content-Length: 1_0\r\n", "no plain number"),
        (b"Content-Length: \r\n", "no plain number"),
        (b"Content-Length: 1 1\r\n", "no plain number"),
        (b"Content-Length: \xd9\xa1\r\n", "no plain number"),
        (b"Content-Length: 1000000000000000000\r\n", "no plain number"),
        (b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n", "both"),
        (b"Transfer-Encoding: chunked\r\nContent-Length: 1\r\n", "both"),
        (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", "more than one Transfer"),
        (b"Transfer-Encoding: identity\r\n", "does not end in chunked"),
        (b"Transfer-Encoding: chunked, identity\r\n", "does not end in chunked"),
        (b"Transfer-Encoding: chunked, chunked\r\n", "does not end in chunked"),
        (b"Transfer-Encoding: xchunked\r\n", "does not end in chunked"),
        (b"Transfer-Encoding: chunked;q=1\r\n", "does not end in chunked"),
        (b'Transfer-Encoding: "chunked"\r\n', "does not end in chunked"),
        (b"Transfer-Encoding: chunked,\r\n", "does not end in chunked"),
        (b"Transfer-Encoding:\r\n", "does not end in chunked"),
        (b"Transfer-Encoding: \x0bchunked\r\n", "control character"),
        (b"Transfer-Encoding: \xa0chunked\r\n", "does not end in chunked"),
        (b"Transfer_Encoding: chunked\r\n", "take for Transfer-Encoding"),
        (b"Content_Length: 1\r\n", "take for Content-Length"),
        (b"content.length: 1\r\n", "take for Content-Length"),
        (b"Host: a\r\nHost: a\r\n", "more than one Host"),
        (b"Host:\r\nhost: a\r\n", "more than one Host"),
        (b"Host: " + b"a" * 300 + b"\r\n", "too long"),
        (b"X" * 300 + b": a\r\n", "too long"),
        (b"Connection: close, Content-Length\r\n", "Connection names"),
        (b"Connection: transfer-encoding\r\n", "Connection names"),
        (b"Connection: Host\r\n", "Connection names"),
        (b"X : 1\r\n", "no token"),
        (b"X\t: 1\r\n", "no token"),
        (b": 1\r\n", "no token"),
        (b"X(: 1\r\n", "no token"),
        (b"\xff: 1\r\n", "no token"),
        (b"X\r\n", "without a colon"),
        (b"Host\r\n", "without a colon"),
        (b" X: 1\r\n", "begins with a space"),
        (b"X: 1\r\n 2\r\n", "begins with a space"),
        (b"X: 1\r\n\tTransfer-Encoding: chunked\r\n", "begins with a space"),
        (b"X: 1\nY: 2\r\n", "bare LF"),
        (b"X: 1\rY: 2\r\n", "bare CR"),
        (b"X: 1\r\r\n", "bare CR"),
        (b"X: a\0b\r\n", "NUL"),
        (b"X: a\x7fb\r\n", "control character"),
        (b"X: a\rb\nc\r\n", "control character"),
        (b"X: 1\r\n" * 300, "too many"),
    ],
)
def test_fields_that_could_be_read_in_two_ways_are_refused(reader, block, reason):
    reader.read(b"Host: a\r\nX: 1\r\nContent-Length: 1\r\n")  # names are remembered from here on
    for _ in range(2):
        with pytest.raises(Malformed, match=reason):
            reader.read(block)


@pytest.mark.parametrize("line", [b"Transfer-Encoding: chunked\t", b"Content-Length: 5\t5"])
def test_what_llhttp_does_not_accept_is_refused(reader, line):
    with pytest.raises(Malformed):
        reader.read(line + b"\r\n")


PIECES = [
    b"Host", b"Content-Length", b"Transfer-Encoding", b"Connection", b"X-A", b"Upgrade", b"TE",
    b"content-length", b"Content_Length", b":", b": ", b":\t", b"0", b"1", b"00", b"chunked",
    b"gzip", b", ", b"close", b"upgrade", b"identity", b" ", b"\t", b"\r\n", b"\r\n", b"\r", b"\n",
    b"\xff",
    b"\0", b"\x0b", b"\x7f", b"a",
]  # fmt: skip


def test_llhttp_has_nothing_to_add_but_tabs(reader):
    """So a hole in the reader would have to be one in llhttp, too, before it can be used."""
    generator = random.Random(7)
    refused = {}
    for _ in range(40_000):
        count = generator.randint(1, 14)
        block = b"".join(generator.choice(PIECES) for _ in range(count)) + b"\r\n"
        try:
            reader.read(block)
        except Malformed as wrong:
            refused[block] = str(wrong)
    assert 1_000 < len(refused) < 39_000
    by_llhttp = [block for block, reason in refused.items() if "llhttp" in reason]
    assert all(b"\t" in block for block in by_llhttp)


def test_a_length_that_begins_with_zero_is_marked(reader):
    assert reader.read(b"Content-Length: 010\r\n").padded
    assert not reader.read(b"Content-Length: 0\r\n").padded


def test_lines_may_hold_what_a_field_may_hold():
    check_lines(b"X: a\tb \xff ~\r\n" * 3)


def test_names_are_remembered_without_end_being_possible(reader):
    for number in range(5_000):
        reader.read(b"X-%d: 1\r\n" % number)
    assert len(reader._names) <= 2_048
    assert reader.read(b"X-4999: 1\r\nContent-Length: 7\r\n").length == 7
