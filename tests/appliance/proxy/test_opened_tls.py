"""TLS that the gate opens: real clients and servers on loopback, a real session driver and evidence
between them.
"""

import contextlib
import dataclasses
import hashlib
import socket
import ssl
import struct
import subprocess
import threading
import time

import pytest
from driven import half_stream, records
from tls_ends import NAME, End, client_context, server_context, serving

from appliance import config
from appliance.proxy.tls import Terminator
from capture.errors import KeyFileError
from capture.frames import Kind

VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
each_version = pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
LONG = hashlib.shake_128(b"long").digest(5 << 20)


def sessions(gate):
    """Close the gate; return [(records by name, bytes up, bytes down)]."""
    frames = gate.close()
    found = []
    for number in dict.fromkeys(session for _, session, *_ in frames if session):
        named = {}
        for each in records(frames, number):
            named.setdefault(each["record"], []).append(each)
        up, down = (half_stream(frames, number, kind) for kind in (Kind.UP, Kind.DOWN))
        found.append((named, up, down))
    return found


def echo(end):
    end.send(end.read_all())
    end.say_end()


@each_version
def test_both_ends_get_every_byte_and_the_evidence_has_the_plaintext(
    connect, certificates, make_gate, version
):
    gate = make_gate()
    address, _ = serving(certificates.server(), echo)
    port = gate.listen(address)

    def client():
        end = End(connect(port), client_context(gate.ca, version=version))
        end.send(LONG)
        end.say_end()
        return end.read_all(), end.tls.version()

    got, spoken = gate.serve(client)
    assert got == LONG
    ((named, up, down),) = sessions(gate)
    assert up == down == LONG
    hello, established = named["Tls"]
    assert (hello["stage"], established["stage"]) == ("hello", "established")
    assert established["client_version"] == spoken == version.name.replace("_", ".")
    assert established["sni"] == NAME
    assert established["upstream_version"] == "TLSv1.3"
    assert established["verified"] == "pinned"
    assert established["chain"][0]["names"] == [NAME]
    assert named["SessionClose"][0]["reason"] == "fin"


@each_version
def test_slow_readers_on_both_sides_lose_nothing(connect, certificates, make_gate, version):
    gate = make_gate()
    heard = []

    def serve(end):
        end.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        end.send(LONG)
        time.sleep(0.3)
        heard.append(end.read_all())
        end.say_end()

    address, thread = serving(certificates.server(), serve, version=version)
    port = gate.listen(address)

    def client():
        sock = connect(port, receive_bytes=65536)
        end = End(sock, client_context(gate.ca))
        time.sleep(0.5)
        first = end.recv(1)
        while len(first) < len(LONG):
            first += end.recv(5000 if len(first) < 100_000 else 1 << 18)
        end.send(LONG)
        end.say_end()
        thread.join(20)
        return first

    assert gate.serve(client) == LONG
    assert heard == [LONG]
    ((_, up, down),) = sessions(gate)
    assert up == down == LONG


@each_version
def test_a_reader_that_pauses_gets_the_rest_when_the_server_waits_too(
    connect, certificates, make_gate, version
):
    """The server has filled what every buffer takes by then: nothing new will come of it."""
    gate = make_gate()

    def serve(end):
        end.recv(6)
        for _ in range(5):
            end.send(LONG)

    address, _ = serving(certificates.server(), serve, version=version)
    port = gate.listen(address)

    def client():
        end = End(connect(port, receive_bytes=65536), client_context(gate.ca))
        end.send(b"\0begin")
        length = len(end.recv(1))
        time.sleep(1)
        (session,) = gate.worker.sessions.values()
        session.down.pending = False  # as when no receive ended at the end of a chunk
        while length < 5 * len(LONG):
            length += len(end.recv(1 << 18))
        return length

    assert gate.serve(client) == 5 * len(LONG)


@each_version
def test_small_messages_that_come_with_the_end_of_the_handshake_pass(
    connect, certificates, make_gate, version
):
    gate = make_gate()

    def serve(end):
        while data := end.recv():
            end.send(data)
        end.say_end()

    address, _ = serving(certificates.server(), serve, connections=20, version=version)
    port = gate.listen(address)

    def client():
        for _ in range(20):
            end = End(connect(port), client_context(gate.ca))
            for size in (1, 17, 16384, 3):
                end.send(b"x" * size)
                left = size
                while left:
                    left -= len(end.recv(left))
            end.say_end()
            assert end.recv() == b""
            end.close()

    gate.serve(client)
    assert [len(up) for _, up, _ in sessions(gate)] == [16405] * 20


@each_version
def test_an_end_without_close_notify_is_passed_on_as_one(connect, certificates, make_gate, version):
    gate = make_gate()

    def serve(end):
        end.send(b"half of")
        end.sock.shutdown(socket.SHUT_WR)

    address, _ = serving(certificates.server(), serve, version=version)
    port = gate.listen(address)

    def client():
        end = End(connect(port), client_context(gate.ca))
        assert end.recv() == b"half of"
        with pytest.raises(ssl.SSLError, match="UNEXPECTED_EOF"):
            end.recv()

    gate.serve(client)


def test_the_client_gets_the_protocol_that_the_server_chose(connect, certificates, make_gate):
    gate = make_gate()
    address, _ = serving(certificates.server(), echo, connections=2, alpn=["http/1.1", "h2"])
    port = gate.listen(address)

    def client(*alpn):
        end = End(connect(port), client_context(gate.ca, alpn=alpn))
        end.say_end()
        end.recv()
        return end.tls.selected_alpn_protocol()

    assert gate.serve(client, "h2", "http/1.1") == "http/1.1"
    assert gate.serve(client) is None
    chosen = [named["Tls"][1]["alpn"] for named, *_ in sessions(gate)]
    assert chosen == ["http/1.1", ""]


def test_a_client_without_a_server_name_sees_the_names_of_the_servers_certificate(
    connect, certificates, make_gate
):
    gate = make_gate()
    files = certificates.server("db.test", ("db.test", "127.0.0.1"))
    address, _ = serving(files, echo)
    port = gate.listen(address)

    def client():
        end = End(connect(port), client_context(gate.ca), name="127.0.0.1")
        end.say_end()
        end.recv()

    gate.serve(client)
    ((named, *_),) = sessions(gate)
    assert [each["sni"] for each in named["Tls"]] == ["", ""]


def test_the_servers_own_certificate_is_shown_where_the_gate_has_it(
    connect, certificates, make_gate
):
    certificate, key = certificates.server()
    gate = make_gate(tls_certificate=str(certificate), tls_key=str(key))
    address, _ = serving((certificate, key), echo)
    port = gate.listen(address)

    def client():
        end = End(connect(port), client_context(certificates.ca))
        end.say_end()
        end.recv()
        return hashlib.sha256(end.tls.getpeercert(binary_form=True)).hexdigest()

    shown = gate.serve(client)
    ((named, *_),) = sessions(gate)
    established = named["Tls"][1]
    assert shown == established["presented"] == established["chain"][0]["sha256"]


def test_a_key_that_others_may_read_is_refused(certificates, tmp_path):
    certificate, key = certificates.server()
    key.chmod(0o640)
    route = config.Route("all", tls="intercept", tls_certificate=str(certificate), tls_key=str(key))
    given = config.Config(config.Paths(tmp_path / "state"), route=(route,))
    with pytest.raises(KeyFileError, match="may be read by others"):
        Terminator(given)


# -- what fails


def failed(gate, fails, *, alert=""):
    """Run a client that must not get through; return the failed Tls record and the close."""
    with pytest.raises((ssl.SSLError, OSError), match=alert or None):
        gate.serve(fails)
    ((named, up, down),) = sessions(gate)
    assert up == down == b""
    told = named["Tls"][-1]
    assert told["stage"] == "failed"
    return told, named["SessionClose"][0]


@pytest.mark.parametrize(
    ("name", "days", "why"),
    [(NAME, -1, "certificate has expired"), ("other.test", 5, "Hostname mismatch")],
)
def test_a_server_that_is_not_who_it_should_be_is_refused_and_its_chain_kept(
    connect, certificates, make_gate, name, days, why
):
    gate = make_gate()
    address, _ = serving(certificates.server(name, days=days), echo)
    port = gate.listen(address)
    told, close = failed(
        gate, lambda: End(connect(port), client_context(gate.ca)), alert="BAD_CERTIFICATE"
    )
    assert why in told["why"]
    assert told["by"] == close["by"] == "gate"
    assert told["verified"] == "no"
    assert told["chain"][0]["names"] == [name]
    assert close["reason"] == "tls"
    assert close["reference"]


def test_a_server_of_an_authority_that_the_machine_does_not_know_is_refused(
    connect, certificates, make_gate
):
    gate = make_gate(tls_verify="system")
    address, _ = serving(certificates.server(), echo)
    port = gate.listen(address)
    told, _ = failed(gate, lambda: End(connect(port), client_context(gate.ca)))
    assert "not accepted" in told["why"]


def test_a_client_that_refuses_our_certificate_is_recorded_as_such(
    connect, certificates, make_gate
):
    gate = make_gate()
    address, _ = serving(certificates.server(), echo)
    port = gate.listen(address)
    told, close = failed(gate, lambda: End(connect(port), client_context(certificates.ca)))
    assert told["by"] == close["by"] == "client"


def test_the_alert_of_a_real_client_is_the_reason(certificates, make_gate):
    gate = make_gate()
    address, _ = serving(certificates.server(), echo)
    port = gate.listen(address)
    where = ["--resolve", f"{NAME}:{port}:127.0.0.1", f"https://{NAME}:{port}/"]
    done = gate.serve(
        lambda: subprocess.run(["curl", "-sS", *where], check=False, capture_output=True)
    )
    assert done.returncode == 60
    ((named, *_),) = sessions(gate)
    assert named["Tls"][-1]["why"] == "tlsv1 alert unknown ca"
    assert named["Tls"][-1]["by"] == "client"


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_a_server_that_demands_a_client_certificate_is_refused_and_it_says_why(
    connect, certificates, make_gate, version
):
    gate = make_gate()
    certificate, key = certificates.server()
    with socket.create_server(("127.0.0.1", 0)) as held:
        upstream = held.getsockname()
    argv = ["openssl", "s_server", "-accept", f"127.0.0.1:{upstream[1]}", "-cert", certificate,
            "-key", key, "-Verify", "1", "-verify_return_error", "-quiet", version]  # fmt: skip
    server = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        until = time.monotonic() + 10
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                socket.create_connection(upstream).close()
                break
        port = gate.listen(upstream)

        def client():
            end = End(connect(port), client_context(gate.ca))
            end.send(b"GET / HTTP/1.0\r\n\r\n")
            end.recv()

        with pytest.raises((ssl.SSLError, OSError)):
            gate.serve(client)
    finally:
        server.kill()
        server.wait()
    ((named, *_),) = sessions(gate)
    told = named["Tls"][-1]
    assert (told["stage"], told["by"]) == ("failed", "upstream")
    assert any(each["certificate_asked"] for each in named["Tls"])
    assert "certificate" in told["why"]


# -- what is no handshake


def plain_server(heard):
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(20)

    def serve():
        sock, _ = listener.accept()
        with sock, listener:
            sock.settimeout(20)
            with contextlib.suppress(OSError):
                while data := sock.recv(65536):
                    heard.append(data)

    return listener.getsockname(), serve


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00",
        b"\x16\x03\x01\xff\xff" + bytes(40),
        b"\x16\x03\x01\x00\x04\x02\x00\x00\x00",
        b"\x16\x03\x01\x00\x02\x01\x00\x15\x03\x01\x00\x02\x02\x28",
        b"\x16\x03\x01\x40\x00\x01\x00\x7f\xf0" + bytes(20_000),
        b"\x80\x2f\x01\x03\x03\x00\x06\x00\x00\x00\x20" + bytes(38),  # the form of SSL 2
        b"\x16\x09\x01\x00\x06\x01\x00\x00\x02\x03\x03",
    ],
)
def test_what_looks_like_tls_and_is_none_is_not_relayed(connect, make_gate, garbage):
    gate = make_gate()
    heard = []
    address, serve = plain_server(heard)
    port = gate.listen(address)

    def client():
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        sock = connect(port)
        sock.sendall(garbage)
        got = sock.recv(100)
        thread.join(20)
        return got

    assert gate.serve(client) == b"\x15\x03\x03\x00\x02\x02\x32"
    assert heard == []
    ((named, up, _),) = sessions(gate)
    assert up == b""
    assert named["Tls"][-1]["why"].startswith("no ClientHello")


def test_a_protocol_that_only_begins_like_tls_is_detected_as_usual(make_gate):
    gate = make_gate()
    conversation = gate.connect()
    conversation.client.sendall(b"\x16")
    gate.step(lambda: conversation.session.handshake is not None)
    conversation.client.sendall(b"something else")
    gate.step(lambda: conversation.session.protocol)
    assert conversation.session.protocol == "opaque"
    gate.step(lambda: conversation.session.up.received == 15)
    assert conversation.heard(conversation.server) is not None
    conversation.hang_up()
    ((_, up, _),) = sessions(gate)
    assert up == b"\x16something else"


def test_a_client_hello_that_never_ends_is_refused(make_gate):
    gate = make_gate()
    gate.worker.config = dataclasses.replace(
        gate.config, gate=config.Gate(connect_timeout_s=0.2, detect_ms=10)
    )
    conversation = gate.connect()
    conversation.client.sendall(b"\x16\x03\x01\x02")
    gate.step(lambda: conversation.session.closed)
    conversation.hang_up()
    ((named, up, _),) = sessions(gate)
    assert up == b""
    assert named["Tls"][-1]["why"] == "the handshake took too long"


def test_a_client_hello_in_single_bytes_is_understood(connect, certificates, make_gate):
    gate = make_gate()
    address, _ = serving(certificates.server(), echo)
    port = gate.listen(address)

    def client():
        context = client_context(gate.ca)
        sock = connect(port)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        class Dripping:
            def settimeout(self, seconds):
                sock.settimeout(seconds)

            def recv(self, size):
                return sock.recv(size)

            def sendall(self, data):
                for at in range(len(data)):
                    sock.send(data[at : at + 1])

        end = End(Dripping(), context)
        end.send(b"hello")
        end.say_end()
        return end.read_all()

    assert gate.serve(client) == b"hello"


@each_version
def test_what_passes_through_is_relayed_as_it_is_and_its_handshake_recorded(
    connect, certificates, make_gate, version
):
    gate = make_gate(tls="passthrough", tls_verify="system")
    address, _ = serving(certificates.server(), echo, alpn=["http/1.1"], version=version)
    port = gate.listen(address)

    def client():
        end = End(connect(port), client_context(certificates.ca, alpn=["http/1.1"]))
        end.send(LONG)
        end.say_end()
        return end.read_all()

    assert gate.serve(client) == LONG
    ((named, up, down),) = sessions(gate)
    hello, answered = named["Tls"]
    assert (hello["stage"], hello["mode"], hello["sni"]) == ("hello", "passthrough", NAME)
    assert (answered["stage"], answered["mode"], answered["sni"]) == (
        "answered",
        "passthrough",
        NAME,
    )
    assert hello["alpn_offered"] == ["http/1.1"]
    assert answered["upstream_version"] == version.name.replace("_", ".")
    assert [each["names"] for each in answered["chain"]] == (
        [[NAME]] if version is ssl.TLSVersion.TLSv1_2 else []
    )
    detected = named["Detected"][0]
    assert (detected["protocol"], detected["secrets"]) == ("tls", "unparsed")
    assert named["SessionClose"][0]["bytes_up"] == len(up) > len(LONG)
    assert up[:2] == down[:2] == b"\x16\x03"
    assert LONG[:40] not in up + down


def test_tls_inside_tls_passes_and_its_hello_is_recorded(connect, certificates, make_gate):
    gate = make_gate()
    files = certificates.server()
    context = ssl.create_default_context(cafile=str(certificates.ca))

    def serve(end):
        inner = End(Through(end), server_context(files), server=True)
        inner.send(inner.recv())

    address, _ = serving(files, serve)
    port = gate.listen(address)

    def client():
        inner = End(Through(End(connect(port), client_context(gate.ca))), context)
        inner.send(b"hello")
        return inner.recv()

    assert gate.serve(client) == b"hello"
    ((named, *_),) = sessions(gate)
    assert [(each["mode"], each["stage"]) for each in named["Tls"]] == [
        ("intercept", "hello"), ("intercept", "established"),
        ("passthrough", "hello"), ("passthrough", "answered"),
    ]  # fmt: skip


class Through:
    """A TLS end as the socket of another one."""

    def __init__(self, end):
        self.settimeout = end.sock.settimeout
        self.recv, self.sendall = end.recv, end.send


def odd_versions(hello):
    """Return a ClientHello in a record of a version that is none, which servers ignore."""
    return b"\x16\x03\x7f" + hello[3:]


def test_a_hello_in_a_record_of_an_odd_version_does_not_pass_unopened(
    connect, certificates, make_gate
):
    gate = make_gate()
    address, _ = serving(certificates.server(), echo)
    port = gate.listen(address)

    def client():
        sock = connect(port)

        class Odd:
            settimeout, recv = sock.settimeout, sock.recv
            sent = False

            def sendall(self, data):
                sock.sendall(data if self.sent else odd_versions(data))
                self.sent = True

        end = End(Odd(), client_context(gate.ca))
        end.send(b"hello")
        end.say_end()
        return end.read_all()

    assert gate.serve(client) == b"hello"
    ((_, up, _),) = sessions(gate)
    assert up == b"hello"


# -- ends


@each_version
def test_a_session_that_is_ended_from_outside_ends_in_order(
    connect, certificates, make_gate, version
):
    gate = make_gate()
    address, _ = serving(certificates.server(), echo, version=version)
    port = gate.listen(address)

    def client():
        end = End(connect(port), client_context(gate.ca))
        end.send(b"hello")
        return end.recv()

    def kill():
        (session,) = gate.worker.sessions.values()
        session.refuse("ended", "killed")

    def when_running():
        if any(each.up.received for each in gate.worker.sessions.values()):
            kill()
        else:
            gate.loop.call_later(0.01, when_running)

    gate.loop.call_later(0.01, when_running)
    assert gate.serve(client) == b""
    ((named, up, _),) = sessions(gate)
    assert up == b"hello"
    assert named["SessionClose"][0]["reason"] == "killed"


def test_a_record_that_was_tampered_with_ends_the_session_and_is_recorded(
    connect, certificates, make_gate
):
    gate = make_gate()
    address, _ = serving(certificates.server(), echo)
    port = gate.listen(address)

    def client():
        end = End(connect(port), client_context(gate.ca))
        end.send(b"\0good")
        end.sock.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
        with contextlib.suppress(OSError):
            while end.sock.recv(1000):
                pass

    gate.serve(client)
    ((named, up, _),) = sessions(gate)
    assert up == b"\0good"
    assert (named["Tls"][-1]["stage"], named["Tls"][-1]["by"]) == ("failed", "client")
    assert named["Tls"][-1]["why"]


def test_a_client_that_resets_in_the_handshake_leaves_a_record(connect, certificates, make_gate):
    gate = make_gate()
    address, _ = serving(certificates.server(), echo)
    port = gate.listen(address)

    def client():
        sock = connect(port)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = client_context(gate.ca).wrap_bio(incoming, outgoing, server_hostname=NAME)
        with contextlib.suppress(ssl.SSLWantReadError):
            tls.do_handshake()
        sock.sendall(outgoing.read())
        sock.recv(1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()

    gate.serve(client)
    gate.step(lambda: not gate.worker.sessions)
    ((named, *_),) = sessions(gate)
    assert named["Tls"][-1]["stage"] == "failed"
    assert named["Tls"][-1]["by"] == "client"
