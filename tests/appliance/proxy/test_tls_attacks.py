"""Peers that do to opened TLS what they should not: it is recorded, and costs little."""

import contextlib
import ctypes
import socket
import ssl
import subprocess
import threading
import time

import pytest
from cryptography import x509
from driven import half_stream, records
from tls_ends import NAME, End, client_context, server_context, serving

from appliance.proxy.tls.stream import MOST_UNSENT_BYTES, PIECE_BYTES, SCRATCH_BYTES, TlsStream
from capture.frames import Kind


def told(gate):
    """Close the gate; return (records, bytes up) of its only session."""
    frames = gate.close()
    (number,) = dict.fromkeys(session for _, session, *_ in frames if session)
    return records(frames, number), half_stream(frames, number, Kind.UP)


def tls_records(found):
    return [each for each in found if each["record"] == "Tls"]


def echo(end):
    while data := end.recv():
        end.send(data)
    end.say_end()


# -- what a peer may make the gate keep


def pair(certificates, far):
    """Return a stream that did a handshake with `far(socket)`, which runs in a thread of its own;
    and the thread, and the ends of the sockets.
    """
    near, other = socket.socketpair()
    thread = threading.Thread(target=far, args=(other,), daemon=True)
    thread.start()
    near.setblocking(False)
    incoming, outgoing = Measured(), Measured()
    tls = server_context(certificates.server()).wrap_bio(
        incoming.bio, outgoing.bio, server_side=True
    )
    stream = TlsStream(near, tls, incoming, outgoing, memoryview(bytearray(SCRATCH_BYTES)))
    until = time.monotonic() + 20
    while not stream.handshake():
        assert time.monotonic() < until
        time.sleep(0.001)
    return stream, thread, other


class Measured:
    """A memory BIO, and the most that it ever held: it never gives that back."""

    def __init__(self):
        self.bio = ssl.MemoryBIO()
        self.most = 0
        self.write_eof = self.bio.write_eof

    @property
    def pending(self):
        return self.bio.pending

    def write(self, data):
        done = self.bio.write(data)
        self.most = max(self.most, self.pending)
        return done

    def read(self):
        self.most = max(self.most, self.pending)
        return self.bio.read()


def test_what_a_session_has_moved_is_not_what_it_keeps(certificates):
    size = 8 << 20
    heard = []

    def far(sock):
        end = End(sock, client_context(certificates.ca))
        end.send(bytes(size))
        while sum(heard) < size:
            heard.append(len(end.recv(1 << 18)))

    stream, thread, other = pair(certificates, far)
    area, left = memoryview(bytearray(1 << 20)), size
    while left:
        with contextlib.suppress(BlockingIOError):
            left -= stream.recv_into(area)
    left = size
    while left:
        with contextlib.suppress(BlockingIOError):
            left -= stream.send(area[:left])
    thread.join(20)
    assert sum(heard) == size
    for bio in (stream._incoming, stream._outgoing):
        assert bio.most <= 2 * PIECE_BYTES + 1024
    stream.close()
    other.close()


SSL = ctypes.CDLL("libssl.so.3")
SSL.TLS_client_method.restype = SSL.SSL_CTX_new.restype = SSL.SSL_new.restype = ctypes.c_void_p
SSL.SSL_CTX_new.argtypes = SSL.SSL_new.argtypes = [ctypes.c_void_p]
SSL.SSL_connect.argtypes = SSL.SSL_do_handshake.argtypes = [ctypes.c_void_p]
SSL.SSL_free.argtypes = SSL.SSL_CTX_free.argtypes = [ctypes.c_void_p]
SSL.SSL_set_fd.argtypes = SSL.SSL_key_update.argtypes = [ctypes.c_void_p, ctypes.c_int]
MOST_UPDATES = 200_000


def test_key_updates_without_end_whose_answers_nobody_takes_end_the_session(certificates):
    sent = []

    def far(sock):
        sock.settimeout(None)
        context = SSL.SSL_CTX_new(SSL.TLS_client_method())
        tls = SSL.SSL_new(context)
        SSL.SSL_set_fd(tls, sock.fileno())
        assert SSL.SSL_connect(tls) == 1
        for number in range(MOST_UPDATES):
            SSL.SSL_key_update(tls, 1)  # and the peer is to do the same
            if SSL.SSL_do_handshake(tls) != 1:
                break
            sent.append(number)
        SSL.SSL_free(tls)
        SSL.SSL_CTX_free(context)

    stream, thread, other = pair(certificates, far)
    area, until = memoryview(bytearray(65536)), time.monotonic() + 40
    failed = ""
    while not failed:
        assert time.monotonic() < until
        try:
            stream.recv_into(area)
        except BlockingIOError:
            time.sleep(0.0005)
        except OSError as wrong:
            failed = str(wrong)
    assert "takes no answers" in failed
    assert MOST_UNSENT_BYTES < sum(map(len, stream._waiting)) < 2 * MOST_UNSENT_BYTES
    stream.raw.close()
    thread.join(20)
    other.close()
    assert len(sent) < MOST_UPDATES


# -- certificates


def test_a_chain_that_is_longer_than_any_is_refused_and_recorded(connect, certificates, make_gate):
    gate = make_gate()
    certificate, key = certificates.server(names=tuple(f"n{n}.{NAME}" for n in range(2000)))
    certificate.write_bytes(certificate.read_bytes() * 4)
    address, _ = serving((certificate, key), echo)
    port = gate.listen(address)

    def client():
        with pytest.raises((ssl.SSLError, OSError)):
            End(connect(port), client_context(gate.ca))

    gate.serve(client)
    last = tls_records(told(gate)[0])[-1]
    assert (last["stage"], last["by"]) == ("failed", "upstream")
    assert "excessive message size" in last["why"]


def test_a_certificate_with_many_names_is_read_in_part(connect, certificates, make_gate):
    gate = make_gate()
    files = certificates.server(names=(NAME, *(f"n{n}.{NAME}" for n in range(1500))))
    address, _ = serving(files, echo)
    port = gate.listen(address)

    def client():
        context = client_context(gate.ca)
        context.check_hostname = False
        end = End(connect(port), context, name="127.0.0.1")  # so that there is no server name
        end.send(b"hello")
        assert end.recv() == b"hello"
        return x509.load_der_x509_certificate(end.tls.getpeercert(binary_form=True))

    shown = gate.serve(client).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert len(shown.value.get_values_for_type(x509.DNSName)) == 100
    assert len(tls_records(told(gate)[0])[-1]["chain"][0]["names"]) == 20


def test_an_address_is_verified_by_the_addresses_of_the_servers_certificate(
    connect, certificates, make_gate
):
    gate = make_gate()
    address, _ = serving(certificates.server("db.test", ("db.test", "127.0.0.1")), echo,
                         connections=2)  # fmt: skip
    port = gate.listen(address)

    def client(name):
        end = End(connect(port), client_context(gate.ca), name=name)
        end.send(b"hello")
        got = end.recv()
        end.close()
        return got

    assert gate.serve(client, "127.0.0.1") == b"hello"
    with pytest.raises(ssl.SSLCertVerificationError):
        gate.serve(client, "127.0.0.2")


def test_a_key_update_of_a_real_client_passes_and_changes_nothing(certificates, make_gate):
    gate = make_gate()
    address, _ = serving(certificates.server(), echo)
    port = gate.listen(address)
    argv = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-servername", NAME, "-CAfile",
            str(gate.ca), "-tls1_3"]  # fmt: skip

    def client():
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, bufsize=0)  # fmt: skip
        said = b""

        def hear(text):
            nonlocal said
            while text not in said:
                data = process.stdout.read(4096)
                if not data:
                    break
                said += data

        hear(b"Verify return code: 0")
        process.stdin.write(b"before\n")
        hear(b"before")
        process.stdin.write(b"K\n")
        hear(b"KEYUPDATE")
        process.stdin.write(b"after\n")
        hear(b"after")
        process.stdin.close()
        hear(b"the end")  # which never comes
        process.wait(20)
        process.stdout.close()
        return said

    said = gate.serve(client)
    found, up = told(gate)
    assert b"after" in said
    assert up == b"before\nafter\n"
    assert [each["stage"] for each in tls_records(found)][:2] == ["hello", "established"]


@pytest.mark.parametrize("durability", ["write", "fsync"])
def test_bytes_in_tls_leave_in_order_when_each_waits_for_the_disk(
    connect, certificates, make_gate, durability
):
    gate = make_gate(durability=durability)
    address, _ = serving(certificates.server(), echo)
    port = gate.listen(address)
    said = b"".join(b"%07d\n" % number for number in range(60_000))

    def client():
        end = End(connect(port), client_context(gate.ca))
        got = bytearray()
        for at in range(0, len(said), 60_000):
            end.send(said[at : at + 60_000])
            while len(got) < min(at + 60_000, len(said)):
                got += end.recv()
        end.say_end()
        assert end.recv() == b""
        return bytes(got)

    assert gate.serve(client) == said
    assert told(gate)[1] == said
