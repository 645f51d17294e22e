"""PostgreSQL over TLS that the gate opens: every sslmode and channel_binding of psql, with two
libpqs, against two servers.
"""

import os
import shutil
import subprocess
import time

import pgserver
import psycopg
import pytest
from driven import half_stream, records
from pgserver import PASSWORD, PgServer

from capture.frames import Kind

NAME = "db.test"
MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
BINDINGS = ("prefer", "disable", "require")
REFUSED, UNBOUND = "SCRAM channel binding does not pass", "channel binding is required"
ASKED = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"


class TlsServer(PgServer):
    """A server with a certificate."""

    def __init__(self, version, certificates):
        self.certificate, self.key = certificates.server(NAME)
        super().__init__(version)
        self.programs = pgserver.binaries_with_tls(version)
        for file, name in ((self.certificate, "server.crt"), (self.key, "server.key")):
            shutil.copyfile(file, self.folder / name)
            os.chmod(self.folder / name, 0o600)
            shutil.chown(self.folder / name, "postgres", "postgres")
        self.settings = {"ssl": "on", "ssl_cert_file": self.folder / "server.crt",
                         "ssl_key_file": self.folder / "server.key"}  # fmt: skip

    def psql(self, sql, *, database="postgres", check=True):
        kept, self.programs = self.programs, pgserver.binaries(15)
        try:
            return super().psql(sql, database=database, check=check)
        finally:
            self.programs = kept


@pytest.fixture(params=(15, 18))
def server(request, certificates):
    with TlsServer(request.param, certificates) as started:
        yield started


def libpq15(port, ca, mode, binding, user, **more):
    """Return "t" or "f", whether the server sees TLS, or the error; psql as Debian has it."""
    environment = {
        "PATH": os.environ["PATH"], "PGPASSWORD": PASSWORD, "PGSSLMODE": mode,
        "PGCHANNELBINDING": binding, "PGSSLROOTCERT": str(ca), "PGHOSTADDR": "127.0.0.1",
        "PGCONNECT_TIMEOUT": "10",
    } | more  # fmt: skip
    argv = [pgserver.binaries(15) / "psql", "-XAtq", "-h", NAME, "-p", str(port), "-U", user, "-d",
            "shop", "-c", ASKED]  # fmt: skip
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    return done.stdout.strip() or done.stderr


def libpq18(port, ca, mode, binding, user, negotiation="postgres"):
    """Return the same; psql with the libpq of PostgreSQL 18, which has direct TLS."""
    library = str(pgserver.binaries_with_tls(18).parent / "lib")
    return libpq15(port, ca, mode, binding, user, LD_LIBRARY_PATH=library,
                   PGSSLNEGOTIATION=negotiation)  # fmt: skip


def all_modes(gate, server, ca, user="scram"):
    """Yield (client, mode, binding, what came of it)."""
    port = gate.listen((server.host, server.port))
    for client in (libpq15, libpq18):
        for mode in MODES:
            for binding in BINDINGS:
                if binding != "prefer" and MODES.index(mode) < 3:
                    continue
                yield mode, binding, gate.serve(client, port, ca, mode, binding, user)


def told(gate):
    """Close the gate; return each session's records, and check that no secret is in it."""
    frames = gate.close()
    for _, _, _, payload in frames:
        assert PASSWORD.encode() not in payload
    numbers = dict.fromkeys(session for _, session, *_ in frames if session)
    return [(records(frames, number), half_stream(frames, number, Kind.UP)) for number in numbers]


def test_with_a_certificate_of_the_gate_what_can_work_works_and_the_rest_is_refused_in_words(
    server, make_gate
):
    gate = make_gate()
    for mode, binding, got in all_modes(gate, server, gate.ca):
        if mode in MODES[:3]:  # "prefer" tries TLS, is refused, and goes on without
            assert got == "f", mode
        elif binding == "disable":
            assert got == "t", mode
        else:
            assert {"prefer": REFUSED, "require": UNBOUND}[binding] in got, mode
    sessions = told(gate)
    refused = [found for found, _ in sessions if any(
        each["record"] == "Fact" and each["kind"] == "error"
        and each["fields"]["sqlstate"] == "28000" for each in found)]  # fmt: skip
    assert len(refused) == 2 * 4
    decoded = [found for found, _ in sessions if any(
        each["record"] == "Operation" and each["text"] == ASKED for each in found)]  # fmt: skip
    assert len(decoded) == 2 * (3 + 3)


def test_with_the_servers_own_certificate_everything_works_and_scram_is_bound(server, make_gate):
    gate = make_gate(tls_certificate=str(server.certificate), tls_key=str(server.key))
    ca = server.certificate.parent / "ca.pem"
    for mode, binding, got in all_modes(gate, server, ca):
        assert got == ("f" if mode in MODES[:2] else "t"), (mode, binding)
    mechanisms = [each["fields"]["mechanism"] for found, _ in told(gate) for each in found
                  if each["record"] == "Fact" and each["kind"] == "authentication"]  # fmt: skip
    assert "SCRAM-SHA-256-PLUS" in mechanisms


def test_a_certificate_that_is_no_longer_the_servers_fails_at_the_binding_and_shows(
    server, certificates, make_gate
):
    certificate, key = certificates.server(NAME)  # good, but the server was given another
    gate = make_gate(tls_certificate=str(certificate), tls_key=str(key))
    port = gate.listen((server.host, server.port))
    for client in (libpq15, libpq18):
        got = gate.serve(client, port, certificates.ca, "verify-full", "prefer", "scram")
        assert "channel binding check failed" in got
    for found, _ in told(gate):
        (up,) = [e for e in found if e["record"] == "Tls" and e["stage"] == "established"]
        assert up["presented"] != up["chain"][0]["sha256"]


def test_with_a_plain_upstream_tls_ends_at_the_gate(server, make_gate):
    gate = make_gate(tls_upstream="plain", tls_verify="off")
    for mode, binding, got in all_modes(gate, server, gate.ca):
        if binding == "require":
            assert UNBOUND in got
        else:
            assert got == "f", (mode, binding)


def test_what_is_passed_through_is_end_to_end(server, make_gate):
    gate = make_gate(tls="passthrough", tls_verify="system")
    for mode, binding, got in all_modes(gate, server, server.certificate.parent / "ca.pem"):
        assert got == ("f" if mode in MODES[:2] else "t"), (mode, binding)
    seen = [[(each["mode"], each["stage"]) for each in found if each["record"] == "Tls"]
            for found, _ in told(gate)]  # fmt: skip
    assert [("passthrough", "hello"), ("passthrough", "answered")] in seen
    assert len([each for each in seen if each]) == 2 * (1 + 3 * 3)


def test_a_server_that_demands_a_client_certificate_says_so_itself(server, certificates, make_gate):
    shutil.copyfile(certificates.ca, server.folder / "ca.crt")
    shutil.chown(server.folder / "ca.crt", "postgres")
    rules = "local all all trust\nhostssl all plain all password clientcert=verify-ca\n"
    (server.folder / "data" / "pg_hba.conf").write_text(rules)
    server.psql(f"ALTER SYSTEM SET ssl_ca_file = '{server.folder / 'ca.crt'}'")
    server.psql("SELECT pg_reload_conf()")
    gate = make_gate()
    port = gate.listen((server.host, server.port))

    def refusal():
        return libpq15(port, gate.ca, "verify-full", "disable", "plain")

    until = time.monotonic() + 20
    while "valid client certificate" not in (got := gate.serve(refusal)):  # it reloads by and by
        assert time.monotonic() < until, got
    found, _ = told(gate)[-1]
    assert [each["certificate_asked"] for each in found if each["record"] == "Tls"] == [False, True]
    errors = [each["fields"]["sqlstate"] for each in found
              if each["record"] == "Fact" and each["kind"] == "error"]  # fmt: skip
    assert errors == ["28000"]


@pytest.mark.parametrize("user", ["open", "plain", "hashed"])
def test_other_ways_to_authenticate_pass_and_leave_no_password(server, make_gate, user):
    gate = make_gate()
    port = gate.listen((server.host, server.port))
    for client in (libpq15, libpq18):
        assert gate.serve(client, port, gate.ca, "verify-full", "prefer", user) == "t"
    for found, up in told(gate):
        assert ASKED.encode() in up
        assert [each["stage"] for each in found if each["record"] == "Tls"] == [
            "hello", "established",
        ]  # fmt: skip


@pytest.mark.parametrize("mode", MODES[3:])
@pytest.mark.parametrize("own", [False, True])
def test_direct_tls_is_opened_and_decoded(certificates, make_gate, mode, own):
    with TlsServer(18, certificates) as server:
        words = {"tls_certificate": str(server.certificate), "tls_key": str(server.key)}
        gate = make_gate(**words if own else {})
        ca = server.certificate.parent / "ca.pem" if own else gate.ca
        port = gate.listen((server.host, server.port))
        for binding in ("disable", "require", "prefer"):
            got = gate.serve(libpq18, port, ca, mode, binding, "scram", "direct")
            if own or binding == "disable":
                assert got == "t", binding
            else:
                assert {"prefer": REFUSED, "require": UNBOUND}[binding] in got
    told_of = told(gate)
    assert len(told_of) == 3
    for found, _ in told_of[: 3 if own else 1]:
        assert any(each["record"] == "Operation" and each["text"] == ASKED for each in found)
    for found, _ in told_of:
        alpn = [each["alpn"] for each in found if each["record"] == "Tls"]
        assert alpn == ["", "postgresql"]


@pytest.mark.parametrize("version", [15, 18])
def test_direct_tls_to_a_server_in_the_clear_ends_at_the_gate(certificates, make_gate, version):
    with TlsServer(version, certificates) as server:
        gate = make_gate(tls_upstream="plain", tls_verify="off")
        port = gate.listen((server.host, server.port))
        got = gate.serve(libpq18, port, gate.ca, "verify-full", "prefer", "scram", "direct")
        assert got == "f"


def test_direct_tls_to_a_server_that_has_none_fails_by_the_upstream(certificates, make_gate):
    with TlsServer(15, certificates) as server:
        gate = make_gate()
        port = gate.listen((server.host, server.port))
        ca = server.certificate.parent / "ca.pem"
        words = (ca, "verify-full", "prefer", "scram", "direct")
        assert "SSL SYSCALL error" in libpq18(server.port, *words)  # it just hangs up
        assert "SSL error" in gate.serve(libpq18, port, *words)  # the gate sends an alert
    ((found, _),) = told(gate)
    assert [each["by"] for each in found if each["record"] == "Tls"] == ["", "upstream"]


def test_a_cancel_request_in_tls_is_decoded(server, make_gate):
    gate = make_gate()
    port = gate.listen((server.host, server.port))

    def client():
        with psycopg.connect(
            host=NAME, hostaddr="127.0.0.1", port=port, user="plain", password=PASSWORD,
            dbname="shop", sslmode="verify-full", sslrootcert=str(gate.ca),
        ) as connection:  # fmt: skip
            import threading

            timer = threading.Timer(0.5, connection.cancel_safe)
            timer.start()
            with pytest.raises(psycopg.errors.QueryCanceled):
                connection.execute("SELECT pg_sleep(20)")
            timer.join()

    gate.serve(client)
    kinds = [each["kind"] for found, _ in told(gate) for each in found
             if each["record"] == "Operation"]  # fmt: skip
    assert "cancel" in kinds
