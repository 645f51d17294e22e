"""Records that are laid down without an object are, byte for byte, what the object would be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as some

from appliance.config import Route
from appliance.proxy.standing import MOST_KEPT, Standing, closed
from capture.records import Attributed, Detected, SessionClose, SessionOpen, encode

ADDRESSES = some.ip_addresses().map(str)
PORTS = some.integers(0, 65535)
COUNTS = some.integers(0, (1 << 63) - 1)
WORDS = some.text("abcdefghijklmnopqrstuvwxyz-", max_size=20)


@given(ADDRESSES, PORTS, ADDRESSES, PORTS, some.text(), some.integers(0, 999))
def test_session_open(client, client_port, target, target_port, name, worker):
    route = Route(name, durability="fsync", source="gate")
    record = SessionOpen(client, client_port, target, target_port, name, "fsync", "gate", worker)
    standing = Standing(worker)
    for _ in range(2):
        laid = standing.opened((client, client_port), (target, target_port), route)
        assert laid == encode(record)


@given(some.tuples(WORDS, WORDS, COUNTS, COUNTS, COUNTS, COUNTS, WORDS))
def test_session_close(fields):
    assert closed(*fields) == encode(SessionClose(*fields))


@given(some.lists(some.tuples(some.text(), some.text()), max_size=5))
def test_detected(pairs):
    standing = Standing(0)
    for protocol, reason in pairs * 2:
        secrets = "unparsed" if protocol == "opaque" else ""
        assert standing.detected(protocol, reason) == encode(Detected(protocol, reason, secrets))


def test_attributed_is_the_answer_itself_whether_or_not_it_was_seen_before():
    standing = Standing(0)
    answers = [
        Attributed(f"account-{n}", "kernel", "syn", owner={"pid": n}) for n in range(MOST_KEPT + 50)
    ]
    for answer in [*answers, *answers[::-1], *answers]:
        assert standing.attributed(answer) == encode(answer)


def test_answers_of_one_session_only_are_not_kept():
    standing = Standing(0)
    for waited in range(1, 5000):
        answer = Attributed(None, "none", "none", "timeout", waited_ns=waited)
        assert standing.attributed(answer) == encode(answer)
    assert not standing._attributed
