import pytest
from gatekeeper import Gatekeeper

from appliance import live
from capture import index_query
from capture.access import person_of
from capture.frames import session_name, session_number
from capture.records import KINDS, Decision


@pytest.fixture
def worker(narrows):
    with narrows.evidence.writer() as gate:
        made = Gatekeeper(narrows.evidence.store.run / "gate-0.sock", gate)
        yield made
        made.close()


def test_running_sessions_are_shown_with_the_workers_own_counts(narrows, worker):
    name = worker.open("backup")
    [session] = narrows("live", "--json").json()
    assert session["id"] == name
    assert session["state"] == "running"
    assert session["service_account"] == "backup"
    assert session["owner"]["exe"] == "/usr/bin/psql"
    assert session["client"] == "192.0.2.10:4"
    assert session["target"] == "[2001:db8::1]:5432"
    assert (session["bytes_up"], session["bytes_down"]) == (70, 80)
    assert (session["operations"], session["unsent"]) == (9, 6)
    lines = narrows("live").out.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith(name)
    assert "backup" in lines[1]


def test_a_session_that_is_not_on_disk_yet_is_shown_too(narrows, worker):
    name = worker.open()
    number = next(iter(worker.running))
    told = worker.running.pop(number)
    unknown = session_name(number + 1)
    worker.running[number + 1] = {**told, "id": unknown, "protocol": ""}
    [session] = narrows("live", "--json").json()
    assert session["id"] == unknown != name
    assert session["protocol"] is None
    assert unknown in narrows("live").out


def test_nothing_that_a_gate_says_reaches_the_terminal_as_it_is(narrows, worker):
    worker.open("\x1b[31maccount\n")
    worker.running[next(iter(worker.running))]["protocol"] = "\x1b[2J"
    for words in ([], ["--json"]):
        assert "\x1b" not in narrows("live", *words).out


def test_no_worker_is_exit_code_69_and_a_silent_one_is_1(narrows, worker):
    worker.open()
    (narrows.evidence.store.run / "gate-1.sock").write_bytes(b"")
    answer = narrows("live", "--json")
    assert (answer.code, len(answer.json())) == (1, 1)
    assert answer.err.startswith("narrows: gate-1.sock does not answer: ")
    (narrows.evidence.store.run / "gate-0.sock").rename(narrows.evidence.store.run / "away")
    for words in (["live"], ["kill", "0", "--reason", "x"]):
        answer = narrows(*words)
        assert (answer.code, answer.out) == (69, "")
    (narrows.evidence.store.run / "away").rename(narrows.evidence.store.run / "gate-0.sock")


def test_looking_at_running_sessions_is_recorded(narrows, worker):
    worker.open()
    narrows("live")
    assert narrows.reads() == [("live", [], "allowed")]


def test_a_kill_ends_the_session_and_says_who_did_it_and_why(narrows, worker):
    name, other = worker.open(), worker.open()
    answer = narrows("kill", name, "--reason", "card data \x1b")
    assert (answer.code, answer.err) == (0, f"session {name} was ended\n")
    assert [told["id"] for told in worker.list_sessions()] == [other]
    worker.gate.commit()
    with narrows.evidence.index() as index:
        [decision] = index_query.events(index, KINDS[Decision])
    assert decision.fields["reason"] == "card data \x1b"
    assert decision.fields["actor"] == person_of(0, "/proc/self/loginuid")
    assert session_name(decision.session) == name


def test_who_ended_a_session_is_what_the_kernel_says_whatever_the_asker_claims(narrows, worker):
    socket = narrows.evidence.store.run / "gate-0.sock"
    first, second = worker.open(), worker.open()
    question = {"do": "kill", "session": first, "reason": "x", "actor": "uid:1000(bob)"}
    assert live.ask(socket, question) == {"done": True}
    for whom in ("uid:1000(bob)", "bob", 7):
        refused = live.ask(socket, question | {"session": second, "for": whom})
        assert "cannot be understood" in refused["error"]
    assert [told["id"] for told in worker.list_sessions()] == [second]
    token = "token:1(ann) peer:203.0.113.9"
    assert live.kill(narrows.evidence.store.run, session_number(second), "y", token)
    worker.gate.commit()
    with narrows.evidence.index() as index:
        found = [e.fields["actor"] for e in index_query.events(index, KINDS[Decision])]
    kernel = person_of(0, "/proc/self/loginuid")
    assert kernel.startswith("uid:0(root)")
    assert found == [kernel, f"{token} via {kernel}"]


def test_a_kill_needs_one_running_session_and_a_reason(narrows, worker):
    name, other = worker.open(), worker.open()
    assert name[:-1] == other[:-1]
    assert narrows("kill", name[:-1], "--reason", "x").code == 2
    assert narrows("kill", "", "--reason", "x").code == 2
    assert narrows("kill", "zzz", "--reason", "x").code == 3
    assert narrows("kill", name, "--reason", " ").code == 2
    assert narrows("kill", name).code == 2
    assert len(worker.running) == 2
    assert narrows("kill", name.upper(), "--reason", "x").code == 0
    assert narrows("kill", name, "--reason", "x").code == 3
