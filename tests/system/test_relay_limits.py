"""Sessions beyond what is comfortable: thousands at once, thousands that never read, and too few
descriptors. Nothing spins, nothing grows without bound, and whoever behaves is served.
"""

from __future__ import annotations

import contextlib
import gc
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from gate_hosts import SERVER4, Gate, Reader, digest, pattern, raise_descriptors, until
from staging import end

from appliance.lab import topology

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

MUTE = 5000
EACH = 192 << 10
MANY = 10_000


@contextlib.contextmanager
def echo(gate, port):
    """Run an echo server in a process of its own."""
    argv = [sys.executable, str(Path(__file__).with_name("echo_server.py")), SERVER4, str(port)]
    server = topology.start(
        gate.topology.namespace("server"), argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert server.stdout.readline() == b"ready\n"
        yield
    finally:
        end(server)


@contextlib.contextmanager
def many(gate, port, count, *, receive_bytes=0):
    """Open many sessions of the client; all are closed, with a reset, at the end."""
    raise_descriptors()
    socks = []

    def connect():
        for _ in range(count):
            sock = socket.socket()
            socks.append(sock)
            if receive_bytes:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
            sock.settimeout(30)
            sock.connect((SERVER4, port))

    try:
        gate.on("client", connect)
        yield socks
    finally:
        for sock in socks:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.close()
        socks.clear()
        gc.collect()


def opened(gate):
    return sum(gate.stats(number)["open"] for number in gate.processes)


def test_ten_thousand_sessions_at_once_are_all_served_and_recorded():
    with Gate(workers=2) as gate, echo(gate, 7000):
        before = [gate.memory_kib(number) for number in range(2)]
        with many(gate, 7000, MANY) as socks:
            for turn in range(2):
                for number, sock in enumerate(socks):
                    sock.sendall(b"%d/%05d" % (turn, number))
                for number, sock in enumerate(socks):
                    assert sock.recv(100) == b"%d/%05d" % (turn, number)
            assert opened(gate) == MANY
            spread = [gate.stats(number)["open"] for number in range(2)]
            assert min(spread) > MANY / 3
            grown = [gate.memory_kib(number) - before[number] for number in range(2)]
            print("KiB a session:", [grown[n] / spread[n] for n in range(2)])
            assert sum(grown) / MANY < 8
        sessions = gate.closed(7000, MANY, 30)
        said = sorted(bytes(session.up) for session in sessions)
        assert said == [b"0/%05d1/%05d" % (number, number) for number in range(MANY)]
        assert all(session.down == session.up for session in sessions)


def test_readers_that_never_read_do_not_hinder_a_healthy_session():
    with Gate(gate="max_sessions = 9000") as gate, gate.listen(7000) as listener:
        before = gate.memory_kib()
        with many(gate, 7000, MUTE, receive_bytes=8192) as mute, contextlib.ExitStack() as closed:
            far = [closed.enter_context(listener.accept()[0]) for _ in mute]
            sent = pour(far, EACH)
            waiting = [session["unsent"] > 0 for session in gate.sessions()]
            assert sum(waiting) > MUTE // 20  # the rest fits into the kernel's buffers
            assert gate.memory_kib() - before < 16 * MUTE
            healthy(gate, 20_000_000)
            for sock in far:
                sock.close()  # the rest waits for its readers
            for number in range(0, MUTE, MUTE // 50):
                size = sent[number]
                assert Reader(mute[number]).result() == (size, digest(size, 3))
            healthy(gate, 1_000_000)
        until(lambda: opened(gate) == 0, what="the end of all")


def pour(socks, most):
    """Send up to `most` bytes to each, in turns, until none takes any more; return how much each
    took.

    It is more than the kernel keeps for a reader that does not read, and little enough for the
    TCP memory of one machine that is client, gate and server at once.
    """
    block = b"".join(pattern(most, 3))
    sent = [0] * len(socks)
    for sock in socks:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    quiet = 0
    while quiet < 3 and min(sent) < most:
        moved = 0
        for number, sock in enumerate(socks):
            at = sent[number]
            if at < most:
                with contextlib.suppress(BlockingIOError):
                    sent[number] += sock.send(block[at : at + 65536])
            moved += sent[number] - at
        quiet = 0 if moved else quiet + 1
        time.sleep(0.05)
    return sent


def healthy(gate, size):
    """Run a session of its own each way."""
    for way in (0, 1):
        near, far = gate.pair(7001)
        source, sink = (near, far) if way else (far, near)
        reader = Reader(sink)
        for piece in pattern(size):
            source.sendall(piece)
        source.close()
        assert reader.result() == (size, digest(size))
        sink.close()


def test_readers_that_never_read_on_the_servers_side_do_not_hinder_others():
    """The same the other way: clients that send, to a server that reads nothing."""
    with (
        Gate() as gate,
        gate.listen(7000, receive_bytes=8192) as listener,
        many(gate, 7000, 500) as talkers,
        contextlib.ExitStack() as closed,
    ):
        far = [closed.enter_context(listener.accept()[0]) for _ in talkers]
        sent = pour(talkers, 4 * EACH)
        assert sum(session["unsent"] > 0 for session in gate.sessions()) > 250
        healthy(gate, 5_000_000)
        for sock in talkers:
            sock.shutdown(socket.SHUT_WR)
        for number in range(0, 500, 25):
            size = sent[number]
            assert Reader(far[number]).result() == (size, digest(size, 3))
        for sock in far:
            sock.close()


def test_with_few_descriptors_connections_wait_and_are_served_later():
    with Gate(workers=0) as gate, echo(gate, 7000):
        gate.start(0, descriptors=200)
        gate.wait_ready(0)
        with many(gate, 7000, 60) as socks:
            until(lambda: opened(gate) >= 36)
            quiet(gate)
            assert opened(gate) == 36
            for sock in socks:
                sock.sendall(b"x")
            for sock in socks[:30]:
                assert sock.recv(1) == b"x"
                sock.close()
            for sock in socks[36:]:
                assert sock.recv(1) == b"x"  # they waited
        gaps = until(lambda: [g for g in gate.records("Gap") if g["until"]])
        assert {g["reason"] for g in gaps} == {"emfile"}


def test_when_descriptors_run_out_accepting_stops_is_recorded_and_goes_on_later():
    """Somebody takes the descriptors away under a running worker."""
    with Gate() as gate, echo(gate, 7000):
        pid = gate.processes[0].pid
        used = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 10, 20_000))
        with many(gate, 7000, 40) as socks:
            until(lambda: gate.records("Gap"), what="a Gap record")
            quiet(gate)
            assert 1 <= len(gate.records("SessionOpen")) <= 6
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
            for sock in socks:
                sock.sendall(b"x")
            for sock in socks:
                assert sock.recv(1) == b"x"
        gaps = until(lambda: [g for g in gate.records("Gap") if g["until"]], what="its end")
        assert {g["reason"] for g in gaps} == {"emfile"}


def quiet(gate):
    """The worker must be doing next to nothing."""
    time.sleep(0.3)
    before = gate.cpu_s()
    time.sleep(1.0)
    assert gate.cpu_s() - before < 0.3


def test_above_the_limit_of_sessions_connections_wait_and_that_is_recorded():
    with Gate(gate="max_sessions = 20") as gate, echo(gate, 7000):
        with many(gate, 7000, 50) as socks:
            until(lambda: opened(gate) == 20)
            quiet(gate)
            assert opened(gate) == 20
            for sock in socks:
                sock.sendall(b"x")
            for sock in socks:
                assert sock.recv(1) == b"x"
                sock.close()
        gaps = until(lambda: [g for g in gate.records("Gap") if g["until"]])
        assert {g["reason"] for g in gaps} == {"session-limit"}


def test_clients_that_stop_in_mid_word_do_not_hinder_others():
    """Slowloris: the first half of a PostgreSQL startup, and then a byte now and then."""
    with Gate() as gate, echo(gate, 7000), many(gate, 7000, 500) as socks:
        for sock in socks:
            sock.sendall(b"\0\0")
        healthy(gate, 5_000_000)
        for _ in range(3):
            time.sleep(0.2)
            for sock in socks:
                sock.sendall(b"\0")
        for sock in socks:
            assert sock.recv(100).startswith(b"\0\0")
        assert opened(gate) == 500


def test_idle_sessions_cost_nothing():
    with Gate() as gate, echo(gate, 7000), many(gate, 7000, 2000) as socks:
        for sock in socks:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
        quiet(gate)


def test_a_slow_reader_gets_everything_while_memory_turns_over():
    """What it waits for was pushed out of memory long ago, and is read back from the disk."""
    with Gate(evidence="chunk_count = 3") as gate:
        near, far = gate.pair(7000, receive_bytes=65536)
        size = 4_000_000
        writer = threading.Thread(target=lambda: [far.sendall(p) for p in pattern(size, 5)])
        writer.start()
        until(lambda: gate.sessions() and gate.sessions()[0]["unsent"])
        for _ in range(3):
            healthy(gate, 20_000_000)
        reader = Reader(near)
        writer.join(30)
        far.close()
        assert reader.result() == (size, digest(size, 5))
        near.close()
