"""Sessions that no protocol knows, through a real gate with real sockets: every byte arrives, every
byte is in the evidence, and an end at one side is the same end at the other.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
import time
from itertools import count

import pytest
from gate_hosts import SERVER4, SERVER6, Gate, Reader, digest, pattern, until

pytestmark = pytest.mark.system

_ports = count(7001)


@pytest.fixture(scope="module")
def gate():
    with Gate(workers=2) as found:
        yield found


@pytest.fixture
def port():
    return next(_ports)


def send(sock, size, seed=1):
    for piece in pattern(size, seed):
        sock.sendall(piece)


def reset(sock):
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def fill(sock):
    """Send until nothing more is taken."""
    sock.settimeout(0.5)
    try:
        while True:
            sock.sendall(bytes(1 << 20))
    except TimeoutError:
        sock.settimeout(20)


def ends(gate, port):
    """Return (reason, by) of the only session to a port."""
    (session,) = gate.closed(port)
    return session.close["reason"], session.close["by"]


@pytest.mark.parametrize("address", [SERVER4, SERVER6])
def test_the_server_sees_the_clients_address_and_both_see_each_others_bytes(gate, port, address):
    near, far = gate.pair(port, address)
    assert far.getpeername()[0] == near.getsockname()[0]
    assert near.getpeername()[:2] == (address, port)
    near.sendall(b"from the client")
    assert far.recv(100) == b"from the client"
    far.sendall(b"from the server")
    assert near.recv(100) == b"from the server"
    near.close()
    assert far.recv(1) == b""
    far.close()
    (session,) = gate.closed(port)
    assert (bytes(session.up), bytes(session.down)) == (b"from the client", b"from the server")
    opened = session.open
    assert opened["client"] == ("2001:db8:1::10" if address == SERVER6 else "192.0.2.10")
    assert (opened["target"], opened["target_port"]) == (address, port)
    assert [r["record"] for r in session.records] == [
        "SessionOpen", "Attributed", "Detected", "SessionClose",
    ]  # fmt: skip
    assert (session.close["reason"], session.close["by"]) == ("fin", "client")
    assert (session.close["bytes_up"], session.close["bytes_down"]) == (15, 15)


@pytest.mark.parametrize("size", [1, 65_536, 10_000_019, 1 << 30])
@pytest.mark.parametrize("way", ["up", "down"])
def test_bytes_arrive_and_are_recorded_as_they_were_sent(gate, port, way, size):
    near, far = gate.pair(port)
    source, sink = (near, far) if way == "up" else (far, near)
    if way == "down":
        near.sendall(b"?")
        assert far.recv(1) == b"?"
    reader = Reader(sink)
    send(source, size)
    source.close()
    assert reader.result() == (size, digest(size))
    sink.close()
    (session,) = gate.closed(port)
    kind = 0 if way == "up" else 1
    assert session.sizes[kind] == size
    assert session.digests[kind].hexdigest() == digest(size)


def test_both_ways_at_once_do_not_hinder_each_other(gate, port):
    size = 50_000_003
    near, far = gate.pair(port)
    readers = Reader(near), Reader(far)
    writers = [
        threading.Thread(target=lambda s, n: (send(s, size, n), s.shutdown(1)), args=pair)
        for pair in ((near, 1), (far, 2))
    ]
    for writer in writers:
        writer.start()
    assert readers[1].result() == (size, digest(size, 1))
    assert readers[0].result() == (size, digest(size, 2))
    for writer in writers:
        writer.join()
    near.close()
    far.close()
    (session,) = gate.closed(port)
    assert [d.hexdigest() for d in session.digests[:2]] == [digest(size, 1), digest(size, 2)]


def test_many_small_messages_keep_their_order(gate, port):
    near, far = gate.pair(port)
    sent = bytearray()
    for number in range(3000):
        message = b"%d;" % number
        near.sendall(message)
        sent += message
        if number % 7 == 0:
            far.sendall(message)
    near.shutdown(socket.SHUT_WR)
    received = bytearray()
    while data := far.recv(65536):
        received += data
    assert received == sent
    far.close()
    near.close()
    (session,) = gate.closed(port)
    assert session.up == sent
    assert session.down == b"".join(b"%d;" % n for n in range(0, 3000, 7))


# -- ends


def test_a_client_that_half_closes_still_gets_its_answer(gate, port):
    near, far = gate.pair(port)
    near.sendall(b"question")
    near.shutdown(socket.SHUT_WR)
    assert far.recv(100) == b"question"
    assert far.recv(100) == b""
    reader = Reader(near)
    time.sleep(0.1)
    send(far, 5_000_000)
    far.close()
    assert reader.result() == (5_000_000, digest(5_000_000))
    near.close()
    assert ends(gate, port) == ("fin", "client")


def test_a_server_that_half_closes_still_gets_what_the_client_says(gate, port):
    near, far = gate.pair(port)
    far.sendall(b"banner")
    far.shutdown(socket.SHUT_WR)
    assert near.recv(100) == b"banner"
    assert near.recv(100) == b""
    reader = Reader(far)
    time.sleep(0.1)
    send(near, 5_000_000)
    near.close()
    assert reader.result() == (5_000_000, digest(5_000_000))
    far.close()
    assert ends(gate, port) == ("fin", "upstream")


def test_a_client_that_half_closes_before_the_server_is_reached_is_served(gate, port):
    with gate.listen(port) as listener:

        def shy():
            sock = gate.connect(port)
            sock.sendall(b"all I have to say")
            sock.shutdown(socket.SHUT_WR)
            return sock

        near = shy()
        far, _ = listener.accept()
    reader = Reader(far)
    assert reader.result()[0] == 17
    far.sendall(b"thanks")
    far.close()
    assert near.recv(100) == b"thanks"
    assert near.recv(100) == b""
    near.close()
    assert ends(gate, port) == ("fin", "client")


def test_a_client_that_says_nothing_and_leaves_is_recorded(gate, port):
    near, far = gate.pair(port)
    near.close()
    assert far.recv(1) == b""
    far.close()
    (session,) = gate.closed(port)
    assert session.record("Detected")["protocol"] == "opaque"
    assert session.record("Detected")["reason"] == "silent"


@pytest.mark.parametrize("by", ["client", "upstream"])
def test_a_reset_at_one_side_is_a_reset_at_the_other(gate, port, by):
    near, far = gate.pair(port)
    near.sendall(b"x")
    assert far.recv(1) == b"x"
    far.sendall(b"y")
    assert near.recv(1) == b"y"
    gone, left = (near, far) if by == "client" else (far, near)
    reset(gone)
    with pytest.raises(ConnectionResetError):
        left.recv(1)
    left.close()
    assert ends(gate, port) == ("reset", by)


@pytest.mark.parametrize("by", ["client", "upstream"])
def test_what_was_sent_before_a_reset_arrives_before_it(gate, port, by):
    near, far = gate.pair(port)
    near.sendall(b"x")
    assert far.recv(1) == b"x"
    gone, left = (near, far) if by == "client" else (far, near)
    gone.sendall(b"last words")
    reset(gone)
    until(lambda: gate.closed(port))
    assert left.recv(100) == b"last words"
    with pytest.raises(ConnectionResetError):
        left.recv(1)
    left.close()


def test_a_server_that_answers_early_and_resets_is_still_heard(gate, port):
    """As a web server does that refuses an upload: the answer, then RST for what still comes."""
    near, far = gate.pair(port)
    near.sendall(b"upload")
    assert far.recv(100) == b"upload"
    far.sendall(b"413 too large")
    time.sleep(0.2)
    far.close()
    with contextlib.suppress(ConnectionError):
        for _ in range(50):
            near.sendall(bytes(10_000))
            time.sleep(0.005)
    assert near.recv(100) == b"413 too large"
    near.close()
    (session,) = gate.closed(port)
    assert session.down == b"413 too large"


@pytest.mark.parametrize("by", ["client", "upstream"])
def test_a_reset_is_noticed_while_the_gate_does_not_read_that_side(gate, port, by):
    """The other side takes nothing, so that the gate stops reading; then the reset comes."""
    near, far = gate.pair(port)
    near.sendall(b"x")
    assert far.recv(1) == b"x"
    talker, mute = (near, far) if by == "client" else (far, near)
    fill(talker)
    reset(talker)
    assert ends(gate, port) == ("reset", by)
    reset(mute)


@pytest.mark.parametrize("by", ["client", "upstream"])
def test_a_reset_is_noticed_from_the_side_that_reads_nothing(gate, port, by):
    near, far = gate.pair(port)
    near.sendall(b"x")
    assert far.recv(1) == b"x"
    mute, talker = (near, far) if by == "client" else (far, near)
    fill(talker)
    reset(mute)
    with pytest.raises(ConnectionResetError):
        talker.recv(1)
    talker.close()
    assert ends(gate, port) == ("reset", by)


def test_an_orderly_end_behind_unread_bytes_loses_none_of_them(gate, port):
    """Both sides end while the client has not read: the gate still holds bytes, and gives them."""
    near, far = gate.pair(port, receive_bytes=65536)
    near.sendall(b"go")
    near.shutdown(socket.SHUT_WR)
    assert far.recv(10) == b"go"
    assert far.recv(10) == b""
    size = 3_000_000
    thread = threading.Thread(target=lambda: (send(far, size), far.close()))
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    time.sleep(0.5)
    assert gate.stats()["open"] + gate.stats(1)["open"] == 1
    assert Reader(near).result() == (size, digest(size))
    near.close()
    assert ends(gate, port) == ("fin", "client")


# -- servers that are not there


def test_a_server_that_refuses_is_a_reset_at_once(gate, port):
    begun = time.monotonic()
    with pytest.raises(ConnectionResetError):
        gate.greet(port)
    assert time.monotonic() - begun < 5
    (session,) = gate.closed(port)
    assert (session.close["reason"], session.close["by"]) == ("refused", "upstream")
    assert session.record("Attributed") is not None


def test_a_server_to_which_there_is_no_route_is_a_reset_at_once(gate, port):
    with pytest.raises(ConnectionResetError):
        gate.greet(port, "10.99.0.1")
    assert ends(gate, port) == ("unreachable", "gate")


def test_a_server_that_never_answers_is_a_reset_after_the_time_for_it(port):
    with Gate(gate="connect_timeout_s = 1.0") as gate:
        full = gate.listen(port, backlog=0)
        fillers = [gate.on("server", _no_wait, (SERVER4, port)) for _ in range(4)]
        near = gate.connect(port)
        begun = time.monotonic()
        with pytest.raises(ConnectionResetError):
            near.recv(1)
        assert time.monotonic() - begun > 0.5
        assert ends(gate, port) == ("timeout", "upstream")
        for sock in (full, near, *fillers):
            sock.close()


def test_a_client_that_gives_up_does_not_wait_for_a_server_that_never_answers(port):
    with Gate(gate="connect_timeout_s = 60.0") as gate:
        full = gate.listen(port, backlog=0)
        fillers = [gate.on("server", _no_wait, (SERVER4, port)) for _ in range(4)]
        reset(gate.connect(port))
        assert ends(gate, port) == ("reset", "client")
        for sock in (full, *fillers):
            sock.close()


def _no_wait(target):
    sock = socket.socket()
    sock.setblocking(False)
    assert sock.connect_ex(target) in (0, errno.EINPROGRESS)
    return sock


# -- servers that speak first, clients that are slow


def test_a_server_that_speaks_first_is_heard_while_the_client_is_silent(gate, port):
    near, far = gate.pair(port)
    far.sendall(b"220 ready")
    assert near.recv(100) == b"220 ready"
    near.sendall(b"EHLO")
    assert far.recv(100) == b"EHLO"
    near.close()
    far.close()
    (session,) = gate.closed(port)
    assert session.record("Detected")["reason"] == "server-first"


def test_a_client_that_is_silent_for_long_is_not_cut(gate, port):
    near, far = gate.pair(port)
    time.sleep(1.0)
    near.sendall(b"at last")
    assert far.recv(100) == b"at last"
    near.close()
    far.close()
    gate.closed(port)


def test_a_client_that_sends_byte_by_byte_is_served(gate, port):
    near, far = gate.pair(port)
    for number in range(60):
        near.sendall(bytes([65 + number % 26]))
        time.sleep(0.01)
    near.shutdown(socket.SHUT_WR)
    received = b""
    while data := far.recv(100):
        received += data
    assert received == bytes(65 + n % 26 for n in range(60))
    near.close()
    far.close()
    (session,) = gate.closed(port)
    assert session.up == received


def test_urgent_data_is_part_of_the_stream(gate, port):
    """The mark is not carried; the byte itself is relayed in its place, and recorded."""
    near, far = gate.pair(port)
    near.sendall(b"before")
    near.send(b"!", socket.MSG_OOB)
    near.sendall(b"after")
    near.shutdown(socket.SHUT_WR)
    received = b""
    while data := far.recv(100):
        received += data
    assert received == b"before!after"
    near.close()
    far.close()
    (session,) = gate.closed(port)
    assert session.up == b"before!after"


# -- many at once


def test_a_flood_of_connections_that_say_nothing_leaves_nothing_behind(gate, port):
    before = [gate.stats(n)["accepted"] for n in range(2)]
    with gate.listen(port) as listener:
        listener.settimeout(5)

        def take():
            with contextlib.suppress(OSError):
                while True:
                    listener.accept()[0].close()

        taker = threading.Thread(target=take, daemon=True)
        taker.start()

        def flood():
            for _ in range(2000):
                sock = socket.create_connection((SERVER4, port), 20)
                if os.urandom(1)[0] & 1:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()

        gate.on("client", flood)
        until(lambda: all(gate.stats(n)["open"] == 0 for n in range(2)), what="the end of all")
        accepted = [gate.stats(n)["accepted"] - before[n] for n in range(2)]
        assert sum(accepted) == 2000
        assert min(accepted) > 500  # the kernel spreads them
    sessions = gate.closed(port, 2000)
    assert len(sessions) == 2000
    for session in sessions:
        names = [record["record"] for record in session.records]
        assert names[:2] == ["SessionOpen", "Attributed"]
        assert names[-1] == "SessionClose"


def test_own_addresses_and_loopback_are_refused_and_recorded(gate, port):
    for address in ("192.0.2.1", "198.51.100.1", "2001:db8:1::1"):
        near = None
        with contextlib.suppress(ConnectionError):
            near = gate.connect(port, address)
            near.sendall(b"x")
            assert near.recv(1) == b""
        if near is not None:
            near.close()
    refused = until(
        lambda: [r for r in gate.records("Refused") if r["target_port"] == port] or None
    )
    assert {r["reason"] for r in refused} == {"own-address"}
