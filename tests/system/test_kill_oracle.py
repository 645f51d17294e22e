"""kill -9 with PostgreSQL's own log as the oracle: every statement that the server ran is in the
evidence, whenever and whatever was killed.

The record has it twice: in the bytes that the client sent, and as an Operation. Both are looked
for, statement by statement, in the order in which each server process ran them.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from gate_hosts import SEAL, SERVER4, Gate

sys.path.append(str(Path(__file__).parents[1] / "contract"))

from pglog import statements
from pgserver import PgServer
from staging import end

from appliance.lab import topology
from capture.verify import verify

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

KILLS = 50
THREADS = 3
EVIDENCE = f"segment_bytes = {16 << 20}\nchunk_count = 3"


def start_load(gate, server):
    argv = [sys.executable, str(Path(__file__).with_name("pg_load.py")), str(server.programs)]
    return topology.start(
        gate.topology.namespace("client"), [*argv, SERVER4, str(server.port), str(THREADS)],
        stdin=subprocess.PIPE, env={**os.environ, "PGSSLMODE": "disable"},
    )  # fmt: skip


def kill(gate, victims):
    """Kill processes at once, and start them again."""
    for number in victims:
        gate.processes[number].kill()
    for number in victims:
        gate.processes[number].wait()
        if number == SEAL:
            gate.start_seal()
        else:
            gate.start(number)
    for number in victims:
        if number != SEAL:
            gate.wait_ready(number)


def backends(gate):
    """Return the sessions of PostgreSQL by the server process that they spoke with."""
    found = {}
    for session in gate.recorded().values():
        for record in session.records:
            if record["record"] == "Fact" and record["kind"] == "backend-key":
                found[record["fields"]["pid"]] = session
    return found


def missing_bytes(logged, session):
    """Return the first statement whose text the client's bytes do not have, or None."""
    seen, at = set(), 0
    for statement in logged:
        if statement.text not in seen:
            text = statement.text.encode()
            found = session.up.find(text, at)
            if found < 0:
                found = session.up.find(text)
            if found < 0:
                return statement
            seen.add(statement.text)
            at = found
    return None


def missing_operation(logged, session):
    """Return the first statement that the server ran and that is no Operation, or None."""
    operations = iter([r for r in session.records if r["record"] == "Operation"])
    for statement in logged:
        for operation in operations:
            if statement.text in operation["text"] or operation["text"] in statement.text:
                break
        else:
            return statement
    return None


def test_every_statement_that_the_server_ran_survives_fifty_kills():
    dice = random.Random(31)
    with Gate(workers=2, evidence=EVIDENCE) as gate:
        gate.start_seal()
        on_server = partial(topology.start, gate.topology.namespace("server"))
        with PgServer(15, host=SERVER4, port=5432, run=on_server) as server:
            server.psql("CREATE TABLE heard (mark text)", database="shop")
            pgbench = [server.programs / "pgbench", "-i", "-q", "-h", server.folder, "-p", "5432"]
            subprocess.run([*pgbench, "-U", "postgres", "shop"], check=True, capture_output=True)
            load = start_load(gate, server)
            try:
                for _ in range(KILLS):
                    time.sleep(dice.random() * 0.5)
                    kill(gate, dice.choice(([0], [1], [0, 1], [SEAL], [0, 1, SEAL])))
                time.sleep(0.5)  # the last lives have their say as well
            finally:
                load.stdin.close()
                try:
                    load.wait(60)
                finally:
                    end(load)
            logged = statements(server.log)
        for number in (0, 1, SEAL):
            assert gate.stop(number) == 0, gate.log(number).read_text()[-2000:]
        check(gate, logged)
        assert verify(gate.state).exit_code == 0


def check(gate, logged):
    assert len(logged) > 20 * KILLS
    sessions = backends(gate)
    by_process = {}
    for statement in logged:
        by_process.setdefault(statement.pid, []).append(statement)
    assert len(by_process) > KILLS
    for process, ran in by_process.items():
        session = sessions.get(process)
        assert session is not None, f"no session for {ran[0]}"
        assert missing_bytes(ran, session) is None
        assert missing_operation(ran, session) is None
    cut = [s for s in gate.recorded().values() if s.open and s.close is None]
    recovered = {record["incarnation"] for record in gate.records("Recovered")}
    assert {session.number >> 40 for session in cut} <= recovered
    assert len(recovered) > KILLS // 2
    print(f"{len(logged)} statements, {len(by_process)} server processes, {len(cut)} sessions cut")


def test_the_oracle_notices_a_statement_that_is_missing():
    """What the test above relies on: a statement that was not recorded is found missing."""
    ran = [type("Logged", (), {"text": f"SELECT {n}"}) for n in range(3)]
    whole = [{"record": "Operation", "text": f"SELECT {n}"} for n in range(3)]
    session = type("Session", (), {"records": whole})
    assert missing_operation(ran, session) is None
    session.records = [whole[0], whole[2]]
    assert missing_operation(ran, session).text == "SELECT 1"
    session.records = [whole[1], whole[0], whole[2]]
    assert missing_operation(ran, session) is not None
