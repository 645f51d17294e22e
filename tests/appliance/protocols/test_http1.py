"""One session of HTTP/1.1, fed as the driver feeds it."""

import re
from pathlib import Path

import pytest
from replay import SESSION, TIME, Replay, digest

from appliance.config import Http
from appliance.protocols.http1 import PROTOCOL
from appliance.sansio import (
    BOTH,
    CLIENT,
    FOREVER,
    NEITHER,
    ONLY_UPSTREAM,
    UPSTREAM,
    Answer,
    Audit,
    Data,
    Elapsed,
    Eof,
    Facts,
    Forward,
    Origin,
    Relay,
    SetTimer,
)
from appliance.wire.httphead import FACTS
from appliance.wire.httpsecrets import HEADERS, PARAMETERS
from capture.frames import session_name
from capture.records import Fact, Operation, Result, Withheld

GET = b"GET /a HTTP/1.1\r\nHost: h.example\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.fixture
def talk():
    return Replay(PROTOCOL)


def layer(http=None):
    facts = Facts(SESSION, ("192.0.2.1", 1), ("192.0.2.2", 80), digest, http or Http())
    return PROTOCOL.layer(facts)


def results(talk):
    return [(result.op, result.status, result.tag) for result in talk.of(Result)]


# -- what is recorded


def test_a_request_becomes_an_operation_and_its_answer_a_result(talk):
    request = (
        b"POST /users/42/keys?page=2&api_key=canary HTTP/1.1\r\nHost: API.Example:8080\r\n"
        b"User-Agent: curl/8\r\nContent-Type: application/json\r\nContent-Length: 7\r\n\r\n"
        b'{"a":1}'
    )  # fmt: skip
    answer = (
        b"HTTP/1.1 201 Created\r\nContent-Type: text/plain\r\nServer: x\r\n"
        b"Location: /users/42/keys/7\r\nContent-Length: 4\r\n\r\ndone"
    )
    talk.feed(CLIENT, request)
    talk.feed(UPSTREAM, answer)
    assert talk.of(Operation) == [
        Operation(
            1, "POST", "POST /users/42/keys?page=2&api_key=[hidden] HTTP/1.1", 0, len(request),
            ("api.example:8080/users/42/keys",), "POST api.example:8080/users/{n}/keys", (),
            "api.example:8080", "http",
        )
    ]  # fmt: skip
    detail = {
        "body": 4, "request_body": 7,
        "request": {"user-agent": "curl/8", "content-type": "application/json"},
        "response": {
            "content-type": "text/plain", "server": "x", "location": "/users/42/keys/7",
        },
        "content_type": "text/plain",
    }  # fmt: skip
    assert talk.of(Result) == [
        Result(1, "ok", "201 Created", bytes=len(answer), duration_ns=0, detail=detail)
    ]
    assert talk.relayed == {CLIENT: request, UPSTREAM: answer}


def test_a_place_is_bounded(talk):
    talk.feed(CLIENT, b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: h\r\n\r\n")
    (operation,) = talk.of(Operation)
    assert len(operation.tables[0]) == 1_024
    assert len(operation.text) > 20_000


def test_a_duration_runs_from_the_last_byte_asked_to_the_last_answered():
    one = layer()
    request = b"PUT /a HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\n12"
    one.handle(Data(CLIENT, request, 0, TIME))
    one.handle(Data(CLIENT, b"34", len(request), TIME + 5_000))
    one.handle(Data(UPSTREAM, OK[:-1], 0, TIME + 7_000))
    effects = one.handle(Data(UPSTREAM, OK[-1:], len(OK) - 1, TIME + 9_000))
    assert [type(effect) for effect in effects] == [Forward, Audit]
    assert effects[1].record.duration_ns == 4_000


def test_an_answer_that_says_no_is_an_error(talk):
    talk.feed(CLIENT, GET)
    talk.feed(UPSTREAM, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
    assert results(talk) == [(1, "error", "404 Not Found")]


def test_a_credential_is_told_once_by_its_digest(talk):
    one = b"GET / HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer canary\r\nCookie: a=b\r\n\r\n"
    two = b"GET / HTTP/1.1\r\nHost: h\r\nAuthorization: Basic other\r\nX-Api-Key: key\r\n\r\n"
    for request in (one, one, two, one):
        talk.feed(CLIENT, request)
        talk.feed(UPSTREAM, OK)
    told = [
        (1, "authorization", "Bearer", digest(b"canary")),
        (3, "authorization", "Basic", digest(b"other")),
        (3, "x-api-key", "", digest(b"key")),
        (4, "authorization", "Bearer", digest(b"canary")),
    ]
    assert [tuple(fact.fields.values()) for fact in talk.of(Fact)] == told
    assert {fact.kind for fact in talk.of(Fact)} == {"credential"}


def test_what_is_hidden_can_be_configured():
    one = layer(Http(("X-Our-Login",), ("ourkey",)))
    request = b"GET /?our_key=canary HTTP/1.1\r\nHost: h\r\nx-our-login: canary\r\n\r\n"
    effects = one.handle(Data(CLIENT, request, 0, TIME))
    hidden = [request[hide.offset : hide.offset + hide.length] for hide in effects[:2]]
    assert hidden == [b"canary", b"canary"]
    assert "canary" not in repr(effects[2:-1])


def test_a_secret_in_pieces_is_hidden_piece_by_piece(talk):
    for piece in (
        b"GET /?tok",
        b"en=can",
        b"ary HTTP/1.1\r\nCoo",
        b"kie",
        b": a=can",
        b"ary\r\n\r\n",
    ):
        talk.feed(CLIENT, piece)
    expected = b"GET /?token=\0\0\0\0\0\0 HTTP/1.1\r\nCookie: \0\0\0\0\0\0\0\0\r\n\r\n"
    assert talk.captured[CLIENT] == expected
    assert talk.relayed[CLIENT] == expected.replace(b"\0" * 8, b"a=canary").replace(
        b"\0" * 6, b"canary"
    )


def test_set_cookie_is_hidden_in_heads_interim_heads_and_trailers(talk):
    talk.feed(CLIENT, GET)
    talk.feed(UPSTREAM, b"HTTP/1.1 103 Early Hints\r\nSet-Cookie: a=canary\r\n\r\n")
    talk.feed(UPSTREAM, b"HTTP/1.1 200 OK\r\nSet-Cookie: b=canary; Path=/\r\nTransfer-Enc")
    talk.feed(UPSTREAM, b"oding: chunked\r\n\r\n1\r\nx\r\n0\r\nX: 1\r\nset-cookie: c=can")
    talk.feed(UPSTREAM, b"ary\r\n\r\n")
    assert b"can" not in talk.captured[UPSTREAM]
    assert b"ary" not in talk.captured[UPSTREAM]
    assert results(talk) == [(1, "ok", "200 OK")]


def test_secrets_in_the_trailers_of_a_request_are_hidden(talk):
    head = b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    wire = head + b"0\r\nX: 1\r\nX-Auth-Token: canary\r\n\r\n"
    talk.feed(CLIENT, wire)
    assert talk.captured[CLIENT] == wire.replace(b"canary", bytes(6))
    assert talk.relayed[CLIENT] == wire


# -- framing


def test_pipelined_requests_are_answered_in_order(talk):
    talk.feed(CLIENT, GET + b"HEAD /b HTTP/1.1\r\nHost: h\r\n\r\n" + GET)
    assert [operation.op for operation in talk.of(Operation)] == [1, 2, 3]
    answers = [
        b"HTTP/1.1 200 One\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 Two\r\nContent-Length: 2000\r\n\r\n",
        b"HTTP/1.1 200 Three\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
    ]
    talk.feed(UPSTREAM, b"".join(answers))
    assert results(talk) == [(1, "ok", "200 One"), (2, "ok", "200 Two"), (3, "ok", "200 Three")]
    assert [result.bytes for result in talk.of(Result)] == [len(answer) for answer in answers]
    assert [result.detail["body"] for result in talk.of(Result)] == [2, 0, 1]


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\nContent-Length: 55\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_an_answer_that_has_no_body_ends_with_its_head(talk, head):
    talk.feed(CLIENT, GET + GET)
    talk.feed(UPSTREAM, head + OK)
    assert [result.bytes for result in talk.of(Result)] == [len(head), len(OK)]


def test_chunked_requests_and_answers_are_counted_without_their_sizes(talk):
    talk.feed(CLIENT, b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
    for piece in (
        b"5",
        b"\r\nhel",
        b"lo\r",
        b"\n3;x=y\r\nabc\r\n0",
        b"\r\nX-Sum: 1\r\n",
        b"\r\n" + GET,
    ):
        talk.feed(CLIENT, piece)
    talk.feed(
        UPSTREAM, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2  \r\nok\r\n0\r\n\r\n"
    )
    assert [operation.text for operation in talk.of(Operation)] == [
        "POST / HTTP/1.1",
        "GET /a HTTP/1.1",
    ]
    detail = talk.of(Result)[0].detail
    assert (detail["request_body"], detail["body"]) == (8, 2)


def test_interim_answers_belong_to_the_final_one(talk):
    talk.feed(
        CLIENT, b"PUT /a HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    )
    assert talk.relayed[CLIENT]
    going_on = b"HTTP/1.1 100 Continue\r\n\r\n"
    talk.feed(UPSTREAM, going_on)
    assert talk.relayed[UPSTREAM] == going_on
    talk.feed(CLIENT, b"ab")
    talk.feed(UPSTREAM, OK)
    result = talk.of(Result)[0]
    assert result.detail["interim"] == [100]
    assert result.bytes == len(going_on + OK)


def test_an_answer_may_come_before_its_request_is_whole(talk):
    talk.feed(CLIENT, b"PUT /a HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\na")
    talk.feed(UPSTREAM, b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
    assert results(talk) == [(1, "error", "413 Too Large")]
    assert talk.of(Result)[0].detail["request_body"] == 1
    talk.feed(CLIENT, b"bcd" + GET)
    talk.feed(UPSTREAM, OK)
    assert results(talk)[1] == (2, "ok", "200 OK")


def test_a_body_without_a_length_ends_with_the_connection(talk):
    talk.feed(CLIENT, b"GET / HTTP/1.0\r\n\r\n")
    talk.feed(UPSTREAM, b"HTTP/1.0 200 OK\r\n\r\nsome")
    assert talk.relay[UPSTREAM] == FOREVER
    talk.feed(UPSTREAM, b" more")
    assert results(talk) == []
    talk.feed(UPSTREAM, None)
    result = talk.of(Result)[0]
    assert (result.status, result.bytes, result.detail["body"]) == ("ok", 19 + 9, 9)


def test_an_empty_line_before_a_request_is_let_through_once(talk):
    talk.feed(CLIENT, b"\r\n" + GET)
    talk.feed(UPSTREAM, OK)
    talk.feed(CLIENT, b"\r")
    talk.feed(CLIENT, b"\n" + GET)
    talk.feed(UPSTREAM, OK)
    assert len(results(talk)) == 2
    assert talk.relayed[CLIENT] == b"\r\n" + GET + b"\r\n" + GET
    assert [operation.offset for operation in talk.of(Operation)] == [2, 4 + len(GET)]


def test_long_bodies_pass_without_the_layer(talk):
    body = bytes(1_000_000)
    talk.feed(
        CLIENT, b"PUT /a HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\n" + body[:1000]
    )
    assert talk.relay[CLIENT] > 990_000
    talk.feed(CLIENT, body[1000:] + GET)
    talk.feed(UPSTREAM, b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    assert talk.relay[UPSTREAM] > 990_000
    talk.feed(UPSTREAM, body + OK)
    assert [result.detail["body"] for result in talk.of(Result)] == [1_000_000, 2]
    assert talk.of(Result)[0].detail["request_body"] == 1_000_000
    assert [operation.op for operation in talk.of(Operation)] == [1, 2]


def test_long_chunks_pass_without_the_layer(talk):
    talk.feed(CLIENT, GET + GET)
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    talk.feed(UPSTREAM, head + b"f4240\r\n")
    assert talk.relay[UPSTREAM] == 1_000_000
    talk.feed(UPSTREAM, bytes(1_000_000) + b"\r\n1\r\nx\r\n0\r\n\r\n" + OK)
    assert [result.detail["body"] for result in talk.of(Result)] == [1_000_001, 2]


# -- other protocols on the same connection


UPGRADE = (
    b"GET /chat HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Authorization: Bearer canary\r\n\r\n"
)
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"


def test_what_follows_a_switch_is_relayed_and_said_to_be(talk):
    talk.feed(CLIENT, UPGRADE)
    assert talk.layer.reading == ONLY_UPSTREAM
    talk.feed(UPSTREAM, SWITCH + b"\x81\x00")
    assert talk.of(Fact)[-1] == Fact(
        "upgraded", {"op": 1, "to": "websocket", "secrets": "unparsed"}
    )
    assert results(talk) == [(1, "ok", "101 Switching Protocols")]
    assert talk.relay == {CLIENT: FOREVER, UPSTREAM: FOREVER}
    assert talk.layer.sensitive == NEITHER
    talk.feed(CLIENT, b"\x81\x01a")
    assert talk.relayed == {CLIENT: UPGRADE + b"\x81\x01a", UPSTREAM: SWITCH + b"\x81\x00"}


def test_what_came_before_the_switch_goes_on_after_it(talk):
    talk.feed(CLIENT, UPGRADE + b"\x81\x01a")
    assert talk.relayed[CLIENT] == UPGRADE
    assert talk.layer.held(CLIENT) == b"\x81\x01a"
    talk.feed(UPSTREAM, SWITCH)
    assert talk.relayed[CLIENT] == UPGRADE + b"\x81\x01a"
    assert talk.layer.held(CLIENT) == b""


def test_an_offer_to_switch_that_is_declined_changes_nothing(talk):
    talk.feed(CLIENT, UPGRADE + GET.replace(b"\r\n\r\n", b"\r\nCookie: a=canary\r\n\r\n"))
    assert talk.relayed[CLIENT] == UPGRADE
    assert b"canary" not in talk.captured[CLIENT]
    talk.feed(UPSTREAM, OK)
    assert talk.layer.reading == BOTH
    talk.feed(UPSTREAM, OK)
    assert results(talk) == [(1, "ok", "200 OK"), (2, "ok", "200 OK")]


def test_a_tunnel_is_relayed(talk):
    connect = b"CONNECT db.example:443 HTTP/1.1\r\nHost: db.example:443\r\n\r\n"
    talk.feed(CLIENT, connect)
    talk.feed(UPSTREAM, b"HTTP/1.1 200 Yes\r\nContent-Length: 9\r\n\r\n")
    assert talk.of(Operation)[0].tables == ("db.example:443",)
    assert talk.of(Fact) == [
        Fact("upgraded", {"op": 1, "to": "db.example:443", "secrets": "unparsed"})
    ]
    talk.feed(CLIENT, b"\x16\x03\x01")
    talk.feed(UPSTREAM, b"\x16\x03\x03")
    assert talk.relayed[CLIENT] == connect + b"\x16\x03\x01"


def test_a_tunnel_that_is_refused_leaves_the_session_http(talk):
    talk.feed(CLIENT, b"CONNECT db.example:443 HTTP/1.1\r\nHost: db.example:443\r\n\r\n" + GET)
    talk.feed(UPSTREAM, b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n" + OK)
    assert results(talk) == [(1, "error", "403 No")]
    talk.feed(UPSTREAM, OK)


# -- ends, refusals, time


def test_a_client_that_only_half_closes_gets_its_answers(talk):
    talk.feed(CLIENT, GET)
    talk.feed(CLIENT, None)
    talk.feed(UPSTREAM, OK)
    assert results(talk) == [(1, "ok", "200 OK")]


def test_what_an_upstream_did_not_answer_is_cut(talk):
    talk.feed(CLIENT, GET + GET + GET)
    talk.feed(UPSTREAM, OK + OK[:-1])
    talk.feed(UPSTREAM, None)
    assert results(talk) == [(1, "ok", "200 OK"), (2, "cut", "200 OK"), (3, "cut", "")]
    assert talk.own[CLIENT] == b""


def test_bytes_that_passed_before_a_cut_are_counted():
    one = layer()
    one.handle(Data(CLIENT, GET, 0, TIME))
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"
    effects = one.handle(Data(UPSTREAM, head, 0, TIME))
    assert isinstance(effects[-1], Relay)
    (cut,) = one.handle(Eof(UPSTREAM, reset=True, offset=len(head) + 500))
    assert (cut.record.status, cut.record.bytes) == ("cut", len(head) + 500)


def test_an_upstream_that_ends_without_an_answer_is_passed_on_as_it_is(talk):
    """A client may try again on a connection of its own: that is not ours to spoil."""
    talk.feed(CLIENT, GET)
    talk.feed(UPSTREAM, None)
    assert not talk.own[CLIENT]
    assert not talk.closed


def test_a_head_that_the_client_does_not_finish_is_withheld(talk):
    talk.feed(CLIENT, GET + GET[:20])
    talk.feed(CLIENT, None)
    assert talk.of(Withheld) == [Withheld("client", len(GET), 20, "incomplete")]
    assert talk.relayed[CLIENT] == GET


def test_a_kill_is_told_to_who_waits_for_an_answer(talk):
    talk.feed(CLIENT, GET + GET)
    talk.feed(UPSTREAM, b"HTTP/1.1 200")
    talk.refuse("ended by an administrator (reference 0123456789abc)")
    assert talk.own[CLIENT].startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert talk.own[CLIENT].endswith(
        b"\r\n\r\nended by an administrator (reference 0123456789abc)\n"
    )
    assert results(talk) == [(1, "error", "503 Service Unavailable"), (2, "cut", "")]
    assert talk.of(Withheld) == [Withheld("upstream", 0, 12, "refused")]
    assert talk.closed == {CLIENT, UPSTREAM}


def test_a_kill_inside_an_answer_only_ends_it(talk):
    talk.feed(CLIENT, GET)
    talk.feed(UPSTREAM, OK[:-1])
    talk.refuse("ended")
    assert not talk.own[CLIENT]
    assert results(talk) == [(1, "cut", "200 OK")]
    assert talk.closed == {CLIENT, UPSTREAM}


def test_a_kill_between_requests_only_ends_the_session(talk):
    """An answer that nobody waits for would be taken for that to the next request."""
    talk.feed(CLIENT, GET)
    talk.feed(UPSTREAM, OK)
    talk.refuse("ended")
    assert not talk.own[CLIENT]
    assert talk.closed == {CLIENT, UPSTREAM}


def test_a_kill_inside_a_request_answers_it(talk):
    talk.feed(CLIENT, b"HEAD /a?token=canary HTTP/1.1\r\nCookie: can")
    talk.refuse("ended")
    assert talk.own[CLIENT].startswith(b"HTTP/1.1 503 ")
    denied = talk.of(Operation)[0]
    assert (denied.verb, denied.verdict) == ("HEAD", "denied")
    assert denied.text == "HEAD /a?token=[hidden] HTTP/1.1"
    assert talk.own[CLIENT].endswith(b"\r\n\r\n"), "an answer to HEAD has no body"


def test_a_slow_head_is_answered_when_its_time_is_up():
    one = layer()
    effects = one.handle(Data(CLIENT, b"GET / HT", 0, TIME))
    assert effects == [SetTimer("request-head", 30.0)]
    assert one.handle(Data(CLIENT, b"TP/1.1\r\n", 8, TIME)) == [], "more bytes buy no time"
    effects = one.handle(Elapsed("request-head"))
    (answer,) = [effect for effect in effects if isinstance(effect, Forward)]
    assert answer.origin is Origin.SYNTHESISED
    assert answer.data.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert session_name(SESSION).encode() in answer.data


def test_a_timer_of_a_head_that_became_whole_means_nothing():
    one = layer()
    one.handle(Data(CLIENT, GET[:5], 0, TIME))
    one.handle(Data(CLIENT, GET[5:], 5, TIME))
    assert one.handle(Elapsed("request-head")) == []
    again = one.handle(Data(CLIENT, GET[:5], len(GET), TIME))
    assert again == [SetTimer("request-head", 30.0)]


def test_a_slow_answers_head_is_replaced_when_its_time_is_up():
    one = layer()
    one.handle(Data(CLIENT, GET, 0, TIME))
    assert one.handle(Data(UPSTREAM, b"HTTP/1.1 ", 0, TIME)) == [SetTimer("response-head", 30.0)]
    effects = one.handle(Elapsed("response-head"))
    (answer,) = [effect for effect in effects if isinstance(effect, Forward)]
    assert answer.data.startswith(b"HTTP/1.1 502 Bad Gateway\r\n")


def test_a_client_that_is_far_ahead_is_not_read(talk):
    for _ in range(128):
        assert talk.layer.reading == BOTH
        talk.feed(CLIENT, GET)
    assert talk.layer.reading == ONLY_UPSTREAM
    talk.feed(UPSTREAM, OK)
    assert talk.layer.reading == BOTH


# -- probing


@pytest.mark.parametrize(
    ("prefix", "answer"),
    [
        (b"", Answer.MORE),
        (b"G", Answer.MORE),
        (b"GET", Answer.MORE),
        (b"GET ", Answer.MORE),
        (b"GET /", Answer.YES),
        (b"\r\nGET /", Answer.YES),
        (b"GET http://h", Answer.YES),
        (b"GET /a HTTP/1.1\r\n", Answer.YES),
        (b"GET /a HTTP/1.1\n", Answer.YES),
        (b"GET /a HTTP/2.0\r\n", Answer.YES),
        (b"GET  /a HTTP/1.1\r\n", Answer.YES),
        (b"get /a http/1.1\r\n", Answer.YES),
        (b"BREW /pot HTTP/1.1", Answer.YES),
        (b"CONNECT h.example:443 HTTP/1.1\r\n", Answer.YES),
        (b"GET /key\r\n", Answer.NO),
        (b"GET key\r\n", Answer.NO),
        (b"GET key", Answer.MORE),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Answer.NO),
        (b"PRI * HTTP/2", Answer.NO),
        (b"OPTIONS rtsp://h/ RTSP/1.0\r\n", Answer.NO),
        (b"INVITE sip:a@b SIP/2.0\r\n", Answer.NO),
        (b"EHLO mail.example\r\n", Answer.NO),
        (b"SSH-2.0-OpenSSH_9.2\r\n", Answer.NO),
        (b"*1\r\n$4\r\nPING\r\n", Answer.NO),
        (b"\x16\x03\x01\x02\x00\x01", Answer.NO),
        (b"\0\0\0\x08\x04\xd2\x16\x2f", Answer.NO),
        (b"A" * 100, Answer.NO),
        (b"GET \0", Answer.NO),
    ],
)
def test_a_probe_claims_what_a_server_could_take_for_http(prefix, answer):
    assert PROTOCOL.probe(prefix) is answer


# -- documents


def test_every_name_that_is_secret_or_shown_is_documented():
    page = (Path(__file__).parents[3] / "docs" / "protocols" / "http1.md").read_text("utf-8")
    spelled = {word.lower() for word in re.findall(r"`([A-Za-z0-9-]+)`", page)}
    assert spelled >= HEADERS
    (listed,) = re.findall(r"`X-Access-Token` are one\): ([\w, ]+);", page)
    assert {name.replace("_", "") for name in listed.split(", ")} == PARAMETERS
    (shown,) = re.findall(r"256 characters a value: ([\w, -]+) \|", page)
    assert set(shown.split(", ")) == FACTS
