"""Real clients through the real driver to real servers; the server's own log is the oracle."""

import threading

import psycopg
import pytest
from driven import Gate, half_stream, records
from pgclients import RUNS, asked, connect, prepare, psql, unlike
from pglog import statements
from pgserver import VERSIONS, PgServer

from capture.frames import Kind

HOST = "127.0.0.1"


@pytest.fixture(scope="module", params=VERSIONS)
def heard(request, tmp_path_factory):
    """Return (what the server logged of the clients, sessions: pid -> (records, raw requests))."""
    with PgServer(request.param) as server:
        prepare(server)
        gate = Gate(tmp_path_factory.mktemp("gate"))
        port = gate.listen((HOST, server.port))
        for run in RUNS:
            gate.serve(run, server.programs, HOST, port)
        gate.step(lambda: not gate.worker.sessions)
        frames = gate.close()
        logged = statements(server.log)
    sessions = {}
    for number in dict.fromkeys(session for _, session, *_ in frames):
        found = records(frames, number)
        keys = [each["fields"] for each in found if each["record"] == "Fact"
                and each["kind"] == "backend-key"]  # fmt: skip
        if keys:
            sessions[keys[0]["pid"]] = found, half_stream(frames, number, Kind.UP)
    return [each for each in logged if each.pid in sessions], sessions


def test_every_statement_that_the_server_logged_is_an_operation_and_no_other(heard):
    logged, sessions = heard
    assert len(logged) > 300
    for pid, (found, raw) in sessions.items():
        assert list(unlike([each for each in logged if each.pid == pid], found, raw)) == []


def test_bind_values_are_those_that_the_server_saw(heard):
    logged, sessions = heard
    compared = 0
    for pid, (found, raw) in sessions.items():
        ran = [each for each in logged if each.pid == pid]
        for operation, _, (text, name, extended) in asked(found, raw):
            if not ran or (ran[0].text, ran[0].name, ran[0].extended) != (text, name, extended):
                continue
            seen = ran.pop(0).parameters
            if operation["kind"] != "extended":
                continue
            assert len(seen) == len(operation["binds"])
            for bound, value in zip(operation["binds"], seen, strict=True):
                if isinstance(bound, bool):
                    assert value == "ft"[bound]
                elif isinstance(bound, int | str) or bound is None:
                    assert value == (None if bound is None else str(bound))
                    compared += 1
    assert compared > 100


def test_every_operation_has_one_result_that_fits_it(heard):
    _, sessions = heard
    for found, _ in sessions.values():
        operations = [each["op"] for each in found if each["record"] == "Operation"]
        results = [each["op"] for each in found if each["record"] == "Result"]
        assert sorted(results) == operations == list(range(1, len(operations) + 1))
        assert not [each for each in found if each["record"] == "Gap"]
        for each in found:
            if each["record"] == "Result" and each["tag"].startswith("SELECT "):
                assert each["rows"] <= int(each["tag"].split()[1])
            if each["record"] == "Result" and each["tag"].startswith("COPY 3"):
                copied = each["detail"]["copy"]
                assert copied.get("messages_down", 3000) >= 3000


def test_rows_are_counted_as_the_server_counted_them(heard):
    _, sessions = heard
    counted = 0
    for found, _ in sessions.values():
        fetched = {each["op"] for each in found if each.get("kind") == "fetch"}
        for each in found:
            if each["record"] != "Result" or not each["tag"].startswith("SELECT "):
                continue
            if each["op"] not in fetched and "; " not in each["tag"]:
                counted += 1
                assert each["rows"] == int(each["tag"].split()[1]), each
    assert counted > 100


def test_replication_is_told_and_its_data_counted(heard):
    _, sessions = heard
    told = {}
    for found, _ in sessions.values():
        results = {each["op"]: each for each in found if each["record"] == "Result"}
        for each in found:
            if each["record"] == "Operation" and "_" in each["verb"]:
                told[each["verb"]] = results[each["op"]]
    assert {"BASE_BACKUP", "IDENTIFY_SYSTEM", "CREATE_REPLICATION_SLOT", "START_REPLICATION",
            "DROP_REPLICATION_SLOT"} <= set(told)  # fmt: skip
    assert told["BASE_BACKUP"]["detail"]["copy"]["bytes_down"] > 20_000_000
    assert told["START_REPLICATION"]["detail"]["copy"]["direction"] == "both"


def test_a_cancel_through_the_gate_is_linked_and_works(tmp_path):
    with PgServer(18) as server:
        gate = Gate(tmp_path)
        port = gate.listen((HOST, server.port))

        def client():
            with connect(HOST, port, max_protocol_version="3.2") as connection:
                timer = threading.Timer(0.4, connection.cancel_safe)
                timer.start()
                with pytest.raises(psycopg.errors.QueryCanceled):
                    connection.execute("SELECT pg_sleep(20)")
                timer.join()

        gate.serve(client)
        gate.step(lambda: not gate.worker.sessions)
        frames = gate.close()
    facts = [
        each["fields"]
        for number in dict.fromkeys(session for _, session, *_ in frames)
        for each in records(frames, number)
        if each["record"] == "Fact" and each["kind"] in ("backend-key", "cancel")
    ]
    assert len(facts) == 2
    assert facts[0]["key_digest"] == facts[1]["key_digest"]
    assert facts[0]["pid"] == facts[1]["pid"]


def test_a_killed_session_tells_psql_why(tmp_path):
    with PgServer(15) as server:
        gate = Gate(tmp_path)
        port = gate.listen((HOST, server.port))

        def kill():
            (session,) = gate.worker.sessions
            gate.worker.kill(session, "uid:0(root)", "test")

        gate.loop.call_later(0.7, kill)
        done = gate.serve(
            psql, server.programs, HOST, port, "scram", "SELECT 'a'; SELECT pg_sleep(20);"
        )
        gate.step(lambda: not gate.worker.sessions)
        gate.close()
    assert "FATAL:  this session was ended by an administrator (reference 0" in done.stderr
