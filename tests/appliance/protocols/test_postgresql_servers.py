"""Real clients through the real driver to real servers; the server's own log is the oracle."""

import os
import socket
import subprocess
import threading

import psycopg
import pytest
from driven import Gate, half_stream, records
from messages import message, messages, startup
from pglog import statements
from pgserver import PASSWORD, VERSIONS, PgServer
from psycopg import sql

from capture.frames import Kind

TYPES = """
    CREATE TABLE kept (n int, big bigint, t text, b bytea, ok bool, f float8, num numeric,
                       w timestamptz, d date, u uuid, j jsonb, list int[])
"""


def psql(server, port, user, script, *words):
    argv = [str(server.programs / "psql"), "-X", "-q", "-h", "127.0.0.1", "-p", str(port), "-U",
            user, "-d", "shop", *words]  # fmt: skip
    environment = {**os.environ, "PGPASSWORD": PASSWORD}
    return subprocess.run(argv, input=script, text=True, capture_output=True, check=False,
                          env=environment)  # fmt: skip


def connect(port, **words):
    return psycopg.connect(host="127.0.0.1", port=port, user="scram", password=PASSWORD,
                           dbname="shop", sslmode="disable", autocommit=True, **words)  # fmt: skip


def run_psql(server, port):
    with_file = f"\\lo_import {__file__}\n"
    psql(server, port, "plain", """
        SELECT 1; SELECT 'a;b' AS "x;y", $$dollar;$$;
        -- a remark
        SELECT /* inside */ 2 \\; SELECT 3 \\; SELECT 4 / 0 \\; SELECT 5;
        BEGIN; UPDATE kept SET n = 1; ROLLBACK;
        SELECT 'many
lines', E'\\ttab\\\\';
        SELECT U&'\\0041', 'ünïcödé ✓';
        PREPARE a AS SELECT $1::int; EXECUTE a(5); DEALLOCATE a; DEALLOCATE ALL;
        CREATE FUNCTION one() RETURNS int LANGUAGE sql AS 'SELECT 1';
        DO $x$ BEGIN RAISE NOTICE 'n'; END $x$;
        DECLARE c CURSOR WITH HOLD FOR SELECT generate_series(1, 9); FETCH 3 FROM c; CLOSE c;
        \\copy kept (n) FROM STDIN
1
2
\\.
        \\copy kept (n) TO STDOUT
        \\d kept
    """ + with_file)  # fmt: skip
    psql(server, port, "hashed", "SELECT 1 \\gdesc\nSELECT current_user \\gset\n\\echo :x\n")


def run_psycopg(server, port):
    del server
    rows = [
        (7, 2**40, "it's ä ✓", b"\0\1\xff", True, 1.5, "12.50", None, "2024-02-29",
         "6f1c4d0e-8f5b-4f0e-9a39-0c6a53a0f6a1", '{"a": [1]}', [1, None, 3]),
        (None, -1, "", b"", False, -0.0, "-0.001", "infinity", "0044-03-15 BC", None, "null", []),
    ]  # fmt: skip
    with connect(port) as connection:
        for row in rows:
            connection.execute(
                "INSERT INTO kept VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)", row
            )
        for number in range(8):
            connection.execute("SELECT t FROM kept WHERE n = %s", (number,))
            connection.execute("SELECT %b::int8, %b::float8, %b::text", (number, 0.5, "x"))
        connection.execute("SELECT %s || ''", ("x" * 70_000,))
        with pytest.raises(psycopg.Error):
            connection.execute("SELECT 1 / %s::int", (0,))
        with pytest.raises(psycopg.Error):
            connection.execute("SELEC %s", (0,))
        connection.execute(sql.SQL("SELECT {}").format("l" * 65_000))


def run_pipeline(server, port):
    del server
    with connect(port) as connection:
        for length in (1, 3, 40):
            with connection.pipeline() as pipeline:
                for number in range(length):
                    connection.execute("SELECT %s::int", (number,))
                    if number % 7 == 6:
                        pipeline.sync()
        try:
            with connection.pipeline() as pipeline:
                connection.execute("SELECT %s", ("before",))
                pipeline.sync()
                connection.execute("SELECT 1 / %s::int", (0,))
                connection.execute("SELECT %s", ("skipped",))
                pipeline.sync()
                connection.execute("SELECT %s", ("after",))
        except psycopg.errors.DivisionByZero:
            pass  # it was asked for
        for number in range(6):
            connection.execute("SELECT %s::int, 'named'", (number,), prepare=True)
        with connection.pipeline():
            for number in range(20):
                connection.execute("SELECT %s::int, 'named'", (number,), prepare=True)


def run_copy(server, port):
    del server
    with connect(port) as connection, connection.cursor() as cursor:
        with cursor.copy("COPY kept (n, t) FROM STDIN") as copy:
            for number in range(3000):
                copy.write_row((number, "x" * 100))
        with cursor.copy("COPY kept (n, t) TO STDOUT") as copy:
            assert sum(1 for _ in copy.rows()) > 3000
        cursor.execute("SELECT t, repeat('y', 500) FROM kept")
        assert len(cursor.fetchall()) > 3000


def run_pgbench(server, port):
    environment = {**os.environ, "PGPASSWORD": PASSWORD, "PGSSLMODE": "disable"}
    for mode in ("simple", "extended", "prepared"):
        argv = [str(server.programs / "pgbench"), "-n", "-M", mode, "-t", "15", "-c", "3",
                "-h", "127.0.0.1", "-p", str(port), "-U", "scram", "shop"]  # fmt: skip
        subprocess.run(argv, capture_output=True, check=True, env=environment)


class Raw:
    """A client of our own, for what libpq does not do."""

    def __init__(self, port):
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.settimeout(10)
        self.rest = b""
        self.sock.sendall(startup(user="open", database="shop"))
        self.until_ready()

    def until_ready(self, count=1):
        """Read up to the `count`th ReadyForQuery."""
        found = []
        while count > 0:
            data = self.sock.recv(65536)
            assert data, "the server closed"
            more, self.rest = messages(self.rest + data)
            found += more
            count -= sum(kind == "Z" for kind, _ in more)
        return found

    def say(self, *parts, ready=1):
        self.sock.sendall(b"".join(parts))
        return self.until_ready(ready)

    def close(self):
        self.sock.sendall(message("X"))
        while self.sock.recv(65536):
            pass
        self.sock.close()


def parse(name, text):
    return message("P", name, text, (0, 2))


def bind(portal, statement):
    return message("B", portal, statement, (0, 2), (0, 2), (0, 2))


def execute(portal="", rows=0):
    return message("E", portal, (rows, 4))


SYNC = message("S")


def run_raw(server, port):
    """Portals that are fetched in parts, and names that are not what they seem."""
    del server
    raw = Raw(port)
    raw.say(message("Q", "BEGIN"))
    raw.say(parse("", "SELECT generate_series(1, 5)"), bind("p", ""), execute("p", 2), SYNC)
    raw.say(execute("p", 2), execute("p", 2), SYNC)
    raw.say(message("Q", "COMMIT"))
    raw.say(parse("s", "SELECT 'the first'"), SYNC)
    # pipelined: the second Parse fails, and the Bind after it runs the first statement
    raw.say(parse("s", "SELECT 'the second'"), SYNC, bind("", "s"), execute(), SYNC, ready=2)
    raw.say(parse("", "SELECT 'unnamed'"), SYNC)
    # pipelined: the Parse is skipped, and the Bind after it runs what was there before
    raw.say(execute("none"), parse("", "SELECT 'skipped'"), SYNC, bind("", ""), execute(), SYNC,
            ready=2)  # fmt: skip
    raw.say(execute("none"), message("C", b"S", "s"), SYNC, bind("", "s"), execute(), SYNC, ready=2)
    raw.say(message("Q", "PREPARE s AS SELECT 'third'"), bind("", "s"), execute(), SYNC, ready=2)
    raw.say(message("Q", "DEALLOCATE s"), parse("s", "SELECT 'fourth'"), bind("", "s"), execute(),
            SYNC, ready=2)  # fmt: skip
    raw.say(message("Q", ""), message("Q", "   "), ready=2)
    raw.close()


RUNS = (run_psql, run_psycopg, run_pipeline, run_copy, run_pgbench, run_raw)


@pytest.fixture(scope="module", params=VERSIONS)
def heard(request, tmp_path_factory):
    """Return (what the server logged of the clients, sessions: pid -> (records, raw requests))."""
    with PgServer(request.param) as server:
        server.psql(TYPES, database="shop")
        argv = [str(server.programs / "pgbench"), "-i", "-q", "-h", str(server.folder), "-p",
                str(server.port), "-U", "postgres", "shop"]  # fmt: skip
        subprocess.run(argv, check=True, capture_output=True)
        gate = Gate(tmp_path_factory.mktemp("gate"))
        port = gate.listen(("127.0.0.1", server.port))
        for run in RUNS:
            gate.serve(run, server, port)
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


def asked(found, raw):
    """Yield (operation, what the server would log of it), a query of several statements once."""
    results = {each["op"]: each for each in found if each["record"] == "Result"}
    last = None
    for each in found:
        if each["record"] != "Operation" or each["kind"] in ("prepare", "cancel"):
            continue
        if each["kind"] == "simple":
            if each["offset"] == last:
                continue
            last = each["offset"]
            text = raw[each["offset"] + 5 : each["offset"] + each["length"] - 1].decode()
            name = ""
        else:
            text, name = each["text"], each["name"]
        yield each, results[each["op"]], (text, name, each["kind"] in ("extended", "fetch"))


def test_every_statement_that_the_server_logged_is_an_operation_and_no_other(heard):
    logged, sessions = heard
    assert len(logged) > 300
    for pid, (found, raw) in sessions.items():
        ran = [each for each in logged if each.pid == pid]
        for operation, result, told in asked(found, raw):
            text, name, extended = told
            if ran and operation["truncated"] and ran[0].text.startswith(text):
                text = ran[0].text
            if ran and (ran[0].text, ran[0].name, ran[0].extended) == (text, name, extended):
                ran.pop(0)
            else:
                assert result["status"] in ("error", "skipped"), (told, ran[:1])
        assert ran == []


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


def test_a_cancel_through_the_gate_is_linked_and_works(tmp_path):
    with PgServer(18) as server:
        gate = Gate(tmp_path)
        port = gate.listen(("127.0.0.1", server.port))

        def client():
            with connect(port, max_protocol_version="3.2") as connection:
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
        port = gate.listen(("127.0.0.1", server.port))

        def kill():
            (session,) = gate.worker.sessions
            gate.worker.kill(session, "uid:0(root)", "test")

        gate.loop.call_later(0.7, kill)
        done = gate.serve(psql, server, port, "scram", "SELECT 'a'; SELECT pg_sleep(20);")
        gate.step(lambda: not gate.worker.sessions)
        gate.close()
    assert "FATAL:  this session was ended by an administrator (reference 0" in done.stderr
