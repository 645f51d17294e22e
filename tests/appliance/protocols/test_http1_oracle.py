"""What the layer makes of requests and responses, against llhttp (the parser of Node.js).

Whatever the layer passes on, llhttp reads as the same messages, of the same lengths; and what is
written by the book passes.
"""

import httptools
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from replay import Replay

from appliance.protocols.http1 import PROTOCOL
from appliance.sansio import CLIENT, UPSTREAM
from capture.records import Operation, Result

STRICTER = (httptools.HttpParserInvalidMethodError, httptools.HttpParserInvalidURLError)
MANY = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))


class Seen:
    """The messages that llhttp reported: [method or status, body bytes, whether it was whole]."""

    def __init__(self, data, *, requests):
        self.messages = []
        self.refused = None
        make = httptools.HttpRequestParser if requests else httptools.HttpResponseParser
        self._parser = make(self)
        self._requests = requests
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # what follows is another protocol's
        except httptools.HttpParserError as wrong:
            self.refused = wrong

    def on_headers_complete(self):
        parser = self._parser
        start = parser.get_method().decode() if self._requests else parser.get_status_code()
        self.messages.append([start, 0, False])

    def on_body(self, body):
        self.messages[-1][1] += len(body)

    def on_message_complete(self):
        self.messages[-1][2] = True


METHODS = st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "PROPFIND"])
TARGETS = st.from_regex(r"/[a-z0-9/.~_%-]{0,20}(\?[a-z]{1,5}=[a-z0-9&=;,]{0,20})?", fullmatch=True)
NAMES = st.from_regex(r"X-[A-Za-z0-9!#$%&'*+.^_`|~-]{1,12}", fullmatch=True)
VALUES = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20)
FIELDS = st.lists(st.tuples(NAMES, VALUES), max_size=5)
BODIES = st.one_of(
    st.none(), st.binary(max_size=200), st.lists(st.binary(min_size=1, max_size=60), max_size=5)
)


def framed(start, fields, body):
    """Return a message: `body` is None, whole, or in chunks."""
    lines = [start, *(f"{name}: {value}" for name, value in fields)]
    if isinstance(body, bytes):
        lines.append(f"Content-Length: {len(body)}")
    elif body is not None:
        lines.append("Transfer-Encoding: chunked")
        body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in body) + b"0\r\n\r\n"
    return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


@st.composite
def requests(draw):
    start = f"{draw(METHODS)} {draw(TARGETS)} HTTP/1.1"
    return framed(start, [("Host", "h.example"), *draw(FIELDS)], draw(BODIES))


@st.composite
def answers(draw):
    status = draw(st.sampled_from([200, 201, 206, 302, 400, 404, 500, 204, 304, 100, 103]))
    body = None if status in {100, 103, 204, 304} else draw(BODIES.filter(lambda b: b is not None))
    return framed(f"HTTP/1.1 {status} Reason", draw(FIELDS), body)


def mutated(draw, data):
    """Change bytes here and there, preferably to what parsers disagree about."""
    data = bytearray(data)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data) - 1))
        piece = draw(st.sampled_from(TRICKS))
        if draw(st.booleans()):
            data[at : at + draw(st.integers(0, 2))] = piece
        else:
            found = data.find(draw(st.sampled_from(PLACES)), at)
            data[found + 1 : found + 1] = piece
    return bytes(data)


TRICKS = [
    b"\n", b"\r", b"\r\n", b" ", b"\t", b"\0", b"\x0b", b",", b";", b":", b"+", b"0", b"1", b"a",
    b"_", b"\xff", b"\r\n ", b"\r\nContent-Length: 3", b"\r\nTransfer-Encoding: chunked",
    b"\r\n\r\n", b"\r\nTransfer-Encoding: identity", b"\r\nContent-Length: 0",
    b"\r\nConnection: close", b"1.0",
]  # fmt: skip
PLACES = [b"\n", b"\r", b":", b" ", b"0", b"1"]


@MANY
@given(st.lists(requests(), min_size=1, max_size=4))
def test_requests_by_the_book_pass_and_are_counted_as_llhttp_counts(messages):
    data = b"".join(messages)
    talk = Replay(PROTOCOL)
    talk.feed(CLIENT, data)
    talk.feed(UPSTREAM, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n" * len(messages))
    assert talk.relayed[CLIENT] == data
    assert not talk.own[CLIENT]
    seen = Seen(data, requests=True)
    assert not seen.refused
    found = [
        [operation.verb, result.detail["request_body"], True]
        for operation, result in zip(talk.of(Operation), talk.of(Result), strict=True)
    ]
    assert found == seen.messages
    starts = [operation.offset for operation in talk.of(Operation)]
    assert starts == [sum(map(len, messages[:n])) for n in range(len(messages))]


@MANY
@given(st.data())
@example(data=None)
def test_what_is_passed_on_of_mutated_requests_is_read_alike(data):
    if data is None:
        sent = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
    else:
        sent = b"".join(mutated(data.draw, data.draw(requests())) for _ in range(2))
    talk = Replay(PROTOCOL)
    talk.feed(CLIENT, sent)
    passed = bytes(talk.relayed[CLIENT])
    assert sent.startswith(passed)
    allowed = [operation for operation in talk.of(Operation) if operation.verdict == "allowed"]
    seen = Seen(passed, requests=True)
    methods = [operation.verb for operation in allowed]
    known = [start for start, *_ in seen.messages]
    if seen.refused:  # llhttp knows some methods only, targets of ASCII, and nothing after a close
        late = "Data after `Connection: close`" in str(seen.refused)
        assert late or isinstance(seen.refused, STRICTER), seen.refused
        assert methods[: len(known)] == known
        return
    assert known == methods
    while talk.layer._exchanges.pending:
        talk.feed(UPSTREAM, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    bodies = [result.detail["request_body"] for result in talk.of(Result)][: len(allowed)]
    assert bodies == [size for _, size, _ in seen.messages]


@MANY
@given(st.lists(answers(), min_size=1, max_size=4))
def test_answers_by_the_book_pass_and_are_counted_as_llhttp_counts(messages):
    data = b"".join(messages)
    seen = Seen(data, requests=False)
    assert not seen.refused
    final = [message for message in seen.messages if message[0] >= 200]
    talk = Replay(PROTOCOL)
    talk.feed(CLIENT, b"GET / HTTP/1.1\r\nHost: h\r\n\r\n" * (len(final) + 1))
    talk.feed(UPSTREAM, data)
    assert talk.relayed[UPSTREAM] == data
    found = [[int(r.tag[:3]), r.detail["body"], True] for r in talk.of(Result)]
    assert found == final


@MANY
@given(st.data())
def test_what_is_passed_on_of_mutated_answers_is_read_alike(data):
    sent = b"".join(mutated(data.draw, data.draw(answers())) for _ in range(2))
    talk = Replay(PROTOCOL)
    talk.feed(CLIENT, b"GET / HTTP/1.1\r\nHost: h\r\n\r\n" * 8)
    talk.feed(UPSTREAM, sent)
    passed = bytes(talk.relayed[UPSTREAM])
    assert sent.startswith(passed)
    seen = Seen(passed, requests=False)
    mine = [[int(r.tag.split()[0]), r.detail["body"]] for r in talk.of(Result) if r.status != "cut"]
    theirs = [[start, size] for start, size, whole in seen.messages if whole and start >= 200]
    mine = [entry for entry in mine if entry[0] != 502 or entry in theirs]
    assert mine[: len(theirs)] == theirs[: len(mine)]
