"""What real clients do with a PostgreSQL server, and what it should have said of that.

Every run is `run(programs, host, port)`: the folder of PostgreSQL's own programs, and where to
connect to. The server needs the users of `pgserver` and the database "shop" with `TYPES` and
pgbench's tables.
"""

import os
import socket
import subprocess
import tempfile

import psycopg
import pytest
from messages import message, messages, startup
from pgserver import PASSWORD
from psycopg import sql

TYPES = """
    CREATE TABLE kept (n int, big bigint, t text, b bytea, ok bool, f float8, num numeric,
                       w timestamptz, d date, u uuid, j jsonb, list int[])
"""


def psql(programs, host, port, user, script, *words):
    argv = [str(programs / "psql"), "-X", "-q", "-h", host, "-p", str(port), "-U",
            user, "-d", "shop", *words]  # fmt: skip
    environment = {**os.environ, "PGPASSWORD": PASSWORD}
    return subprocess.run(argv, input=script, text=True, capture_output=True, check=False,
                          env=environment)  # fmt: skip


def connect(host, port, **words):
    return psycopg.connect(host=host, port=port, user="scram", password=PASSWORD,
                           dbname="shop", sslmode="disable", autocommit=True, **words)  # fmt: skip


def run_psql(programs, host, port):
    with_file = f"\\lo_import {__file__}\n"
    psql(programs, host, port, "plain", """
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
    psql(
        programs, host, port, "hashed", "SELECT 1 \\gdesc\nSELECT current_user \\gset\n\\echo :x\n"
    )


def run_psycopg(programs, host, port):
    del programs
    rows = [
        (7, 2**40, "it's ä ✓", b"\0\1\xff", True, 1.5, "12.50", None, "2024-02-29",
         "6f1c4d0e-8f5b-4f0e-9a39-0c6a53a0f6a1", '{"a": [1]}', [1, None, 3]),
        (None, -1, "", b"", False, -0.0, "-0.001", "infinity", "0044-03-15 BC", None, "null", []),
    ]  # fmt: skip
    with connect(host, port) as connection:
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


def run_pipeline(programs, host, port):
    del programs
    with connect(host, port) as connection:
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


def run_copy(programs, host, port):
    del programs
    with connect(host, port) as connection, connection.cursor() as cursor:
        with cursor.copy("COPY kept (n, t) FROM STDIN") as copy:
            for number in range(3000):
                copy.write_row((number, "x" * 100))
        with cursor.copy("COPY kept (n, t) TO STDOUT") as copy:
            assert sum(1 for _ in copy.rows()) > 3000
        cursor.execute("SELECT t, repeat('y', 500) FROM kept")
        assert len(cursor.fetchall()) > 3000


def run_pgbench(programs, host, port):
    environment = {**os.environ, "PGPASSWORD": PASSWORD, "PGSSLMODE": "disable"}
    for mode in ("simple", "extended", "prepared"):
        argv = [str(programs / "pgbench"), "-n", "-M", mode, "-t", "15", "-c", "3",
                "-h", host, "-p", str(port), "-U", "scram", "shop"]  # fmt: skip
        subprocess.run(argv, capture_output=True, check=True, env=environment)


class Raw:
    """A client of our own, for what libpq does not do."""

    def __init__(self, host, port):
        self.sock = socket.create_connection((host, port))
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


def run_raw(programs, host, port):
    """Portals that are fetched in parts, and names that are not what they seem."""
    del programs
    raw = Raw(host, port)
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


def run_replication(programs, host, port):
    """A physical backup and a logical stream."""
    where = ["-h", host, "-p", str(port), "-U", "postgres"]
    environment = {**os.environ, "PGSSLMODE": "disable"}

    def program(name, *words, check=True, longest_s=60):
        argv = [str(programs / name), *where, *words]
        return subprocess.run(argv, capture_output=True, check=check, env=environment,
                              timeout=longest_s)  # fmt: skip

    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        program("pg_basebackup", "-D", f"{folder}/backup", "-X", "none", "-c", "fast", "--no-sync")
        slot = ["-d", "shop", "-S", "followed"]
        program("pg_recvlogical", *slot, "--create-slot", "-P", "test_decoding")
        psql(programs, host, port, "open", "INSERT INTO kept (n) SELECT generate_series(1, 50);")
        script = "\\pset format unaligned\n\\t on\nSELECT pg_current_wal_lsn();"
        end = psql(programs, host, port, "open", script)
        program("pg_recvlogical", *slot, "--start", "-f", f"{folder}/followed", "-F", "0",
                "--endpos", end.stdout.strip())  # fmt: skip
        with open(f"{folder}/followed", encoding="utf-8") as file:
            assert file.read().count("INSERT: n") >= 50
        program("pg_recvlogical", *slot, "--drop-slot")


RUNS = (run_psql, run_psycopg, run_pipeline, run_copy, run_pgbench, run_raw, run_replication)


def prepare(server):
    """Make what the runs need."""
    server.psql(TYPES, database="shop")
    argv = [str(server.programs / "pgbench"), "-i", "-q", "-h", str(server.folder), "-p",
            str(server.port), "-U", "postgres", "shop"]  # fmt: skip
    subprocess.run(argv, check=True, capture_output=True)


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


def unlike(ran, found, raw):
    """Yield what the server logged of a session and no operation says, and the other way round.

    An operation that failed or was skipped may be missing in the log.
    """
    ran = list(ran)
    for operation, result, (text, name, extended) in asked(found, raw):
        if ran and operation["truncated"] and ran[0].text.startswith(text):
            text = ran[0].text  # noqa: PLW2901 - a record keeps the beginning of a long text
        if ran and (ran[0].text, ran[0].name, ran[0].extended) == (text, name, extended):
            ran.pop(0)
        elif result["status"] not in ("error", "skipped"):
            yield operation
    yield from ran
