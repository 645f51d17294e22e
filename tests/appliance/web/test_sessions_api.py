"""Sessions over the API: lists and their pages, one session, its operations and records."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from review_evidence import Evidence

from appliance.cli import main
from appliance.web.problem import Problem
from capture.frames import session_name
from capture.records import Gap, Hidden


def ids(answer):
    return [session["id"] for session in answer["items"]]


@pytest.fixture(scope="module")
def filled(shared):
    with shared.evidence.writer() as gate:
        first = gate.open("ci-deployer", "postgresql")
        for op in range(1, 26):
            gate.select(first, op, f"select {op} from orders where card_number = 'x'")
        gate.record(first, Hidden("client", 0, 3, "password", "ab"))
        gate.record(first, Gap("session", "parser", count=7))
        gate.close(first, 25)
        second = gate.open("backup-job", "opaque", target="2001:db8:2::10")
        gate.up(second, b"plain bytes")
        gate.close(second)
        third = gate.open(None, "postgresql")
        gate.ask(third, 1, "update customers set name = 'y'")
        gate.commit()
        shared.names = [session_name(number) for number in (first, second, third)]
        yield shared


def test_a_list_is_what_the_command_line_says(filled, capfd, tmp_path):
    config = tmp_path / "narrows.toml"
    paths = filled.config.paths
    config.write_text(f'[paths]\nstate = "{paths.state}"\nrun = "{paths.run}"\n')
    capfd.readouterr()
    assert main(["sessions", "list", "--json", "--config", str(config)]) == 0
    listed = json.loads(capfd.readouterr().out)
    assert filled.ok("/sessions")["items"] == listed
    assert len(listed) == 3
    assert main(["sessions", "show", filled.names[0], "--json", "--config", str(config)]) == 0
    shown = json.loads(capfd.readouterr().out)
    name = filled.names[0]
    found = [one for page in filled.pages(f"/sessions/{name}/operations", limit=10) for one in page]
    assert found == shown["operations"]
    assert len(found) == 25
    for kind in ("gaps", "hidden", "facts", "alarms", "withheld", "decisions"):
        records = filled.ok(f"/sessions/{name}/records", kind=kind)
        assert records == {"items": shown[kind], "next": None}
    assert shown["gaps"][0]["count"] == 7


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"account": "backup-job"}, [1]),
        ({"unknown": "true"}, [2]),
        ({"protocol": "postgresql"}, [2, 0]),
        ({"state": "running"}, [2]),
        ({"state": "closed", "protocol": "postgresql"}, [0]),
        ({"target": "198.51.100.10"}, [2, 0]),
        ({"target": "198.51.100.10:5432"}, [2, 0]),
        ({"target": "198.51.100.10:1"}, []),
        ({"target": "[2001:db8:2::10]:5432"}, [1]),
        ({"target": "2001:db8:2::10"}, [1]),
        ({"q": "card_number"}, [0]),
        ({"q": "customers", "account": "ci-deployer"}, []),
        ({"q": "update", "state": "running"}, [2]),
        ({"until": "2000-01-01T00:00:00Z"}, []),
        ({"since": "2000-01-01T00:00:00Z", "limit": 2}, [2, 1]),
        ({"account": "x' OR 1=1 --"}, []),
        ({"since": "0001-01-01T00:00:00+14:00", "q": "customers"}, [2]),
        ({"until": "9999-12-31T23:59:59-14:00"}, [2, 1, 0]),
        ({"since": "9999-12-31T23:59:59Z", "q": "customers"}, []),
        ({"cursor": f"8{'9' * 18}.0000000000000", "q": "customers"}, [2]),
        ({"cursor": "0.0000000000000", "q": "customers"}, []),
    ],
)
def test_filters_choose_sessions(filled, query, expected):
    assert ids(filled.ok("/sessions", **query)) == [filled.names[n] for n in expected]


def test_one_session_is_the_one_of_the_list(filled):
    for session in filled.ok("/sessions")["items"]:
        assert filled.ok(f"/sessions/{session['id']}") == session


def test_an_operation_has_text_binds_verdict_and_result(filled):
    [one] = filled.ok(f"/sessions/{filled.names[2]}/operations")["items"]
    assert one["text"] == "update customers set name = 'y'"
    assert (one["binds"], one["verdict"], one["result"]) == ([], "allowed", None)
    first = filled.ok(f"/sessions/{filled.names[0]}/operations", limit=1)
    assert first["items"][0]["result"]["tag"] == "SELECT 1"
    assert first["next"] == "1"


def test_an_unknown_session_is_not_found(filled):
    for tail in ("", "/operations", "/records?kind=gaps", "/streams/up", "/export"):
        answer = filled.get(f"/sessions/0000000000000{tail}")
        assert (answer.status, answer.problem()) == (404, "not-found"), tail


@pytest.mark.parametrize(
    ("path", "parameter"),
    [
        ("/sessions?limit=0", "limit"),
        ("/sessions?limit=1001", "limit"),
        ("/sessions?limit=-1", "limit"),
        ("/sessions?limit=1e3", "limit"),
        ("/sessions?limit=%D9%A3", "limit"),
        ("/sessions?limit=1&limit=2", "limit"),
        ("/sessions?cursor=x", "cursor"),
        ("/sessions?cursor=1.zzzzzzzzzzzzz", "cursor"),
        ("/sessions?cursor=99999999999999999999.0000000000000", "cursor"),
        ("/sessions?since=yesterday", "since"),
        ("/sessions?since=2026-01-01T00:00:00", "since"),
        ("/sessions?state=open", "state"),
        ("/sessions?unknown=1", "unknown"),
        ("/sessions?q=...", "q"),
        ("/sessions?q=" + "a" * 501, "q"),
        ("/sessions?acount=x", None),
        ("/sessions/" + "U" * 13, "session"),
        ("/sessions/x", "session"),
        ("/events?cursor=1.2.3", "cursor"),
        ("/events?kind=access", "kind"),
        ("/evidence/proofs/inclusion", "index"),
    ],
)
def test_what_makes_no_sense_is_refused_and_named(filled, path, parameter):
    answer = filled.get(path)
    assert (answer.status, answer.problem()) == (400, "bad-request")
    assert answer.json().get("parameter") == parameter


def test_pages_neither_repeat_nor_miss_while_sessions_arrive(api):
    with api.evidence.writer() as gate:
        old = []
        for number in range(60):
            old.append(gate.open("ci-deployer"))
            gate.select(old[-1], 1, f"select {number} from orders")
        gate.commit()
        names = [session_name(number) for number in old]
        for query in ({}, {"q": "orders"}, {"account": "ci-deployer"}, {"state": "running"}):
            seen = []
            for page in api.pages("/sessions", limit=7, **query):
                seen += [session["id"] for session in page]
                new = gate.open("ci-deployer")  # while somebody turns the pages
                gate.select(new, 1, "select 1 from orders")
                gate.commit()
            assert len(seen) == len(set(seen)), query
            assert [name for name in seen if name in names] == names[::-1], query


def test_a_running_session_is_listed_within_a_second_and_grows(api):
    assert api.ok("/sessions")["items"] == []
    with api.evidence.writer() as gate:
        number = gate.open()
        gate.commit()
        until = time.monotonic() + 5
        while not (found := api.ok("/sessions")["items"]):
            assert time.monotonic() < until
        assert found[0]["state"] == "running"
        gate.up(number, b"x" * 5000)
        gate.commit()
        while api.ok(f"/sessions/{found[0]['id']}")["bytes_up"] != 5000:
            assert time.monotonic() < until


def test_a_dead_gates_sessions_are_cut_without_any_other_process(api):
    path = api.config.paths.state.parent
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path; from review_evidence import Evidence\n"
        "with Evidence(Path(sys.argv[1])).writer() as gate:\n"
        "    s = gate.open(); gate.up(s, b'last words'); gate.commit()\n"
        "    print('there', flush=True); time.sleep(60)\n"
    )
    folder = str(Path(sys.modules[Evidence.__module__].__file__).parent)
    argv = [sys.executable, "-c", script, str(path), folder]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as gate:
        assert gate.stdout.readline() == b"there\n"
        [session] = api.ok("/sessions")["items"]
        assert session["state"] == "running"
        gate.send_signal(signal.SIGKILL)
    until = time.monotonic() + 20
    while api.ok(f"/sessions/{session['id']}")["state"] != "cut":
        assert time.monotonic() < until
        time.sleep(0.1)
    assert api.get(f"/sessions/{session['id']}/streams/up").body == b"last words"


def test_many_ask_at_once_and_everyone_is_answered_and_recorded(api):
    with api.evidence.writer() as gate:
        gate.close(gate.open())
        gate.commit()
    answers = []

    def many():
        for _ in range(10):
            answers.append(api.get("/sessions").status)

    threads = [threading.Thread(target=many) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 80
    assert sum(action == "list" for _, action, *_ in api.reads()) == 80


def test_a_question_that_takes_too_long_is_given_up_and_others_are_answered(api):
    api.server.review.reading.answer_s = 0.2
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"

    async def ask():
        return await api.server.review.reading.ask(
            lambda opened: opened.index.db.execute(endless).fetchone()
        )

    for _ in range(6):  # more than there are threads
        with pytest.raises(Problem, match="too long"):
            api._run(ask())
    api.server.review.reading.answer_s = 20.0
    assert api.ok("/sessions") == {"items": [], "next": None}
