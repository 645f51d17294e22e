"""Messages that two parsers could read differently: none is passed on, each is answered natively.

The requests are the published forms of request smuggling (CL.TE, TE.CL, TE.TE, CL.CL, obs-fold,
line ends, chunk extensions, trailers, header names that gateways rewrite), each with a second
request inside that must never leave the gate.
"""

import random

import pytest
from replay import SESSION, Replay

from appliance.protocols.http1 import PROTOCOL
from appliance.sansio import CLIENT, UPSTREAM
from capture.frames import session_name
from capture.records import Operation, Result, Withheld

REFERENCE = session_name(SESSION).encode()
GET = b"GET /before HTTP/1.1\r\nHost: h\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
INSIDE = b"GET /smuggled?token=canary HTTP/1.1\r\nHost: h\r\nCookie: a=canary\r\n\r\n"


def post(fields, body=b""):
    return b"POST /x HTTP/1.1\r\nHost: h\r\n" + fields + b"\r\n\r\n" + body + INSIDE


CHUNKED = b"Transfer-Encoding: chunked"
LAST = b"0\r\n\r\n"
#: (name, request, status): nothing of the request may be forwarded
HEADS = [
    ("CL.TE", post(b"Content-Length: 6\r\n" + CHUNKED, LAST + b"G"), 400),
    ("TE.CL", post(CHUNKED + b"\r\nContent-Length: 4", b"5c\r\n"), 400),
    ("TE.CL of zero", post(CHUNKED + b"\r\nContent-Length: 0", LAST), 400),
    ("TE.TE", post(CHUNKED + b"\r\nTransfer-Encoding: identity", LAST), 400),
    ("TE.TE twice the same", post(CHUNKED + b"\r\n" + CHUNKED, LAST), 400),
    ("TE.TE in a list", post(b"Transfer-Encoding: chunked, identity", LAST), 400),
    ("TE chunked twice", post(b"Transfer-Encoding: chunked, chunked", LAST), 400),
    ("TE identity", post(b"Transfer-Encoding: identity", b""), 400),
    ("TE gzip before chunked", post(b"Transfer-Encoding: gzip, chunked", LAST), 501),
    ("TE empty", post(b"Transfer-Encoding:", LAST), 400),
    ("TE of another name", post(b"Transfer-Encoding: xchunked", LAST), 400),
    ("TE quoted", post(b'Transfer-Encoding: "chunked"', LAST), 400),
    ("TE with a parameter", post(b"Transfer-Encoding: chunked;q=1", LAST), 400),
    ("TE with a comma after", post(b"Transfer-Encoding: chunked,", LAST), 400),
    ("TE with a comma before", post(b"Transfer-Encoding: ,chunked", LAST), 501),
    ("TE after a vertical tab", post(b"Transfer-Encoding: \x0bchunked", LAST), 400),
    ("TE after a form feed", post(b"Transfer-Encoding: \x0cchunked", LAST), 400),
    ("TE after a no-break space", post(b"Transfer-Encoding: \xa0chunked", LAST), 400),
    ("TE with a NUL", post(b"Transfer-Encoding: chunked\0", LAST), 400),
    ("TE space colon", post(b"Transfer-Encoding : chunked", LAST), 400),
    ("TE tab colon", post(b"Transfer-Encoding\t: chunked", LAST), 400),
    ("TE with a space before", post(b" Transfer-Encoding: chunked", LAST), 400),
    ("TE folded", post(b"Transfer-Encoding:\r\n chunked", LAST), 400),
    ("TE folded after a header", post(b"X: 1\r\n\tTransfer-Encoding: chunked", LAST), 400),
    ("TE behind a bare LF", post(b"X: 1\nTransfer-Encoding: chunked", LAST), 400),
    ("TE behind a bare CR", post(b"X: 1\rTransfer-Encoding: chunked", LAST), 400),
    ("TE behind CR CR LF", post(b"X: 1\r\r\nTransfer-Encoding: chunked", LAST), 400),
    ("TE with an underscore", post(b"Transfer_Encoding: chunked", LAST), 400),
    ("TE with a dot", post(b"Transfer.Encoding: chunked", LAST), 400),
    ("TE that Connection removes", post(b"Connection: Transfer-Encoding\r\n" + CHUNKED, LAST), 400),
    ("TE in HTTP/1.0", post(CHUNKED, LAST).replace(b"HTTP/1.1", b"HTTP/1.0", 1), 400),
    ("CL.CL different", post(b"Content-Length: 0\r\nContent-Length: 9"), 400),
    ("CL.CL the same", post(b"Content-Length: 0\r\nContent-Length: 0"), 400),
    ("CL in a list", post(b"Content-Length: 0, 0"), 400),
    ("CL plus", post(b"Content-Length: +0"), 400),
    ("CL minus", post(b"Content-Length: -0"), 400),
    ("CL hexadecimal", post(b"Content-Length: 0x0"), 400),
    ("CL that begins with zero", post(b"Content-Length: 010", b"12345678"), 400),
    ("CL of other digits", post("Content-Length: \u0661".encode()), 400),
    ("CL with a space inside", post(b"Content-Length: 1 2"), 400),
    ("CL empty", post(b"Content-Length:"), 400),
    ("CL too long", post(b"Content-Length: 18446744073709551617"), 400),
    ("CL space colon", post(b"Content-Length : 9"), 400),
    ("CL with an underscore", post(b"Content_Length: 9"), 400),
    ("CL behind a NUL", post(b"X: \0\r\nContent-Length: 9"), 400),
    ("CL that Connection removes", post(b"Connection: content-length\r\nContent-Length: 9"), 400),
    ("Host twice", post(b"Host: other"), 400),
    ("Host that Connection removes", post(b"Connection: close, host"), 400),
    ("a header without a name", post(b": 1"), 400),
    ("a header without a colon", post(b"nothing"), 400),
    ("a header with brackets", post(b"X[]: 1"), 400),
    ("a header with DEL", post(b"X: \x7f"), 400),
    ("bare LF everywhere", INSIDE.replace(b"\r\n", b"\n") + INSIDE, 400),
    ("bare LF at the end of a head", post(b"X: 1").replace(b"X: 1\r\n\r\n", b"X: 1\r\n\n"), 400),
    ("bare CR everywhere", INSIDE.replace(b"\r\n", b"\r") + b"\n", 400),
    ("two empty lines first", b"\r\n\r\n" + INSIDE, 400),
    ("a bare LF first", b"\n" + INSIDE, 400),
    ("a space first", b" " + INSIDE, 400),
    ("a NUL first", b"\0" + INSIDE, 400),
    ("two spaces before the target", INSIDE.replace(b" /", b"  /"), 400),
    ("a tab before the target", INSIDE.replace(b" /", b"\t/"), 400),
    ("a space after the version", INSIDE.replace(b"1.1\r", b"1.1 \r"), 400),
    ("a space in the target", INSIDE.replace(b"/smuggled", b"/ smuggled"), 400),
    ("a CR in the target", INSIDE.replace(b"/smuggled", b"/\rsmuggled"), 400),
    ("HTTP/0.9", b"GET /smuggled?token=canary\r\n\r\n", 400),
    ("HTTP/1.2", INSIDE.replace(b"1.1", b"1.2"), 505),
    ("HTTP/2.0", INSIDE.replace(b"1.1", b"2.0"), 505),
    ("http/1.1", INSIDE.replace(b"HTTP", b"http"), 400),
    ("CONNECT with a body", b"CONNECT h:1 HTTP/1.1\r\nContent-Length: 9\r\n\r\n" + INSIDE, 400),
    ("CONNECT with chunks", b"CONNECT h:1 HTTP/1.1\r\n" + CHUNKED + b"\r\n\r\n" + INSIDE, 400),
    ("CONNECT to a path", INSIDE.replace(b"GET", b"CONNECT"), 400),
    ("a target that is no path", INSIDE.replace(b" /", b" "), 400),
    ("a line that is too long", b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n\r\n", 414),
    ("a line without end", b"GET /" + b"a" * 40_000, 414),
    ("a head that is too long", post(b"X: " + b"a" * 70_000), 431),
    ("a head without end", b"GET / HTTP/1.1\r\n" + b"X: 1\r\n" * 12_000, 431),
    ("too many headers", post(b"X: 1\r\n" * 300 + b"Y: 1"), 431),
]
#: (name, body): the head is passed on, and the body as far as it is clear
BODIES = [
    ("a size with LF", b"1\nx\r\n" + LAST),
    ("a size with CR", b"1\rx\r\n" + LAST),
    ("a size with 0x", b"0x1\r\nx\r\n" + LAST),
    ("a size with plus", b"+1\r\nx\r\n" + LAST),
    ("a negative size", b"-1\r\nx\r\n" + LAST),
    ("a size with a space", b"1 \r\nx\r\n" + LAST),
    ("a space before a size", b" 1\r\nx\r\n" + LAST),
    ("a size with an underscore", b"1_0\r\nx\r\n" + LAST),
    ("a size with a NUL", b"1\0\r\nx\r\n" + LAST),
    ("an empty size", b"\r\n" + LAST),
    ("a size that overflows", b"10000000000000001\r\nx\r\n" + LAST),
    ("an extension with LF (TERM.EXT)", b"1;a\nx\r\n" + LAST),
    ("an extension with CR", b"1;a\rb\r\nx\r\n" + LAST),
    ("an extension without end", b"1;" + b"a" * 2_000),
    ("a chunk longer than its size", b"1\r\nxx\r\n" + LAST),
    ("a chunk that ends in LF", b"1\r\nx\n" + LAST),
    ("a chunk that ends in CR", b"1\r\nx\r" + LAST),
    ("a last chunk that ends in LF", b"0\n\r\n"),
    ("a last chunk, LF inside", b"0\r\n\n"),
    ("Content-Length in a trailer", b"0\r\nContent-Length: 9\r\n\r\n"),
    ("Transfer-Encoding in a trailer", b"0\r\ntransfer-encoding: chunked\r\n\r\n"),
    ("Host in a trailer", b"0\r\nHost: other\r\n\r\n"),
    ("a trailer with LF", b"0\r\nX: 1\nGET /smuggled HTTP/1.1\r\n\r\n"),
    ("a folded trailer", b"0\r\nX: 1\r\n 2\r\n\r\n"),
    ("trailers without end", b"0\r\n" + b"X: 1\r\n" * 3_000),
]
#: (name, response): nothing of it may be passed on
ANSWERS = [
    ("CL and TE", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + CHUNKED + b"\r\n\r\n" + LAST),
    ("two CL", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nokk"),
    ("CL no number", b"HTTP/1.1 200 OK\r\nContent-Length: two\r\n\r\nok"),
    ("TE not chunked last", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, gzip\r\n\r\n"),
    ("TE identity", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\nok"),
    ("TE in HTTP/1.0", b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + LAST),
    ("obs-fold", b"HTTP/1.1 200 OK\r\nX: 1\r\n 2\r\nContent-Length: 0\r\n\r\n"),
    ("bare LF", b"HTTP/1.1 200 OK\nContent-Length: 0\n\n"),
    ("bare LF in a header", b"HTTP/1.1 200 OK\r\nX: 1\nContent-Length: 0\r\n\r\n"),
    ("space before a colon", b"HTTP/1.1 200 OK\r\nContent-Length : 0\r\n\r\n"),
    ("NUL", b"HTTP/1.1 200 OK\r\nX: \0\r\n\r\n"),
    ("no status line", b"ok\r\n\r\n"),
    ("HTTP/2", b"HTTP/2 200 OK\r\n\r\n"),
    ("SSH", b"SSH-2.0-OpenSSH_9.2\r\n\r\n"),
    ("a switch that nobody asked for", b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"),
    ("a head without end", b"HTTP/1.1 200 OK\r\n" + b"X: 1\r\n" * 12_000),
    ("a Set-Cookie that is folded", b"HTTP/1.1 200 OK\r\nSet-Cookie: a=\r\n canary\r\n\r\n"),
]  # fmt: skip


def names(table):
    return [entry[0] for entry in table]


def feed_in_pieces(talk, side, data, seed):
    """Feed whole, byte by byte, or in random pieces."""
    generator = random.Random(seed)
    longest = {0: len(data), 1: 1}.get(seed, 60)
    while data:
        length = longest if seed < 2 else generator.randint(1, longest)
        talk.feed(side, data[:length])
        data = data[length:]


def seeds(data):
    return range(5) if len(data) < 5_000 else (0, 2)


@pytest.mark.parametrize(("name", "request_bytes", "status"), HEADS, ids=names(HEADS))
def test_an_ambiguous_request_is_refused_and_recorded(name, request_bytes, status):
    for seed in seeds(request_bytes):
        talk = Replay(PROTOCOL)
        talk.feed(CLIENT, GET)
        feed_in_pieces(talk, CLIENT, request_bytes, seed)
        assert talk.failed is None
        assert talk.relayed[CLIENT] in (GET, GET + b"\r\n"), "nothing of it went on"
        assert not talk.own[CLIENT], "the answer before it is still to come"
        talk.feed(UPSTREAM, OK)
        refused = bytes(talk.own[CLIENT])
        assert refused.startswith(b"HTTP/1.1 %d " % status), refused
        assert REFERENCE in refused
        assert talk.closed == {CLIENT, UPSTREAM}
        denied = talk.of(Operation)[1]
        assert denied.verdict == "denied"
        assert [result.op for result in talk.of(Result)] == [1, 2]
        assert talk.of(Result)[1].detail["by"] == "gate"
        withheld = talk.of(Withheld)[0]
        assert withheld.side == "client"
        assert withheld.offset == len(talk.relayed[CLIENT]) == denied.offset


@pytest.mark.parametrize(("name", "request_bytes", "status"), HEADS, ids=names(HEADS))
def test_secrets_in_an_ambiguous_request_are_hidden_all_the_same(name, request_bytes, status):
    for seed in seeds(request_bytes):
        talk = Replay(PROTOCOL)
        feed_in_pieces(talk, CLIENT, request_bytes, seed)
        assert b"canary" not in talk.captured[CLIENT]
        assert "canary" not in repr(talk.records)
        assert b"canary" not in talk.own[CLIENT]


@pytest.mark.parametrize(("name", "body"), BODIES, ids=names(BODIES))
def test_a_body_whose_end_is_unclear_never_ends(name, body):
    head = post(CHUNKED, b"2\r\nab\r\n").removesuffix(INSIDE)
    clear = set()
    for seed in seeds(body):
        talk = Replay(PROTOCOL)
        feed_in_pieces(talk, CLIENT, head + body + INSIDE, seed)
        assert talk.relayed[CLIENT].startswith(head)
        assert INSIDE not in talk.relayed[CLIENT]
        assert b"\r\n0\r\n\r\n" not in talk.relayed[CLIENT]
        assert talk.own[CLIENT].startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 "))
        assert REFERENCE in talk.own[CLIENT]
        assert talk.closed == {CLIENT, UPSTREAM}
        assert [operation.verdict for operation in talk.of(Operation)] == ["allowed"]
        assert [result.status for result in talk.of(Result)] == ["error"]
        assert b"canary" not in talk.captured[CLIENT]
        clear.add(bytes(talk.relayed[CLIENT]))
    assert len(clear) == 1, "how it was cut must not matter"


def test_an_answer_to_a_request_that_was_refused_is_not_passed_on():
    talk = Replay(PROTOCOL)
    talk.feed(CLIENT, GET + HEADS[0][1])
    talk.feed(UPSTREAM, OK + OK)
    assert talk.relayed[UPSTREAM] == OK
    assert talk.own[CLIENT].startswith(b"HTTP/1.1 400 ")


def test_a_refusal_that_can_no_longer_be_given_in_order_only_ends_the_session():
    for said in (b"", OK[:-1]):
        talk = Replay(PROTOCOL)
        talk.feed(CLIENT, GET + HEADS[0][1])
        if said:
            talk.feed(UPSTREAM, said)
        talk.feed(UPSTREAM, None)
        assert not talk.own[CLIENT]
        assert talk.closed == {CLIENT, UPSTREAM}
        assert [result.status for result in talk.of(Result)] == ["cut", "cut"]


def test_a_body_that_breaks_inside_its_own_answer_ends_the_session():
    talk = Replay(PROTOCOL)
    talk.feed(CLIENT, post(CHUNKED, b"2\r\nab\r\n").removesuffix(INSIDE))
    talk.feed(UPSTREAM, OK[:-1])
    talk.feed(CLIENT, b"bad size\r\n")
    assert not talk.own[CLIENT]
    assert talk.closed == {CLIENT, UPSTREAM}


@pytest.mark.parametrize(("name", "answer"), ANSWERS, ids=names(ANSWERS))
def test_an_ambiguous_response_is_replaced(name, answer):
    for seed in seeds(answer):
        talk = Replay(PROTOCOL)
        talk.feed(CLIENT, GET + GET + GET)
        talk.feed(UPSTREAM, OK)
        feed_in_pieces(talk, UPSTREAM, answer + OK, seed)
        assert talk.failed is None
        assert talk.relayed[UPSTREAM] == OK
        assert talk.own[CLIENT].startswith(b"HTTP/1.1 502 Bad Gateway\r\n")
        assert REFERENCE in talk.own[CLIENT]
        assert talk.closed == {CLIENT, UPSTREAM}
        assert [result.status for result in talk.of(Result)] == ["ok", "error", "cut"]
        assert talk.of(Withheld)[0].side == "upstream"
        assert b"canary" not in talk.captured[UPSTREAM]


def test_an_interim_answer_does_not_stop_the_replacement():
    talk = Replay(PROTOCOL)
    talk.feed(CLIENT, GET)
    interim = b"HTTP/1.1 100 Continue\r\n\r\n"
    talk.feed(UPSTREAM, interim + ANSWERS[0][1])
    assert talk.relayed[UPSTREAM] == interim
    assert talk.own[CLIENT].startswith(b"HTTP/1.1 502 ")


def test_a_response_that_breaks_after_its_head_ends_the_session():
    talk = Replay(PROTOCOL)
    talk.feed(CLIENT, GET)
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n"
    talk.feed(UPSTREAM, head + b"-1\r\n")
    assert talk.relayed[UPSTREAM] == head
    assert not talk.own[CLIENT]
    assert talk.closed == {CLIENT, UPSTREAM}
    assert [result.status for result in talk.of(Result)] == ["cut"]


@pytest.mark.parametrize("extra", [OK, b"HTTP/1.1 408 Request Timeout\r\n\r\n", b"x"])
def test_an_answer_that_nothing_asked_for_is_not_passed_on(extra):
    """It would become the answer to the next request (response queue poisoning)."""
    for early in (b"", GET):
        talk = Replay(PROTOCOL)
        if early:
            talk.feed(CLIENT, early)
            talk.feed(UPSTREAM, OK + extra)
        else:
            talk.feed(UPSTREAM, extra)
        assert talk.relayed[UPSTREAM] == (OK if early else b"")
        assert not talk.own[CLIENT]
        assert talk.closed == {CLIENT, UPSTREAM}
        assert talk.of(Withheld)[-1].why == "a response that nothing asked for"


def test_an_answer_to_head_that_has_a_body_ends_the_session():
    talk = Replay(PROTOCOL)
    talk.feed(CLIENT, GET.replace(b"GET", b"HEAD"))
    talk.feed(UPSTREAM, OK)
    assert talk.relayed[UPSTREAM] == OK.removesuffix(b"ok")
    assert talk.closed == {CLIENT, UPSTREAM}
