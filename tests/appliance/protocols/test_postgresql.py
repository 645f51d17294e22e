"""PostgreSQL conversations, message by message; real ones: tests/contract and tests/system."""

import gc
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import message, messages, startup
from replay import TIME, Replay, digest, facts
from transcript import FOLDER, load

from appliance.protocols.postgresql import PROTOCOL
from appliance.sansio import BOTH, CLIENT, ONLY_UPSTREAM, UPSTREAM, Answer, Data, Eof
from appliance.wire import pgfrontend, pgnames, pgpipeline, pgrequests
from capture.records import Fact, Gap, Operation, Result, Withheld

KEY = b"\x01\x02\x03\x04"
READY = message("Z", b"I")
IN_TRANSACTION = message("Z", b"T")
PARSED, BOUND, CLOSED = message("1"), message("2"), message("3")
SYNC, FLUSH = message("S"), message("H")
SSL_REQUEST = b"\0\0\0\x08\x04\xd2\x16\x2f"
GSSENC_REQUEST = b"\0\0\0\x08\x04\xd2\x16\x30"
GREETING = (
    message("R", (0, 4))
    + message("S", "client_encoding", "UTF8")
    + message("S", "standard_conforming_strings", "on")
    + message("K", (4711, 4), KEY)
    + READY
)


def query(text):
    return message("Q", text)


def parse(name, text, *oids):
    return message("P", name, text, (len(oids), 2), *((oid, 4) for oid in oids))


def bind(portal, statement, *values, formats=(), results=()):
    parts = [portal, statement, (len(formats), 2), *((form, 2) for form in formats)]
    parts.append((len(values), 2))
    for value in values:
        parts += [(-1, 4)] if value is None else [(len(value), 4), value]
    parts.append((len(results), 2))
    return message("B", *parts, *((form, 2) for form in results))


def execute(portal="", rows=0):
    return message("E", portal, (rows, 4))


def describe(kind, name=""):
    return message("D", kind.encode(), name)


def close(kind, name=""):
    return message("C", kind.encode(), name)


def complete(tag):
    return message("C", tag)


def columns(*names):
    parts = [(len(names), 2)]
    for name in names:
        parts += [name, (0, 4), (0, 2), (23, 4), (4, 2), (-1, 4), (0, 2)]
    return message("T", *parts)


def row(*values):
    parts = [(len(values), 2)]
    for value in values:
        parts += [(len(value), 4), value]
    return message("D", *parts)


def error(state, text="no", severity="ERROR"):
    body = f"S{severity}\0V{severity}\0C{state}\0M{text}\0\0".encode()
    return message("E", body)


class Talk(Replay):
    """A session that is ready for queries."""

    def __init__(self, *, ready=True, **parameters):
        super().__init__(PROTOCOL)
        if ready:
            self.up(startup(user="report", **parameters))
            self.down(GREETING)
            self.records.clear()

    def up(self, *parts):
        self.feed(CLIENT, b"".join(parts))

    def down(self, *parts):
        self.feed(UPSTREAM, b"".join(parts))

    @property
    def operations(self):
        return self.of(Operation)

    @property
    def results(self):
        return self.of(Result)

    @property
    def statuses(self):
        return {result.op: result.status for result in self.results}

    def facts(self, kind):
        return [fact.fields for fact in self.of(Fact) if fact.kind == kind]

    @property
    def passed(self):
        """Return what reached the server."""
        return bytes(self.relayed[CLIENT])


@pytest.fixture
def talk():
    return Talk()


# -- start-up


def test_an_ssl_request_is_forwarded_and_a_refusal_goes_on():
    talk = Talk(ready=False)
    talk.up(SSL_REQUEST)
    assert talk.passed == SSL_REQUEST
    talk.down(b"N")
    talk.up(startup(user="report"))
    talk.down(GREETING)
    assert talk.relayed[UPSTREAM] == b"N" + GREETING
    assert talk.facts("startup") == [{"protocol": "3.0", "parameters": {"user": "report"}}]


def test_a_session_that_goes_to_tls_says_that_it_is_not_decoded():
    talk = Talk(ready=False)
    talk.up(SSL_REQUEST)
    talk.down(b"S")
    talk.up(b"\x16\x03\x01 anything")
    talk.down(b"\x16\x03\x03 anything")
    assert talk.passed == SSL_REQUEST + b"\x16\x03\x01 anything"
    assert talk.relayed[UPSTREAM] == b"S\x16\x03\x03 anything"
    assert talk.facts("undecoded") == [{"why": "tls", "secrets": "unparsed"}]
    talk.refuse("stop")
    assert not talk.own[CLIENT]
    assert talk.closed == {CLIENT, UPSTREAM}


@pytest.mark.parametrize("pieces", [1, 2])
def test_bytes_that_come_together_with_an_ssl_request_are_an_attack(pieces):
    talk = Talk(ready=False)
    if pieces == 1:
        talk.up(SSL_REQUEST, startup(user="report"))
    else:
        talk.up(SSL_REQUEST)
        talk.up(startup(user="report"))
    assert "together with SSLRequest" in str(talk.failed)
    assert startup(user="report") not in talk.passed


def test_bytes_that_come_together_with_the_answer_are_an_attack():
    talk = Talk(ready=False)
    talk.up(SSL_REQUEST)
    talk.down(b"S" + GREETING)
    assert talk.failed.side is UPSTREAM
    assert not talk.relayed[UPSTREAM]


def test_a_gss_request_is_answered_by_the_gate():
    talk = Talk(ready=False)
    talk.up(GSSENC_REQUEST)
    assert talk.own[CLIENT] == b"N"
    assert talk.passed == b""
    assert talk.of(Withheld) == [Withheld("client", 0, 8, "gssenc")]
    talk.up(SSL_REQUEST)
    talk.down(b"N")
    talk.up(startup(user="report"))
    talk.down(GREETING)
    assert talk.failed is None
    talk.up(query("SELECT 1"))
    assert talk.operations[0].offset == 16 + len(startup(user="report"))


@pytest.mark.parametrize("request_", [SSL_REQUEST, GSSENC_REQUEST])
def test_an_encryption_request_comes_at_most_once(request_):
    talk = Talk(ready=False)
    for _ in range(2):
        talk.up(request_)
        if request_ == SSL_REQUEST and talk.failed is None:
            talk.down(b"N")
    assert "twice" in str(talk.failed)


def test_a_server_that_knows_less_is_heard():
    talk = Talk(ready=False)
    talk.up(startup((3, 2), user="report", _pq_="x"))
    talk.down(message("v", (196608, 4), (1, 4), "_pq_") + GREETING)
    assert talk.facts("negotiate") == [{"protocol": "3.0", "refused": ["_pq_"]}]


@pytest.mark.parametrize(
    ("asks", "answers", "method", "kind"),
    [
        (message("R", (3, 4)), message("p", "pass"), "password", "password"),
        (message("R", (5, 4), b"salt"), message("p", "md5" + "0" * 32), "md5", "password"),
        (message("R", (7, 4)), message("p", b"token"), "gss", "gss"),
        (message("R", (9, 4)), message("p", b"token"), "sspi", "gss"),
    ],
)
def test_what_the_client_proves_itself_with_is_hidden(asks, answers, method, kind):
    talk = Talk(ready=False)
    hello = startup(user="report")
    talk.up(hello)
    talk.down(asks)
    talk.up(answers)
    talk.down(GREETING)
    assert talk.passed == hello + answers
    assert talk.hidden[0] == (CLIENT, len(hello) + 5, len(answers) - 5, kind)
    assert talk.facts("authentication") == [{"method": method}]


def test_both_sides_of_a_sasl_exchange_are_hidden():
    talk = Talk(ready=False)
    hello = startup(user="report")
    first = message("p", "SCRAM-SHA-256", (9, 4), b"n,,n=,r=x")
    last = message("p", b"c=biws,r=x,p=proof")
    talk.up(hello)
    talk.down(message("R", (10, 4), "SCRAM-SHA-256", b"\0"))
    talk.up(first)
    talk.down(message("R", (11, 4), b"r=xy,s=salt,i=4096"))
    talk.up(last)
    talk.down(message("R", (12, 4), b"v=signature") + GREETING)
    assert talk.facts("authentication") == [{"method": "sasl", "mechanism": "SCRAM-SHA-256"}]
    for secret in (b"n,,n=", b"p=proof"):
        assert secret not in talk.captured[CLIENT]
    for secret in (b"s=salt", b"v=signature"):
        assert secret not in talk.captured[UPSTREAM]
    assert b"SCRAM-SHA-256" in talk.captured[UPSTREAM]


def test_a_password_that_nobody_asked_for_is_hidden_all_the_same():
    talk = Talk(ready=False)
    talk.up(startup(user="report"))
    talk.down(message("R", (0, 4)))
    talk.up(message("p", "pass"))
    assert talk.failed is not None
    assert b"pass" not in talk.captured[CLIENT]


def test_the_cancel_key_is_hidden_and_its_digest_told():
    talk = Talk(ready=False)
    talk.up(startup(user="report"))
    talk.down(GREETING)
    assert talk.facts("backend-key") == [{"pid": 4711, "key_digest": digest(KEY)}]
    assert KEY not in talk.captured[UPSTREAM]
    assert talk.relayed[UPSTREAM] == GREETING


@pytest.mark.parametrize("key", [KEY, bytes(range(256))])
def test_a_cancel_request_names_the_session_that_it_cancels(key):
    talk = Talk(ready=False)
    request = (12 + len(key)).to_bytes(4, "big") + b"\x04\xd2\x16\x2e" + (4711).to_bytes(4, "big")
    talk.up(request + key)
    named = {"pid": 4711, "key_digest": digest(key), "target": "198.51.100.10:5432"}
    assert talk.operations[0] == Operation(
        1, "CANCEL", "cancel 4711", 0, 12 + len(key), binds=(named,), kind="cancel"
    )
    assert talk.facts("cancel") == [named]
    assert talk.passed == request + key
    assert key not in talk.captured[CLIENT]
    talk.feed(UPSTREAM, None)
    assert talk.statuses == {1: "ok"}


def test_a_fatal_error_at_start_up_is_a_fact():
    talk = Talk(ready=False)
    talk.up(startup(user="report"))
    talk.down(error("28000", "no entry", "FATAL"))
    assert talk.facts("error") == [
        {"sqlstate": "28000", "message": "no entry", "severity": "FATAL"}
    ]


def test_what_the_client_sends_ahead_of_time_waits_for_the_server():
    talk = Talk(ready=False)
    hello = startup(user="report")
    talk.up(hello)
    talk.down(message("R", (0, 4)))
    talk.up(query("SELECT 1"))
    assert talk.passed == hello
    talk.down(GREETING[9:])
    assert talk.passed == hello + query("SELECT 1")
    assert talk.operations[0].text == "SELECT 1"


def test_notices_that_come_with_the_greeting_reach_the_client_once():
    talk = Talk(ready=False)
    talk.up(startup(user="report"))
    late = message("A", (7, 4), "news", "x")
    talk.down(GREETING + late + late[:4])
    assert talk.relayed[UPSTREAM] == GREETING + late + late[:4]
    talk.down(late[4:])
    assert len(talk.facts("notification")) == 2
    assert talk.relayed[UPSTREAM] == GREETING + late + late


@pytest.mark.parametrize(
    "prefix",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",  # TLS
        b"\0\0\0\x23\0\x03\0\0\0\0\0\x01\0\x09producer-1",  # Kafka, metadata request
        b"\0\0\0\x23\0\x12\0\x03\0\0\0\x01\0\x09producer-1",  # Kafka, versions
        b"GET / HTTP/1.1\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"*1\r\n$4\r\nPING\r\n",
        b"\0\0\0\x27\0\x02\0\0user\0",  # PostgreSQL 2.0
        b"\x12\x01\0\x2f\0\0\x01\0\0",  # TDS
        b"\0\0\0\x04" + b"\0\x03\0\0",  # a length that cannot be
    ],
)
def test_other_protocols_are_not_claimed(prefix):
    assert PROTOCOL.probe(prefix) is Answer.NO


# -- simple protocol


def test_each_statement_of_a_query_is_an_operation(talk):
    talk.up(query("SELECT 1; INSERT INTO t VALUES (1); SELECT x FROM s.v"))
    assert [operation.verb for operation in talk.operations] == ["SELECT", "INSERT", "SELECT"]
    assert [operation.tables for operation in talk.operations] == [(), ("t",), ("s.v",)]
    talk.down(columns("a"), row(b"1"), complete("SELECT 1"), complete("INSERT 0 1"))
    talk.down(columns("x"), row(b"5"), row(b"6"), complete("SELECT 2"), READY)
    first, second, third = talk.results
    assert (first.rows, first.tag, first.columns) == (1, "SELECT 1", (("a", 23),))
    assert (second.rows, second.tag, second.columns) == (0, "INSERT 0 1", ())
    assert (third.rows, third.tag, third.tx) == (2, "SELECT 2", "I")
    sizes = first.bytes + second.bytes + third.bytes
    assert sizes == len(talk.relayed[UPSTREAM]) - len(GREETING) - len(READY)


def test_a_failed_statement_takes_the_rest_of_its_query_along(talk):
    talk.up(query("SELECT 1; SELECT 1/0; SELECT 2"))
    talk.down(complete("SELECT 1"), error("22012", "division by zero"), READY)
    assert talk.statuses == {1: "ok", 2: "error", 3: "skipped"}
    failed = next(result for result in talk.results if result.op == 2)
    assert (failed.sqlstate, failed.message) == ("22012", "division by zero")


def test_results_that_no_statement_explains_belong_to_the_last_one(talk):
    talk.up(query("SELEKT nonsense"))
    talk.down(complete("FIRST"), complete("SECOND"), READY)
    assert [(result.op, result.tag) for result in talk.results] == [(1, "FIRST; SECOND")]
    assert not talk.of(Gap)


def test_an_answer_that_nobody_asked_for_is_a_gap_said_once(talk):
    talk.down(complete("SURPRISE"), complete("SURPRISE"), READY)
    assert [(gap.reason, gap.detail) for gap in talk.of(Gap)] == [("parser", "unexpected result")]
    talk.up(query("SELECT 1"))
    talk.down(complete("SELECT 1"), READY)
    assert talk.statuses == {1: "ok"}


def test_an_error_at_the_end_of_a_batch_belongs_to_what_had_ended(talk):
    talk.up(parse("", "INSERT INTO t VALUES (1)"), bind("", ""), execute(), SYNC)
    talk.down(PARSED, BOUND, complete("INSERT 0 1"), error("23505", "deferred"), READY)
    assert talk.statuses == {1: "error"}


def test_notices_are_told_with_their_operation(talk):
    talk.up(query("DO $$ BEGIN RAISE NOTICE 'x'; END $$"))
    notice = b"SNOTICE\0VNOTICE\0C00000\0Mlook\0\0"
    talk.down(message("N", notice), complete("DO"), READY, message("N", notice))
    told = {"sqlstate": "00000", "message": "look", "severity": "NOTICE"}
    assert talk.facts("notice") == [{**told, "op": 1}, told]


def test_a_function_call_is_an_operation(talk):
    call = message("F", (957, 4), (1, 2), (1, 2), (1, 2), (4, 4), b"\0\0\0\7", (1, 2))
    talk.up(call)
    operation = talk.operations[0]
    assert (operation.verb, operation.kind, operation.text) == (
        "FUNCTION", "function", "function 957",
    )  # fmt: skip
    assert operation.binds == ({"hex": "00000007"},)
    talk.down(message("V", (4, 4), b"\0\0\0\1"), READY)
    assert talk.statuses == {1: "ok"}


@pytest.mark.parametrize("size", [60_000, 65_535, 65_536, 70_000, 3_000_000])
def test_a_long_query_passes_with_a_part_of_it_kept(talk, size):
    text = "SELECT '" + "ä" * ((size - 9) // 2) + "'"
    sent = query(text)
    for start in range(0, len(sent), 50_000):
        talk.up(sent[start : start + 50_000])
        assert len(talk.layer.held(CLIENT)) <= pgfrontend.MOST_BODY_BYTES + 50_000
    operation = talk.operations[0]
    assert operation.length == len(sent)
    assert operation.truncated == (len(text.encode()) > pgnames.MOST_TEXT_BYTES)
    assert text.startswith(operation.text)
    assert len(operation.text.encode()) > min(len(text.encode()), pgnames.MOST_TEXT_BYTES) - 4
    assert operation.verb == ("unknown" if operation.truncated else "SELECT")
    assert talk.passed.endswith(sent)
    talk.up(query("SELECT 1"))
    assert talk.operations[1].text == "SELECT 1"


# -- extended protocol


def test_parse_bind_execute_is_one_operation(talk):
    sent = parse("", "SELECT $1 + 1", 23) + bind("", "", b"41") + describe("P") + execute() + SYNC
    talk.up(sent)
    assert len(talk.operations) == 1
    operation = talk.operations[0]
    assert (operation.kind, operation.verb, operation.text) == (
        "extended", "SELECT", "SELECT $1 + 1",
    )  # fmt: skip
    assert operation.binds == (41,)
    assert operation.length == len(sent) - len(SYNC)
    talk.down(PARSED, BOUND, columns("sum"), row(b"42"), complete("SELECT 1"), IN_TRANSACTION)
    result = talk.results[0]
    assert (result.status, result.rows, result.tx) == ("ok", 1, "T")
    assert result.columns == (("sum", 23),)


def test_parse_and_bind_wait_for_the_execute_that_tells_of_them(talk):
    before = talk.passed
    talk.up(parse("", "SELECT 1"), bind("", ""), describe("P"))
    assert talk.passed == before
    assert talk.layer.held(CLIENT) == parse("", "SELECT 1") + bind("", "") + describe("P")
    talk.up(execute())
    assert talk.passed.endswith(execute())
    assert len(talk.operations) == 1


def test_a_statement_that_is_only_prepared_is_told_when_the_batch_ends(talk):
    talk.up(parse("s1", "SELECT * FROM t WHERE a = $1"), describe("S", "s1"), SYNC)
    operation = talk.operations[0]
    assert (operation.kind, operation.name, operation.tables) == ("prepare", "s1", ("t",))
    talk.down(PARSED, message("t", (1, 2), (20, 4)), columns("a"), READY)
    assert talk.statuses == {1: "ok"}
    talk.up(bind("", "s1", (7).to_bytes(8, "big"), formats=(1,)), execute(), SYNC)
    second = talk.operations[1]
    assert (second.kind, second.name, second.binds) == ("extended", "s1", (7,))
    talk.down(BOUND, row(b"7"), complete("SELECT 1"), READY)
    assert talk.results[1].columns == (("a", 23),)


def test_flush_tells_of_what_is_held_too(talk):
    talk.up(parse("s1", "SELECT 1"), FLUSH)
    assert talk.operations[0].kind == "prepare"
    assert talk.passed.endswith(FLUSH)
    talk.down(PARSED)
    assert talk.statuses == {1: "ok"}


def test_a_portal_that_is_only_bound_is_told_and_ends_with_its_transaction(talk):
    talk.up(parse("", "SELECT $1"), bind("p", "", b"x"), SYNC)
    assert [(each.kind, each.binds) for each in talk.operations] == [
        ("prepare", ()),
        ("extended", ("x",)),
    ]
    talk.down(PARSED, BOUND, READY)
    assert talk.statuses == {1: "ok", 2: "ok"}
    assert talk.results[1].detail == {"executed": False}


def test_an_announced_portal_is_completed_by_its_execute(talk):
    talk.up(parse("", "SELECT $1"), bind("p", "", b"x"), FLUSH)
    talk.down(PARSED, BOUND)
    talk.up(execute("p"), SYNC)
    assert len(talk.operations) == 2
    talk.down(complete("SELECT 1"), READY)
    assert [(result.op, result.tag) for result in talk.results] == [(1, ""), (2, "SELECT 1")]


def test_a_suspended_portal_is_fetched_again(talk):
    talk.up(parse("", "SELECT g FROM g"), bind("p", ""), execute("p", 2), FLUSH)
    talk.down(PARSED, BOUND, row(b"1"), row(b"2"), message("s"))
    assert talk.results[0].detail == {"suspended": True}
    assert talk.results[0].rows == 2
    talk.up(execute("p", 2), SYNC)
    assert (talk.operations[1].kind, talk.operations[1].text) == ("fetch", "SELECT g FROM g")
    talk.down(row(b"3"), complete("SELECT 1"), READY)
    assert (talk.results[1].op, talk.results[1].rows) == (2, 1)


def test_a_pipeline_goes_on_after_the_sync_of_the_batch_that_failed(talk):
    def one(text):
        return parse("", text) + bind("", "") + execute()

    talk.up(one("SELECT 1"), one("SELECT 1/0"), one("SELECT 2"), SYNC, one("SELECT 3"), SYNC)
    talk.down(PARSED, BOUND, complete("SELECT 1"), PARSED, BOUND, error("22012"), READY)
    talk.down(PARSED, BOUND, complete("SELECT 1"), READY)
    assert talk.statuses == {1: "ok", 2: "error", 3: "skipped", 4: "ok"}
    assert not talk.of(Gap)


def test_what_comes_after_the_error_of_a_batch_is_skipped_until_sync(talk):
    talk.up(parse("", "SELECT 1/0"), bind("", ""), execute(), FLUSH)
    talk.down(PARSED, BOUND, error("22012"))
    talk.up(parse("", "SELECT 2"), bind("", ""), execute(), query("SELECT 3"))
    assert talk.statuses == {2: "skipped", 3: "skipped"}
    talk.up(SYNC)
    talk.down(READY)
    assert talk.statuses[1] == "error"
    talk.up(query("SELECT 4"))
    talk.down(complete("SELECT 1"), READY)
    assert talk.statuses[4] == "ok"


def test_an_error_of_parse_belongs_to_the_operation_that_needed_it(talk):
    talk.up(parse("", "SELEC 1"), bind("", ""), execute(), SYNC)
    talk.down(error("42601"), READY)
    assert talk.statuses == {1: "error"}


def test_an_error_without_an_operation_is_a_fact(talk):
    talk.up(describe("S", "nothing"), SYNC)
    talk.down(error("26000", "does not exist"), READY)
    assert talk.facts("error") == [{"sqlstate": "26000", "message": "does not exist"}]


def test_bind_values_are_decoded_by_their_types(talk):
    talk.up(
        parse("", "SELECT $1, $2, $3, $4", 23, 25, 16, 0),
        bind("", "", b"\xff\xff\xff\xff", "ä".encode(), None, b"\1\2", formats=(1, 0, 1, 1)),
        execute(), SYNC,
    )  # fmt: skip
    assert talk.operations[0].binds == (-1, "ä", None, {"hex": "0102"})


def test_a_big_bind_is_one_operation_and_is_not_kept(talk):
    big = b"x" * 5_000_000
    sent = parse("", "INSERT INTO t VALUES ($1, $2)") + bind("", "", b"1", big) + execute() + SYNC
    for start in range(0, len(sent), 60_000):
        talk.up(sent[start : start + 60_000])
        assert len(talk.layer.held(CLIENT)) <= 2 * pgfrontend.MOST_BODY_BYTES + 60_000
    assert talk.passed.endswith(sent)
    told = [(each.kind, each.binds) for each in talk.operations if each.kind == "extended"]
    assert told == [("extended", ("1", {"omitted": 1}))]
    talk.down(PARSED, BOUND, complete("INSERT 0 1"), READY)
    assert set(talk.statuses.values()) == {"ok"}


# -- what names mean


def test_a_parse_that_fails_does_not_change_what_its_name_means(talk):
    talk.up(parse("s", "DROP TABLE t"), SYNC)
    talk.down(PARSED, READY)
    talk.up(parse("s", "SELECT 1"), SYNC)
    talk.down(error("42P05", "already exists"), READY)
    talk.up(bind("", "s"), execute(), SYNC)
    assert talk.operations[-1].text == "DROP TABLE t"


def test_a_parse_that_was_skipped_does_not_change_what_its_name_means(talk):
    talk.up(parse("", "DROP TABLE t"), SYNC)
    talk.down(PARSED, READY)
    talk.up(execute("no such portal"), parse("", "SELECT 1"), SYNC)
    talk.down(error("34000"), READY)
    talk.up(bind("", ""), execute(), SYNC)
    assert talk.operations[-1].text == "DROP TABLE t"


def test_a_name_given_while_the_server_discards_is_undone_at_sync(talk):
    talk.up(parse("s", "DROP TABLE t"), SYNC)
    talk.down(PARSED, READY)
    talk.up(execute("no such portal"), FLUSH)
    talk.down(error("34000"))
    talk.up(close("S", "s"), parse("s", "SELECT 1"), bind("", "s"), execute())
    assert talk.operations[-1].text == "SELECT 1"
    talk.up(SYNC)
    talk.down(READY)
    talk.up(bind("", "s"), execute(), SYNC)
    assert talk.operations[-1].text == "DROP TABLE t"


def test_a_bind_waits_until_it_is_known_what_its_name_means(talk):
    talk.up(parse("s", "DROP TABLE t"), SYNC)
    talk.down(PARSED, READY)
    talk.up(parse("s", "SELECT 1"), SYNC, bind("", "s"), execute(), SYNC, query("SELECT 2"))
    assert talk.passed.endswith(parse("s", "SELECT 1") + SYNC)
    assert talk.layer.reading == ONLY_UPSTREAM
    talk.down(error("42P05", "already exists"))
    assert talk.operations[-2].text == "DROP TABLE t"
    assert talk.passed.endswith(bind("", "s") + execute() + SYNC + query("SELECT 2"))
    talk.down(READY, BOUND, complete("DROP TABLE"), READY, complete("SELECT 1"), READY)
    assert talk.layer.reading == BOTH
    assert talk.statuses == {1: "ok", 2: "error", 3: "ok", 4: "ok"}


def test_a_bind_waits_for_the_parse_that_gives_the_unnamed_statement_anew(talk):
    talk.up(parse("", "DROP TABLE t"), SYNC)
    talk.down(PARSED, READY)
    talk.up(parse("", "SELECT 1"), SYNC, bind("", ""), execute(), SYNC)
    assert len(talk.operations) == 2
    talk.down(PARSED)
    assert talk.operations[-1].text == "SELECT 1"


def test_definitions_are_undone_from_the_middle_of_a_pipeline(talk):
    talk.up(parse("s", "SELECT 1"), SYNC)
    talk.down(PARSED, READY)
    talk.up(parse("s", "SELECT 2"), SYNC, close("S", "s"), parse("s", "SELECT 3"), SYNC)
    talk.down(error("42P05"), READY, CLOSED, error("XX000"), READY)
    talk.up(bind("", "s"), execute(), SYNC)
    assert talk.operations[-1].text == ""
    assert talk.operations[-1].verb == "unknown"


def test_a_closed_statement_is_unknown_and_a_portal_keeps_it(talk):
    talk.up(parse("s", "SELECT 1"), bind("p", "s"), close("S", "s"), execute("p"), SYNC)
    assert talk.operations[0].text == "SELECT 1"
    talk.down(PARSED, BOUND, CLOSED, complete("SELECT 1"), READY)
    talk.up(bind("", "s"), execute(), SYNC)
    assert talk.operations[1].verb == "unknown"


def test_prepared_statements_of_sql_and_of_the_protocol_share_their_names(talk):
    talk.up(query("PREPARE s AS SELECT * FROM t"))
    talk.down(complete("PREPARE"), READY)
    talk.up(bind("", "s"), execute(), SYNC)
    assert talk.operations[1].text == "PREPARE s AS SELECT * FROM t"
    assert (talk.operations[1].verb, talk.operations[1].tables) == ("SELECT", ("t",))
    talk.down(BOUND, complete("SELECT 0"), READY)
    talk.up(query("EXECUTE s"))
    assert (talk.operations[2].verb, talk.operations[2].name) == ("EXECUTE", "s")
    assert talk.operations[2].tables == ("t",)
    talk.down(complete("SELECT 0"), READY)
    talk.up(query("DEALLOCATE s"))
    talk.down(error("26000"), READY)
    talk.up(query("EXECUTE s"))
    assert talk.operations[4].tables == ("t",)
    talk.down(complete("SELECT 0"), READY)
    talk.up(query("DISCARD ALL"))
    talk.down(complete("DISCARD ALL"), READY)
    talk.up(query("EXECUTE s"))
    assert talk.operations[6].tables == ()


def test_too_many_names_are_said_once_and_never_mistaken(talk, monkeypatch):
    monkeypatch.setattr(pgnames, "MOST_NAMES_BYTES", 2_000)
    for number in range(8):
        talk.up(parse(f"s{number}", f"SELECT {number}"), SYNC)
        talk.down(PARSED, READY)
    assert [gap.reason for gap in talk.of(Gap)] == ["names"]
    assert [each.text for each in talk.operations] == [f"SELECT {number}" for number in range(8)]
    talk.up(bind("", "s0"), execute(), bind("", "s7"), execute(), SYNC)
    assert [each.text for each in talk.operations[8:]] == ["SELECT 0", ""]
    talk.up(parse("s0", "DROP TABLE t"), SYNC)
    assert talk.operations[-1].text == "DROP TABLE t"


def test_too_many_portals_are_said_once_and_never_mistaken(talk, monkeypatch):
    monkeypatch.setattr(pgrequests, "MOST_PORTALS", 3)
    talk.up(parse("s", "SELECT $1"), *(bind(f"p{n}", "s", b"%d" % n) for n in range(5)), SYNC)
    talk.down(PARSED, BOUND * 5, IN_TRANSACTION)
    assert [gap.reason for gap in talk.of(Gap)] == ["names"]
    assert [each.binds for each in talk.operations] == [(), ("0",), ("1",), ("2",), ("3",), ("4",)]
    talk.up(execute("p0"), execute("p4"), SYNC)
    assert [each.kind for each in talk.operations[6:]] == ["extended"]
    assert talk.operations[6].verb == "unknown"


def test_a_client_far_ahead_of_the_server_is_not_read(talk, monkeypatch):
    monkeypatch.setattr(pgfrontend, "MOST_STEPS", 10)
    talk.up((parse("", "SELECT 1") + bind("", "") + execute()) * 4)
    assert talk.layer.reading == ONLY_UPSTREAM
    talk.down(PARSED, BOUND, complete("SELECT 1"))
    assert talk.layer.reading == BOTH


def test_what_is_held_back_is_bounded(talk):
    text = "SELECT '" + "x" * 500 + "'"
    for number in range(400):
        talk.up(parse(f"s{number}", text))
        assert len(talk.layer.held(CLIENT)) <= pgrequests.MOST_HELD_BYTES
    assert talk.passed.count(text.encode()) == len(talk.operations) > 200


# -- texts


def test_a_text_is_read_in_the_encoding_that_the_server_reported(talk):
    talk.down(message("S", "client_encoding", "LATIN1"))
    talk.up(message("Q", "SELECT 'ä'".encode("latin-1") + b"\0"))
    assert talk.operations[0].text == "SELECT 'ä'"
    assert talk.operations[0].verb == "SELECT"
    talk.down(complete("SELECT 1"), READY)
    talk.down(message("S", "client_encoding", "MULE_INTERNAL"))
    talk.up(query("SELECT 1"))
    assert talk.operations[1].verb == "unknown"


def test_a_text_that_is_not_in_its_encoding_is_shown_escaped_and_not_known(talk):
    talk.up(message("Q", b"SELECT '\xff'\0"))
    assert (talk.operations[0].verb, talk.operations[0].text) == ("unknown", "SELECT '\\xff'")


def test_a_backslash_is_not_guessed_at_without_standard_strings(talk):
    talk.down(message("S", "standard_conforming_strings", "off"))
    talk.up(query(r"SELECT '\'; DROP TABLE t; --'"))
    assert [each.verb for each in talk.operations] == ["unknown"]


def test_an_empty_query_is_an_operation(talk):
    talk.up(query(" -- nothing\n"))
    talk.down(message("I"), READY)
    assert (talk.operations[0].verb, talk.statuses) == ("EMPTY", {1: "ok"})


@pytest.mark.parametrize(
    "command", ["IDENTIFY_SYSTEM", "START_REPLICATION 0/0", "identify_system;"]
)
def test_a_wal_sender_is_asked_in_its_own_words(command):
    talk = Talk(replication="database")
    for _ in range(2):
        talk.up(query(command))
        assert talk.operations[-1].verb == command.split()[0].rstrip(";").upper()
    plain = Talk()
    plain.up(query(command))
    assert plain.operations[0].verb == "unknown"


# -- COPY


def test_copied_data_is_counted_on_both_sides(talk):
    talk.up(query("COPY t FROM STDIN"))
    talk.down(message("G", (0, 1), (0, 2)))
    talk.up(message("d", b"1\n2\n"), message("d", b"x" * 100_000))
    talk.up(message("c"))
    talk.down(complete("COPY 3"), READY)
    assert talk.results[0].detail == {
        "copy": {"direction": "in", "messages_up": 2, "bytes_up": 100_004}
    }
    talk.up(query("COPY t TO STDOUT"))
    talk.down(message("H", (0, 1), (0, 2)), message("d", b"1\n") * 3, message("c"))
    talk.down(complete("COPY 3"), READY)
    assert talk.results[1].detail == {
        "copy": {"direction": "out", "messages_down": 3, "bytes_down": 6}
    }


def test_copy_data_is_forwarded_as_it_comes(talk):
    talk.up(query("COPY t FROM STDIN"))
    talk.down(message("G", (0, 1), (0, 2)))
    before = len(talk.passed)
    talk.up(message("d", b"x" * 1_000_000)[:70_000])
    assert len(talk.passed) == before + 70_000
    assert not talk.layer.held(CLIENT)


def test_a_copy_that_the_client_gives_up_says_why(talk):
    talk.up(query("COPY t FROM STDIN"))
    talk.down(message("G", (0, 1), (0, 2)))
    talk.up(message("f", "changed my mind"))
    talk.down(error("57014", "COPY from stdin failed"), READY)
    assert talk.results[0].detail["copy"]["failed"] == "changed my mind"
    assert talk.statuses == {1: "error"}


def test_the_sync_that_a_copy_swallows_is_not_waited_for(talk):
    talk.up(parse("", "COPY t FROM STDIN"), bind("", ""), execute(), SYNC)
    talk.down(PARSED, BOUND, message("G", (0, 1), (0, 2)))
    talk.up(SYNC, FLUSH, message("d", b"1\n"), message("c"), SYNC)
    talk.down(complete("COPY 1"), READY)
    talk.up(query("SELECT 1"))
    talk.down(complete("SELECT 1"), READY)
    assert talk.statuses == {1: "ok", 2: "ok"}
    assert not talk.of(Gap)


def test_copy_both_counts_both_ways():
    talk = Talk(replication="true")
    talk.up(query("START_REPLICATION 0/0"))
    talk.down(message("W", (0, 1), (0, 2)), message("d", b"wal"))
    talk.up(message("d", b"status"))
    talk.feed(UPSTREAM, None)
    assert talk.statuses == {1: "cut"}
    assert talk.results[0].detail["copy"] == {
        "direction": "both", "messages_up": 1, "bytes_up": 6, "messages_down": 1, "bytes_down": 3,
    }  # fmt: skip


# -- ends


def test_an_upstream_that_closes_cuts_what_runs(talk):
    talk.up(query("SELECT g FROM g"), query("SELECT 2"))
    talk.down(columns("g"), row(b"1"), row(b"2")[:7])
    talk.feed(UPSTREAM, None)
    assert talk.statuses == {1: "cut", 2: "cut"}
    assert talk.results[0].rows == 2
    assert talk.results[0].bytes > 0


def test_what_is_asked_of_a_server_that_is_gone_is_cut_at_once(talk):
    talk.up(query("COPY t FROM STDIN"), parse("s", "SELECT 1"))
    talk.down(message("G", (0, 1), (0, 2)))
    talk.feed(UPSTREAM, None)
    talk.up(SYNC, query("SELECT 2"), bind("", "s"), execute(), SYNC)
    assert talk.statuses == dict.fromkeys(range(1, 5), "cut")


def test_an_answer_to_what_is_still_held_back_is_not_taken_for_one(talk):
    talk.up(parse("s", "SELECT 1"))
    talk.down(PARSED)
    assert talk.of(Gap)[0].detail == "unexpected ParseComplete"
    talk.up(SYNC)
    talk.down(PARSED, READY)
    assert talk.statuses == {1: "ok"}


def test_a_client_that_half_closes_still_gets_its_results(talk):
    talk.up(query("SELECT 1"))
    talk.feed(CLIENT, None)
    assert talk.results == []
    talk.down(complete("SELECT 1"), READY)
    assert talk.statuses == {1: "ok"}


def test_what_a_client_left_unfinished_is_withheld_and_said(talk):
    at = len(talk.passed)
    talk.up(query("SELECT 1") + query("SELECT 2")[:9])
    talk.feed(CLIENT, None)
    assert talk.of(Withheld) == [Withheld("client", at + len(query("SELECT 1")), 9, "incomplete")]
    assert talk.passed.endswith(query("SELECT 1"))


def test_what_was_held_for_its_execute_still_goes_when_the_client_ends(talk):
    talk.up(parse("s", "SELECT 1"))
    talk.feed(CLIENT, None)
    assert talk.operations[0].kind == "prepare"
    assert talk.passed.endswith(parse("s", "SELECT 1"))


def test_a_reset_cuts_everything(talk):
    talk.up(query("SELECT 1") + parse("", "SELECT 2"))
    talk.records += [effect.record for effect in talk.layer.handle(Eof(CLIENT, reset=True))]
    assert talk.statuses == {1: "cut"}
    assert talk.of(Withheld)[0].why == "reset"


def test_a_fatal_error_ends_the_operation_that_ran(talk):
    talk.up(query("SELECT pg_sleep(10)"))
    talk.down(error("57P01", "terminating connection", "FATAL"))
    talk.feed(UPSTREAM, None)
    assert talk.statuses == {1: "error"}
    assert talk.results[0].detail == {"severity": "FATAL"}


def test_a_refusal_is_a_fatal_error_with_the_reference(talk):
    talk.up(query("SELECT pg_sleep(10)"))
    talk.refuse("ended by an administrator (reference 0123456789abc)")
    found, rest = messages(bytes(talk.own[CLIENT]))
    assert [kind for kind, _ in found] == ["E"]
    assert rest == b""
    assert b"C57P01\0" in found[0][1]
    assert b"(reference 0123456789abc)" in found[0][1]
    assert talk.statuses == {1: "cut"}
    assert talk.closed == {CLIENT, UPSTREAM}


def test_a_refusal_inside_a_message_only_closes(talk):
    talk.up(query("SELECT g FROM g"))
    talk.down(row(b"x" * 1000)[:500])
    talk.refuse("ended by an administrator")
    assert not talk.own[CLIENT]
    assert talk.closed == {CLIENT, UPSTREAM}


@pytest.mark.parametrize(
    "junk",
    [
        b"?\0\0\0\x04", message("Q", b"no end"), message("Q", b"two\0strings\0"), b"Q\0\0\0\3",
        message("S", b"x"), message("E", ""), message("D", b"X", ""), message("B", ""),
        message("P", "s"), message("p", "pass"),
    ],
)  # fmt: skip
def test_a_broken_message_is_refused_after_what_came_before_it(talk, junk):
    talk.up(query("SELECT 1") + junk)
    assert talk.failed.side is CLIENT
    assert [each.text for each in talk.operations] == ["SELECT 1"]
    assert talk.passed.endswith(query("SELECT 1"))


def test_a_server_that_breaks_the_protocol_is_refused_without_an_error_in_the_middle(talk):
    talk.up(query("SELECT 1"))
    talk.down(complete("SELECT 1"), READY, b"?junk")
    assert talk.failed.side is UPSTREAM
    assert talk.statuses == {1: "ok"}
    talk.refuse("broken")
    assert not talk.own[CLIENT]


def test_answers_are_bounded_by_what_the_pipeline_allows():
    assert pgpipeline.MOST_STEPS * len(PARSED) > 2 * 8192  # the server's send buffer


# -- any order of messages

UP = [
    query("SELECT 1"), query("SELECT 1; SELECT 2"), query(""), query("PREPARE s AS SELECT 3"),
    query("DEALLOCATE ALL"), query("COPY t FROM STDIN"), parse("", "SELECT $1"),
    parse("s", "SELECT 4"), parse("s", "COPY t FROM STDIN"), bind("", "", b"1"), bind("", "s"),
    bind("p", "s"), execute(), execute("p", 1), describe("S", "s"), describe("P"),
    close("S", "s"), close("P", "p"), SYNC, SYNC, FLUSH, message("d", b"x"), message("c"),
    message("f", "no"), message("X"), message("F", (1, 4), (0, 2), (0, 2), (0, 2)), None,
]  # fmt: skip
DOWN = [
    PARSED, BOUND, CLOSED, complete("SELECT 1"), complete("COPY 1"), columns("a"), row(b"1"),
    message("n"), message("s"), message("I"), message("t", (1, 2), (23, 4)), error("42601"),
    READY, READY, IN_TRANSACTION, message("G", (0, 1), (0, 2)), message("H", (0, 1), (0, 2)),
    message("W", (0, 1), (0, 2)), message("d", b"x"), message("c"), message("V", (-1, 4)),
    message("N", b"SNOTICE\0\0"), message("A", (1, 4), "x", "y"), None,
    message("S", "client_encoding", "LATIN1"), message("S", "standard_conforming_strings", "off"),
]  # fmt: skip
EITHER = st.one_of(
    st.tuples(st.just(CLIENT), st.sampled_from(UP)),
    st.tuples(st.just(UPSTREAM), st.sampled_from(DOWN)),
)


@settings(deadline=None, max_examples=400)
@given(st.lists(EITHER, max_size=40), st.integers(1, 9))
def test_messages_in_any_order_are_told_once_and_in_any_pieces_alike(said, size):
    whole, cut = Talk(), Talk()
    ended = set()
    for side, data in said:
        if side in ended:
            continue
        if data is None:
            ended.add(side)
        whole.feed(side, data)
        for at in range(0, len(data or b""), size):
            cut.feed(side, data[at : at + size])
        if data is None:
            cut.feed(side, None)
    for talk in (whole, cut):
        talk.refuse("the end")
        results = [result.op for result in talk.results]
        assert sorted(results) == list(range(1, len(talk.operations) + 1))
        assert [operation.op for operation in talk.operations] == sorted(results)
        assert talk.untold == []
    assert whole.records == cut.records
    assert whole.relayed == cut.relayed


# -- recorded sessions


def recorded(name):
    transcript = load(FOLDER / "postgresql" / f"{name}.txt")
    replay = Talk(ready=False)
    for side, data in transcript.pieces:
        replay.feed(side, data)
    return replay


@pytest.mark.parametrize("version", [15, 18])
def test_a_recorded_psql_session_is_told_in_full(version):
    talk = recorded(f"psql-pg{version}")
    verbs = [operation.verb for operation in talk.operations]
    assert verbs[:8] == [
        "CREATE", "INSERT", "SELECT", "SELECT", "SELECT", "SELECT", "SELECT", "unknown",
    ]  # fmt: skip
    assert [result.tag for result in talk.results if result.tag.startswith("COPY")] == [
        "COPY 2", "COPY 4",
    ]  # fmt: skip
    errors = [result.sqlstate for result in talk.results if result.status == "error"]
    assert errors == ["22012", "42601", "26000", "22P02"]
    assert talk.facts("notification")[0]["payload"] == "something happened"
    assert talk.facts("notice")[0]["message"] == "look here"
    assert sorted(talk.statuses) == list(range(1, len(talk.operations) + 1))


def test_a_recorded_cancel_is_linked_by_pid_and_digest():
    session, request = recorded("cancel-3.2-pg18-1"), recorded("cancel-3.2-pg18-2")
    key = session.facts("backend-key")[0]
    named = request.facts("cancel")[0]
    assert (key["pid"], key["key_digest"]) == (named["pid"], named["key_digest"])
    assert "57014" in [result.sqlstate for result in session.results]


def test_a_recorded_function_call_is_told():
    talk = recorded("psql-large-object-pg15")
    calls = [each.text for each in talk.operations if each.kind == "function"]
    assert "function 957" in calls or "function 715" in calls
    assert set(talk.statuses.values()) == {"ok"}


def test_a_recorded_pipeline_skips_what_the_server_skipped():
    talk = recorded("psycopg-pipeline-pg15")
    assert "skipped" in talk.statuses.values()
    assert not talk.of(Gap)


def test_an_idle_session_is_small():
    hello, asked = startup(user="report"), query("SELECT 1")
    answered = columns("?column?") + row(b"1") + complete("SELECT 1") + READY

    def idle():
        layer = PROTOCOL.layer(facts())
        layer.handle(Data(CLIENT, hello, 0, TIME))
        layer.handle(Data(UPSTREAM, GREETING, 0, TIME))
        layer.handle(Data(CLIENT, asked, len(hello), TIME))
        layer.handle(Data(UPSTREAM, answered, len(GREETING), TIME))
        return layer

    idle()
    gc.collect()
    tracemalloc.start()
    kept = [idle() for _ in range(200)]
    gc.collect()
    size = tracemalloc.get_traced_memory()[0] / len(kept)
    tracemalloc.stop()
    print(f"{size:.0f} bytes a session")
    assert size < 2048
