"""TLS that the gate opens, against peers that mean harm or are merely odd."""

import base64
import contextlib
import datetime as dt
import os
import socket
import ssl
import struct
import subprocess
import threading
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from driven import half_stream, records
from tls_ends import NAME, End, client_context, name_of, serving

from appliance.proxy.tls.terminator import Terminator
from capture.frames import Kind

DAY_NS = 86_400 * 10**9
SECRET = "f1nd-me-nowhere"


def echo(end):
    end.send(end.read_all())
    end.say_end()


def told(gate):
    """Close the gate; return (every payload, [(records, bytes up, bytes down)])."""
    frames = gate.close()
    numbers = dict.fromkeys(session for _, session, *_ in frames if session)
    found = [(records(frames, number), half_stream(frames, number, Kind.UP),
              half_stream(frames, number, Kind.DOWN)) for number in numbers]  # fmt: skip
    return [payload for *_, payload in frames], found


def stages(found):
    return [each["stage"] for each in found if each["record"] == "Tls"]


def answered(connect, port, context, name=NAME, words=b"hello"):
    """Return what an echoing server answers to a client behind the gate."""
    end = End(connect(port), context, name=name)
    end.send(words)
    end.say_end()
    return end.read_all()


def odd_certificate(folder, *extensions, subject=NAME):
    """Return the files of a certificate with extensions that are seldom or never seen."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder().subject_name(name_of(subject)).issuer_name(name_of(subject))
        .public_key(key.public_key()).serial_number(7)
        .not_valid_before(now - dt.timedelta(1)).not_valid_after(now + dt.timedelta(1))
    )  # fmt: skip
    for number, content in extensions:
        oid = x509.ObjectIdentifier(number)
        builder = builder.add_extension(x509.UnrecognizedExtension(oid, content), critical=False)
    signed = builder.sign(key, hashes.SHA256())
    certificate, key_file = folder / "odd.pem", folder / "odd.key"
    certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption()))  # fmt: skip
    return certificate, key_file


ALTERNATIVES = "2.5.29.17"


@pytest.mark.parametrize(
    "extensions",
    [
        [(ALTERNATIVES, b"\x30\x04\xa3\x02\x30\x00")],  # an X.400 address
        [(ALTERNATIVES, b"\x30\x03\x82\x01\xff")],  # a host name that is no text
        [(ALTERNATIVES, b"\x30\x02\x82\x00")],  # an empty one
        [(ALTERNATIVES, b"\x30\x05\x87\x03\x01\x02\x03")],  # an address of three bytes
        [("1.3.6.1.4.1.55555.1", os.urandom(60_000))],  # a huge one
    ],
    ids=["x400", "binary", "empty", "address", "huge"],
)
@pytest.mark.parametrize("named", [True, False])
def test_odd_certificates_are_described_and_passed_over(
    connect, make_gate, tmp_path, extensions, named
):
    gate = make_gate(tls_verify="off")
    address, _ = serving(odd_certificate(tmp_path, *extensions), echo)
    port = gate.listen(address)
    context = client_context(gate.ca)
    context.check_hostname = False
    got = gate.serve(answered, connect, port, context, NAME if named else None)
    assert got == b"hello"
    _, ((found, up, down),) = told(gate)
    assert up == down == b"hello"
    assert stages(found) == ["hello", "established"]
    (chain,) = [each["chain"] for each in found if each["record"] == "Tls" and each["chain"]]
    assert len(chain[0]["sha256"]) == 64


@pytest.mark.parametrize(
    "name", ["a_b.test", "xn--bcher-kva.test", "127.0.0.1", "a" * 63 + ".test", "1.test", "UP.Test"]
)
def test_odd_server_names_get_a_certificate_that_fits(connect, certificates, make_gate, name):
    gate = make_gate()
    files = certificates.server(NAME, (name,))
    address, _ = serving(files, echo)
    port = gate.listen(address)
    assert gate.serve(answered, connect, port, client_context(gate.ca), name) == b"hello"


def test_a_long_name_gets_a_certificate_that_fits(connect, certificates, make_gate):
    gate = make_gate(tls_verify="off")
    address, _ = serving(certificates.server(), echo)
    port = gate.listen(address)
    name = ".".join(["a" * 49] * 5)
    assert gate.serve(answered, connect, port, client_context(gate.ca), name) == b"hello"


def test_protocol_names_reach_the_server_as_they_are(connect, certificates, make_gate):
    gate = make_gate()
    seen = []

    def serve():
        listener = socket.create_server(("127.0.0.1", 0))
        address.append(listener.getsockname())
        ready.set()
        with listener:
            sock, _ = listener.accept()
            with sock:
                seen.append(sock.recv(20_000))

    address, ready = [], threading.Event()
    threading.Thread(target=serve, daemon=True).start()
    ready.wait(10)
    port = gate.listen(address[0])
    context = client_context(gate.ca, alpn=["plain!", "other"])
    hello = bytearray(first_flight(context))
    hello = hello.replace(b"plain!", b"pl\xffin!")

    def client():
        sock = connect(port)
        sock.sendall(hello)
        try:
            sock.recv(100)
        except OSError:
            pass

    gate.serve(client)
    assert b"other" in seen[0]
    assert b"in!" not in seen[0]  # Python cannot offer it; it is left out, not changed


def first_flight(context, name=NAME):
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("size", [1, 7, 100])
def test_a_hello_that_is_cut_into_many_records_is_understood(
    connect, certificates, make_gate, size
):
    gate = make_gate()
    address, _ = serving(certificates.server(), echo)
    port = gate.listen(address)

    class Cut(End):
        """Cuts its first flight into records of `size` bytes."""

        cut = False

        def _flush(self):
            data = self._out.read() if self._out.pending else b""
            if data and not self.cut:
                self.cut = True
                body = data[5:]
                data = b"".join(
                    b"\x16\x03\x01" + struct.pack(">H", len(body[at : at + size]))
                    + body[at : at + size] for at in range(0, len(body), size)
                )  # fmt: skip
            self.sock.sendall(data)

    def client():
        end = Cut(connect(port), client_context(gate.ca))
        end.send(b"hello")
        end.say_end()
        return end.read_all()

    assert gate.serve(client) == b"hello"
    _, ((found, up, _),) = told(gate)
    assert up == b"hello"
    assert found[0] is not None


def test_a_client_that_begins_tls_late_is_opened(connect, certificates, make_gate):
    gate = make_gate()
    address, _ = serving(certificates.server(), echo)
    port = gate.listen(address)

    def client():
        sock = connect(port)
        time.sleep(3 * gate.config.gate.detect_ms / 1000)
        end = End(sock, client_context(gate.ca))
        end.send(b"late")
        end.say_end()
        return end.read_all()

    assert gate.serve(client) == b"late"
    _, ((found, up, _),) = told(gate)
    assert stages(found) == ["hello", "established"]
    assert up == b"late"


@pytest.mark.parametrize("pause_s", [0.002])
def test_a_handshake_in_single_bytes_from_both_sides_comes_about(
    connect, certificates, make_gate, pause_s
):
    gate = make_gate()

    class Slow(End):
        def _flush(self):
            while self._out.pending:
                self.sock.sendall(self._out.read(9))
                time.sleep(pause_s)

    def serve():
        sock, _ = listener.accept()
        with sock, listener:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificates.server())
            echo(Slow(sock, context, server=True))

    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, daemon=True).start()
    port = gate.listen(listener.getsockname())

    def client():
        end = Slow(connect(port), client_context(gate.ca))
        end.send(b"slow")
        end.say_end()
        return end.read_all()

    assert gate.serve(client) == b"slow"


def test_a_client_that_asks_to_renegotiate_gets_nothing_more_than_a_session(
    certificates, make_gate
):
    gate = make_gate()
    address, thread = serving(certificates.server(), echo)
    port = gate.listen(address)

    def client():
        argv = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-servername", NAME,
                "-tls1_2", "-CAfile", gate.ca, "-verify_return_error"]  # fmt: skip
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True) as program:  # fmt: skip
            program.stdin.write("before\n")
            program.stdin.flush()
            while not any(s.up.received for s in list(gate.worker.sessions.values())):
                time.sleep(0.01)
            program.stdin.write("R\n")  # its word for it, at the beginning of what it reads
            program.stdin.flush()
            lines = iter(program.stdout.readline, "")
            return any("no renegotiation" in line for line in lines) and not program.stdin.close()

    assert gate.serve(client)
    _, ((found, up, _),) = told(gate)
    assert up == b"before\n"
    assert stages(found)[:2] == ["hello", "established"]
    thread.join(20)


def test_credentials_inside_tls_are_hidden_as_in_the_clear(connect, certificates, make_gate):
    gate = make_gate()
    answer = (
        b"HTTP/1.1 200 OK\r\nSet-Cookie: id=" + SECRET.encode() + b"\r\nContent-Length: 0\r\n\r\n"
    )
    heard = []

    def serve(end):
        heard.append(end.recv())
        end.send(answer)
        end.say_end()

    address, thread = serving(certificates.server(), serve, alpn=["http/1.1"])
    port = gate.listen(address)
    basic = base64.b64encode(f"robot:{SECRET}".encode())

    def client():
        where = ["--resolve", f"{NAME}:{port}:127.0.0.1", f"https://{NAME}:{port}/"]
        argv = ["curl", "-sS", "-i", "--cacert", gate.ca, "-u", f"robot:{SECRET}", "-b",
                f"id={SECRET}", *where]  # fmt: skip
        return subprocess.check_output(argv)

    assert SECRET.encode() in gate.serve(client)
    thread.join(20)
    assert basic in heard[0]
    assert SECRET.encode() in heard[0]
    payloads, ((found, up, down),) = told(gate)
    for payload in payloads:
        assert SECRET.encode() not in payload
        assert basic not in payload
    assert len(up) == len(heard[0])
    assert len(down) == len(answer)
    assert [each["verb"] for each in found if each["record"] == "Operation"] == ["GET"]


def test_a_certificate_is_made_anew_before_it_expires(make_gate):
    gate = make_gate()
    terminator = Terminator(gate.config)
    route, now = gate.config.route[0], time.time_ns()
    leaf = terminator.presented(route, (NAME,), now)
    later = terminator.presented(route, (NAME,), now + 15 * DAY_NS)
    assert leaf.sha256 != later.sha256
    again = terminator.presented(route, (NAME,), now + 15 * DAY_NS + 1)
    assert again.sha256 == later.sha256


def test_an_upstream_that_stops_in_its_handshake_ends_the_session(connect, make_gate):
    gate = make_gate()
    stalled = socket.create_server(("127.0.0.1", 0))
    accepted = []

    def serve():
        sock, _ = stalled.accept()
        accepted.append(sock)
        sock.recv(20_000)
        sock.sendall(b"\x16\x03\x03\x40\x00\x02")

    threading.Thread(target=serve, daemon=True).start()
    gate.worker.config = with_patience(gate.config, 0.3)
    port = gate.listen(stalled.getsockname())

    def client():
        with pytest.raises((ssl.SSLError, OSError)):
            End(connect(port), client_context(gate.ca))

    gate.serve(client)
    accepted[0].close()
    stalled.close()
    _, ((found, *_),) = told(gate)
    failed = [each for each in found if each["record"] == "Tls"][-1]
    assert (failed["stage"], failed["by"]) == ("failed", "upstream")
    assert "too long" in failed["why"]


def with_patience(config, seconds):
    from dataclasses import replace

    return replace(config, gate=replace(config.gate, connect_timeout_s=seconds))


@pytest.mark.parametrize(
    "garbage",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x15\x03\x03\x00\x02\x02\x28",
        b"\x16\x03\x03\x00\x04\x02\x00\x00\x00",
        bytes(range(256)) * 12,
    ],
)
def test_an_upstream_that_answers_with_something_else_is_named(connect, make_gate, garbage):
    gate = make_gate()
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        sock, _ = listener.accept()
        with sock, listener, contextlib.suppress(OSError):
            sock.recv(20_000)
            sock.sendall(garbage)
            sock.settimeout(20)
            while sock.recv(1000):
                pass

    threading.Thread(target=serve, daemon=True).start()
    port = gate.listen(listener.getsockname())

    def client():
        with pytest.raises((ssl.SSLError, OSError)):
            End(connect(port), client_context(gate.ca))

    gate.serve(client)
    _, ((found, up, down),) = told(gate)
    failed = [each for each in found if each["record"] == "Tls"][-1]
    assert (failed["stage"], failed["by"]) == ("failed", "upstream")
    assert failed["why"]
    assert up == down == b""
