"""Record the transcripts of this folder again: `python tests/transcripts/record.py [NAME...]`.

Each scenario runs a real client against a real server through a recording relay on loopback; each
of its connections becomes one file. What is recorded differs from run to run (nonces, process
numbers, times), what the tests say of it does not.
"""

import contextlib
import multiprocessing
import os
import re
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "contract")]

import psycopg  # noqa: E402 - the path comes first
from pgserver import PASSWORD, PgServer, binaries, free_port  # noqa: E402 - the path comes first
from psycopg import pq  # noqa: E402 - the path comes first
from transcript import save  # noqa: E402 - the path comes first

from appliance.sansio import CLIENT, UPSTREAM  # noqa: E402 - the path comes first

QUIET_S = 0.3


class Recorder:
    """Relays connections to a server and keeps what each side sent."""

    def __init__(self, target):
        self.target = target
        self.connections = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            pieces = []
            self.connections.append(pieces)
            thread = threading.Thread(target=self._relay, args=(near, pieces), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _relay(self, near, pieces):
        far = socket.create_connection(self.target)
        selector = selectors.DefaultSelector()
        selector.register(near, selectors.EVENT_READ, (CLIENT, far))
        selector.register(far, selectors.EVENT_READ, (UPSTREAM, near))
        while selector.get_map():
            for key, _ in selector.select():
                side, sink = key.data
                try:
                    data = key.fileobj.recv(65536)
                except ConnectionError:
                    data = b""
                pieces.append((side, data or None))
                if data:
                    sink.sendall(data)
                else:
                    selector.unregister(key.fileobj)
                    try:
                        sink.shutdown(socket.SHUT_WR)
                    except OSError:
                        pass  # it is gone already
        near.close()
        far.close()

    def close(self):
        """Wait for the connections to end."""
        self._listener.close()
        for thread in self._threads:
            thread.join(10)


def secrets_of(pieces):
    """Return what must be hidden: found by its form, not by the code under test."""
    up = b"".join(data or b"" for side, data in pieces if side is CLIENT)
    down = b"".join(data or b"" for side, data in pieces if side is UPSTREAM)
    found = [PASSWORD.encode()] if PASSWORD.encode() in up else []
    found += re.findall(rb"p=([A-Za-z0-9+/=]{44})", up)
    found += re.findall(rb"v=([A-Za-z0-9+/=]{44})", down)
    found += re.findall(rb"(md5[0-9a-f]{32})\0", up)
    if up[4:8] == b"\x04\xd2\x16\x2e":
        found.append(up[12:])
    for length, size in ((b"\x0c", b"4"), (b"\x28", b"32")):
        pattern = rb"K\0\0\0" + re.escape(length) + rb".{4}(.{" + size + rb"})Z\0\0\0\x05"
        found += re.findall(pattern, down, re.DOTALL)
    return list(dict.fromkeys(found))


def psql(version, port, user, *words, stdin="", **variables):
    argv = [str(binaries(version) / "psql"), "-X", "-q", "-h", "127.0.0.1", "-p", str(port),
            "-U", user, "-d", "shop", *words]  # fmt: skip
    environment = {**os.environ, "PGPASSWORD": PASSWORD, "PGAPPNAME": "recorded", **variables}
    subprocess.run(argv, input=stdin, text=True, capture_output=True, check=False, env=environment)


def connect(port, user="open", **words):
    return psycopg.connect(host="127.0.0.1", port=port, user=user, password=PASSWORD,
                           dbname="shop", sslmode="disable", **words)  # fmt: skip


# -- scenarios: each is called with (recorder port, server)


def psql_session(port, server):
    psql(server.version, port, "scram", "-f", "-", stdin="""
        CREATE TABLE goods (id int PRIMARY KEY, name text, price numeric);
        INSERT INTO goods VALUES (1, 'tea', 2.50), (2, 'coffee', 4);
        SELECT * FROM goods ORDER BY id;
        SELECT 1 AS one\\; SELECT 'two'\\; SELECT 1/0\\; SELECT 'never';
        SELEC nothing;

        -- only a remark
        ;
        DO $$ BEGIN RAISE NOTICE 'look here'; END $$;
        BEGIN;
        UPDATE goods SET price = price + 1 WHERE id = 2;
        ROLLBACK;
        LISTEN news;
        NOTIFY news, 'something happened';
        PREPARE pick (int) AS SELECT name FROM goods WHERE id = $1;
        EXECUTE pick(1);
        DEALLOCATE pick;
        EXECUTE pick(1);
        SET client_encoding TO 'LATIN1';
        \\copy goods FROM STDIN
3\tmilk\t1.10
4\tbread\t\\N
\\.
        \\copy goods TO STDOUT
        \\copy goods FROM STDIN
5\tbroken\tnot a number
\\.
        SELECT count(*) FROM goods;
    """)  # fmt: skip


def psql_large_object(port, server):
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"large object\n")
        file.flush()
        psql(server.version, port, "open", "-c", f"\\lo_import {file.name}")


def password_plain(port, server):
    psql(server.version, port, "plain", "-c", "SELECT current_user")


def password_md5(port, server):
    psql(server.version, port, "hashed", "-c", "SELECT current_user")


def password_wrong(port, server):
    psql(server.version, port, "scram", "-c", "SELECT 1", PGPASSWORD="not-the-pass-w0rd")


def database_missing(port, server):
    psql(server.version, port, "open", "-d", "nowhere", "-c", "SELECT 1")


def ssl_declined(port, server):
    psql(server.version, port, "open", "-c", "SELECT 1", PGSSLMODE="prefer")


def psycopg_extended(port, _server):
    with connect(port, autocommit=True) as connection:
        connection.execute("CREATE TEMP TABLE kept (n int, t text, b bytea, w timestamptz)")
        connection.execute("INSERT INTO kept VALUES (%s, %s, %s, %s)", (7, "seven", b"\0\1", None))
        connection.execute("SELECT %s::int + 1, %t, %b", (41, "text", 2**40), binary=True)
        try:
            connection.execute("SELECT 1 / %s::int", (0,))
        except psycopg.errors.DivisionByZero:
            pass  # it was asked for
        for number in range(3):
            connection.execute("SELECT t FROM kept WHERE n = %s", (number,), prepare=True)
        with connection.transaction(), connection.cursor("named") as cursor:
            cursor.execute("SELECT generate_series(1, 25)")
            cursor.fetchmany(10)


def psycopg_pipeline(port, _server):
    with connect(port, autocommit=True) as connection:
        try:
            with connection.pipeline() as pipeline:
                connection.execute("SELECT %s", (1,))
                connection.execute("SELECT %s", (2,))
                pipeline.sync()
                connection.execute("SELECT 1 / %s::int", (0,))
                connection.execute("SELECT %s", (3,))
                pipeline.sync()
                connection.execute("SELECT %s", (4,))
        except psycopg.errors.DivisionByZero:
            pass  # it was asked for
        connection.execute("SELECT 'after'")


def psycopg_copy(port, _server):
    with connect(port) as connection, connection.cursor() as cursor:
        cursor.execute("CREATE TEMP TABLE kept (n int, t text)")
        with cursor.copy("COPY kept FROM STDIN") as copy:
            for number in range(200):
                copy.write_row((number, "x" * 20))
        with cursor.copy("COPY kept TO STDOUT (FORMAT binary)") as copy:
            for _ in copy:
                pass
        try:
            with cursor.copy("COPY kept FROM STDIN") as copy:
                copy.write_row((1, "y"))
                _ = 1 / 0
        except ZeroDivisionError:
            pass  # CopyFail was sent


def libpq_copy_extended(port, _server):
    """COPY by the extended protocol: libpq sends a Sync that the server ignores."""
    words = f"host=127.0.0.1 port={port} user=open dbname=shop sslmode=disable"
    connection = pq.PGconn.connect(words.encode())
    connection.exec_(b"CREATE TEMP TABLE kept (n int)")
    connection.exec_params(b"COPY kept FROM STDIN", None)
    connection.put_copy_data(b"1\n2\n")
    connection.put_copy_end()
    connection.get_result()
    connection.exec_params(b"SELECT count(*) FROM kept WHERE n > $1", [b"1"])
    connection.prepare(b"counted", b"SELECT count(*) FROM kept WHERE n > $1", [23])
    connection.describe_prepared(b"counted")
    connection.exec_prepared(b"counted", [b"\0\0\0\1"], [1], 1)
    connection.finish()


def protocol_3_2(port, _server):
    with connect(port, max_protocol_version="3.2") as connection:
        connection.execute("SELECT 'long key'")


def cancel(port, server):
    protocol = {"max_protocol_version": "3.2"} if server.version == 18 else {}
    with connect(port, autocommit=True, **protocol) as connection:
        timer = threading.Timer(0.5, connection.cancel_safe)
        timer.start()
        try:
            connection.execute("SELECT pg_sleep(10)")
        except psycopg.errors.QueryCanceled:
            pass  # it was asked for
        timer.join()
        connection.execute("SELECT 'still here'")


def terminated(port, server):
    with connect(port, autocommit=True) as connection:
        pid = connection.info.backend_pid
        timer = threading.Timer(0.3, server.psql, (f"SELECT pg_terminate_backend({pid})",))
        timer.start()
        try:
            connection.execute("SELECT pg_sleep(10)")
        except psycopg.OperationalError:
            pass  # it was asked for
        timer.join()


def pgbench(mode):
    def run(port, server):
        argv = [str(server.programs / "pgbench"), "-n", "-S", "-M", mode, "-t", "3", "-c", "1",
                "-h", "127.0.0.1", "-p", str(port), "-U", "open", "bench"]  # fmt: skip
        subprocess.run(
            argv, capture_output=True, check=True, env={**os.environ, "PGSSLMODE": "disable"}
        )

    return run


def pg_recvlogical(port, server):
    program = str(server.programs / "pg_recvlogical")
    where = ["-h", "127.0.0.1", "-p", str(port), "-U", "postgres", "-d", "shop", "-S", "recorded"]
    create = [program, *where, "--create-slot", "-P", "test_decoding"]
    subprocess.run(create, check=True, capture_output=True)
    server.psql("CREATE TABLE logged (n int); INSERT INTO logged SELECT generate_series(1, 20);",
                database="shop")  # fmt: skip
    follow = [program, *where, "--start", "-f", "/dev/null", "-s", "1", "-F", "0"]
    process = subprocess.Popen(follow, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(1.5)
    process.send_signal(2)
    process.wait(10)


def tls(port, server):
    psql(server.version, port, "open", "-c", "SELECT 'sealed'", PGSSLMODE="require")


SCENARIOS = {
    "psql": (psql_session, (15, 18)),
    "psql-large-object": (psql_large_object, (15,)),
    "password-plain": (password_plain, (15,)),
    "password-md5": (password_md5, (15,)),
    "password-wrong": (password_wrong, (18,)),
    "database-missing": (database_missing, (15,)),
    "ssl-declined": (ssl_declined, (15,)),
    "psycopg-extended": (psycopg_extended, (15, 18)),
    "psycopg-pipeline": (psycopg_pipeline, (15,)),
    "psycopg-copy": (psycopg_copy, (18,)),
    "libpq-copy-extended": (libpq_copy_extended, (18,)),
    "protocol-3.2": (protocol_3_2, (18,)),
    "cancel": (cancel, (15,)),
    "cancel-3.2": (cancel, (18,)),
    "terminated": (terminated, (15,)),
    "pgbench-simple": (pgbench("simple"), (15,)),
    "pgbench-extended": (pgbench("extended"), (15,)),
    "pgbench-prepared": (pgbench("prepared"), (15,)),
    "pg-recvlogical": (pg_recvlogical, (15, 18)),
    "tls": (tls, (15,)),
}


def redis(port):
    argv = ["redis-cli", "-p", str(port), "INCR", "counter"]
    subprocess.run(argv, capture_output=True, check=True)


def ssh(port):
    argv = ["ssh-keyscan", "-t", "ed25519", "-p", str(port), "127.0.0.1"]
    subprocess.run(argv, capture_output=True, check=True)


def tls_direct(port):
    """libpq with TLS from the first byte; the peer never answers as a database."""
    words = f"host=127.0.0.1 port={port} sslmode=require sslnegotiation=direct connect_timeout=2"
    with contextlib.suppress(psycopg.OperationalError):
        psycopg.connect(words)


def tls_server(folder, port):
    certificate(folder)
    return ["openssl", "s_server", "-quiet", "-accept", f"127.0.0.1:{port}", "-alpn", "postgresql",
            "-key", folder / "key", "-cert", folder / "cert"]  # fmt: skip


def tls_client(*words):
    """Return a client that sends a line to OpenSSL's echo, and stays until it is ended."""

    def client(port):
        argv = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-quiet", "-servername",
                "up.test", "-alpn", "h2,http/1.1", *words]  # fmt: skip
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(argv, input=b"said\n", capture_output=True, check=False, timeout=3)

    return client


def tls_echo(*words):
    """Return a server that sends lines back in reverse."""

    def server(folder, port):
        certificate(folder)
        return ["openssl", "s_server", "-rev", "-accept", f"127.0.0.1:{port}", "-alpn", "http/1.1",
                "-key", folder / "key", "-cert", folder / "cert", *words]  # fmt: skip

    return server


def redis_server(folder, port):
    return [
        "redis-server",
        "--bind",
        "127.0.0.1",
        "--port",
        str(port),
        "--save",
        "",
        "--dir",
        folder,
    ]


def ssh_server(folder, port):
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    return ["/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", "-h", key, "-p", str(port), "-o",
            "ListenAddress=127.0.0.1"]  # fmt: skip


#: servers that are no database: (protocol, client, server)
OTHERS = {
    "redis": ("opaque", redis, redis_server),
    "ssh": ("opaque", ssh, ssh_server),
    "direct": ("tls", tls_direct, tls_server),
    "1.2": ("tls", tls_client("-tls1_2"), tls_echo()),
    "1.2-asks": ("tls", tls_client("-tls1_2"), tls_echo("-verify", "1")),
    "1.3-retry": ("tls", tls_client(), tls_echo("-groups", "P-384")),
    "refused": ("tls", tls_client("-tls1_2"), tls_echo("-tls1_3")),
}


def certificate(folder):
    """Make a key and a certificate that a server may use."""
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
            "-nodes", "-subj", "/CN=localhost", "-days", "9", "-keyout", folder / "key", "-out",
            folder / "cert"]  # fmt: skip
    subprocess.run(argv, check=True, capture_output=True)
    for name in ("key", "cert"):
        os.chmod(folder / name, 0o600)


def watch(name, folder, target, client, *arguments, remark):
    """Run a client through a recorder and write what was said."""
    recorder = Recorder(target)
    # a process of its own: libpq's blocking calls keep the interpreter's lock
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=client, args=(recorder.port, *arguments))
    process.start()
    process.join(30)
    if process.is_alive():
        process.kill()
        raise RuntimeError(f"{name} hangs")
    time.sleep(QUIET_S)
    recorder.close()
    for number, pieces in enumerate(recorder.connections):
        suffix = f"-{number + 1}" if len(recorder.connections) > 1 else ""
        path = HERE / folder / f"{name}{suffix}.txt"
        save(path, pieces, secrets_of(pieces), [remark])
        print(path.name, sum(len(data or b"") for _, data in pieces))


def record(name, server):
    target, client = ("127.0.0.1", server.port), SCENARIOS[name][0]
    remark = f"{name} against PostgreSQL {server.version}"
    watch(f"{name}-pg{server.version}", "postgresql", target, client, server, remark=remark)


def record_other(name):
    protocol, client, server = OTHERS[name]
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(server(Path(folder), port), stderr=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL)  # fmt: skip
        time.sleep(1)
        watch(name, protocol, ("127.0.0.1", port), client, remark=name)
        process.terminate()
        process.wait(10)


def main(names):
    for name in OTHERS:
        if not names or name in names:
            record_other(name)
    for version in (15, 18):
        wanted = [name for name, (_, versions) in SCENARIOS.items()
                  if version in versions and (not names or name in names)]  # fmt: skip
        sealed = "tls" in wanted
        if len(wanted) > sealed:
            with PgServer(version) as server:
                server.psql("CREATE DATABASE bench")
                argv = [str(server.programs / "pgbench"), "-i", "-q", "-h", str(server.folder),
                        "-p", str(server.port), "-U", "postgres", "bench"]  # fmt: skip
                subprocess.run(argv, check=True, capture_output=True)
                for name in wanted:
                    if name != "tls":
                        record(name, server)
        if sealed:
            server = PgServer(version)
            certificate(server.folder)
            for name in ("key", "cert"):
                shutil.chown(server.folder / name, "postgres")
            server.settings |= {"ssl": "on", "ssl_cert_file": server.folder / "cert",
                                "ssl_key_file": server.folder / "key"}  # fmt: skip
            with server:
                record("tls", server)


if __name__ == "__main__":
    main(sys.argv[1:])
