"""PostgreSQL through a real gate: real clients and servers on hosts of their own."""

import sys
import threading
from pathlib import Path

import pytest
from staging import wait_for

sys.path.append(str(Path(__file__).parents[1] / "contract"))

from driven import frames_of, half_stream, records
from pgclients import RUNS, connect, prepare, psql, unlike
from pglog import statements
from pgserver import PASSWORD, VERSIONS, PgServer

from appliance.lab.topology import SERVER4
from capture.frames import Kind

pytestmark = pytest.mark.system
ACCOUNT = "report-job"
COMPLETE_S = 15.0


def server_on(stage, version):
    """Return a server on the lab's server host."""

    def start(argv, **options):
        return stage.spawn("server", argv, group=f"postgresql-{version}", **options)

    return PgServer(version, host=SERVER4, port=5400 + version, run=start)


def conversations(stage):
    """Return pid -> (records, requests) of the PostgreSQL sessions that are complete."""
    frames = frames_of(stage.store, stage.keys)
    sessions = {}
    for number in dict.fromkeys(session for _, session, *_ in frames if session):
        found = records(frames, number)
        keys = [each["fields"]["pid"] for each in found
                if each["record"] == "Fact" and each["kind"] == "backend-key"]  # fmt: skip
        if keys and found[-1]["record"] == "SessionClose":
            sessions[keys[0]] = found, half_stream(frames, number, Kind.UP)
    return sessions


@pytest.mark.parametrize("version", VERSIONS)
def test_every_statement_that_the_server_logged_is_an_operation(stage, version):
    with server_on(stage, version) as server:
        prepare(server)
        for run in RUNS:
            stage.on("client", run, server.programs, SERVER4, server.port)
        logged = statements(server.log)
        assert len(logged) > 300
        ran = {each.pid for each in logged}
        sessions = wait_for(
            lambda: found if ran <= set(found := conversations(stage)) else None,
            COMPLETE_S, "the evidence of every session",
        )  # fmt: skip
        for pid in ran:
            found, raw = sessions[pid]
            assert list(unlike([each for each in logged if each.pid == pid], found, raw)) == []


def test_a_session_is_read_back_on_the_command_line_as_it_was(stage):
    with server_on(stage, 15) as server:
        argv = [str(server.programs / "psql"), "-X", "-h", SERVER4, "-p", str(server.port), "-U",
                "scram", "-d", "shop", "-c", "SELECT 'x' AS said", "-c", "SELECT 1/0", "-c",
                "COPY (SELECT 1) TO STDOUT"]  # fmt: skip
        stage.client(
            argv, account=ACCOUNT, check=False, env={"PGPASSWORD": PASSWORD, "PATH": "/usr/bin"}
        )

        def closed():
            found = [each for each in stage.sessions() if each["service_account"] == ACCOUNT]
            return [each for each in found if each["ended"]]

        (session,) = wait_for(closed, COMPLETE_S, "the session in the list")
        assert session["target"] == f"{SERVER4}:{server.port}"
        assert session["operations"] == 3
        assert session["protocol"] == "postgresql"
        shown = stage.narrows("sessions", "show", session["id"]).stdout
        assert "SELECT 'x' AS said" in shown
        assert "division by zero" in shown
        exported = stage.narrows("sessions", "export", session["id"], "--format", "ndjson").stdout
        assert "SELECT 'x' AS said" in exported
        assert PASSWORD not in exported


def test_a_cancel_that_lands_on_another_worker_works_and_is_linked(stage):
    with server_on(stage, 18) as server:

        def client():
            with connect(SERVER4, server.port, max_protocol_version="3.2") as connection:
                timer = threading.Timer(0.5, stage.on, ("client", connection.cancel_safe))
                timer.start()
                with pytest.raises(Exception, match="canceling statement"):
                    connection.execute("SELECT pg_sleep(20)")
                timer.join()

        for _ in range(4):
            stage.on("client", client)

        def facts():
            frames = frames_of(stage.store, stage.keys)
            found = [
                each
                for number in dict.fromkeys(session for _, session, *_ in frames if session)
                for each in records(frames, number)
                if each["record"] == "Fact" and each["kind"] in ("backend-key", "cancel")
            ]
            cancels = [each["fields"] for each in found if each["kind"] == "cancel"]
            keys = [each["fields"] for each in found if each["kind"] == "backend-key"]
            return (cancels, keys) if len(cancels) >= 4 else None

        cancels, keys = wait_for(facts, COMPLETE_S, "the cancel requests")
        for cancel in cancels:
            assert cancel["target"] == f"{SERVER4}:{server.port}"
            linked = [each for each in keys if each["key_digest"] == cancel["key_digest"]]
            assert [each["pid"] for each in linked] == [cancel["pid"]]


def test_a_killed_session_tells_psql_why_and_names_the_session(stage):
    with server_on(stage, 15) as server:
        answers = []

        def client():
            answers.append(psql(server.programs, SERVER4, server.port, "scram",
                                "SELECT 'running'; SELECT pg_sleep(30);"))  # fmt: skip

        thread = threading.Thread(target=stage.on, args=("client", client))
        thread.start()
        target = f"{SERVER4}:{server.port}"

        def running():
            found = [each for each in stage.sessions() if each["target"] == target]
            return [each for each in found if not each["ended"] and each["operations"] >= 2]

        (session,) = wait_for(running, COMPLETE_S, "the running session")
        stage.narrows("kill", session["id"], "--reason", "test")
        thread.join(20)
        assert f"(reference {session['id']})" in answers[0].stderr
        assert "FATAL" in answers[0].stderr


def test_a_gate_without_a_server_behind_it_resets_psql(stage):
    argv = ["psql", "-h", SERVER4, "-p", "5999", "-U", "x", "-c", "SELECT 1"]
    done = stage.client(argv, check=False)
    assert done.returncode == 2
    assert "refused" in done.stderr or "reset" in done.stderr or "closed" in done.stderr
