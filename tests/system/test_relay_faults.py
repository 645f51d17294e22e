"""The data path when things break: no disk space, a stop, kill -9.

Bytes that reached the server are in the evidence, and what the route says is what happens.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import threading
import time

import pytest
from gate_hosts import Gate, Reader, digest, pattern, small_disk, until

pytestmark = pytest.mark.system

MIB = 1 << 20
SMALL_EVIDENCE = f"segment_bytes = {8 * MIB}\nreserve_bytes = {16 * MIB}\nchunk_count = 4"


def on_disk(gate, port):
    """Return what the evidence has on disk of the newest session to a port."""
    found = [s for s in gate.recorded().values() if s.open and s.open["target_port"] == port]
    return found[-1] if found else None


# -- durability


def test_on_a_route_with_fsync_bytes_are_on_the_disk_before_they_arrive():
    with Gate(route='durability = "fsync"') as gate:
        near, far = gate.pair(7000)
        up = down = b""
        for number in range(100):
            near.sendall(b"question %d;" % number)
            up += far.recv(100)
            session = on_disk(gate, 7000)
            assert bytes(session.up) == up
            names = [record["record"] for record in session.records]
            assert names[:2] == ["SessionOpen", "Attributed"]
            far.sendall(b"answer %d;" % number)
            down += near.recv(100)
            assert bytes(on_disk(gate, 7000).down) == down
        assert up == b"".join(b"question %d;" % n for n in range(100))
        near.close()
        far.close()


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_route_with_fsync_carries_bulk_in_order(way):
    size = 30_000_001
    with Gate(route='durability = "fsync"') as gate:
        near, far = gate.pair(7000)
        source, sink = (near, far) if way == "up" else (far, near)
        reader = Reader(sink)
        for piece in pattern(size):
            source.sendall(piece)
        source.close()
        assert reader.result() == (size, digest(size))
        sink.close()
        (session,) = gate.closed(7000)
        assert session.digests[way == "down"].hexdigest() == digest(size)


def test_what_arrived_over_a_route_with_fsync_survives_power_loss():
    with Gate(route='durability = "fsync"') as gate:
        near, far = gate.pair(7000)
        received = b""
        for number in range(30):
            near.sendall(b"question %d;" % number)
            received += far.recv(100)
        gate.kill()
        shutil.rmtree(gate.run / "hot")
        gate.recover()
        assert on_disk(gate, 7000).up[: len(received)] == received
        (said,) = gate.records("Recovered")
        assert said["power_loss"]
        near.close()
        far.close()


# -- full disk


class Filler:
    """A file beside the evidence that takes the space."""

    def __init__(self, disk):
        self.path = disk / "other"

    def fill(self):
        disk = os.statvfs(self.path.parent)
        with self.path.open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize)

    def free(self):
        self.path.unlink()


@contextlib.contextmanager
def on_small_disk(**settings):
    with small_disk(80 * MIB) as disk, Gate(disk=disk, evidence=SMALL_EVIDENCE, **settings) as gate:
        yield gate, Filler(disk)


def until_reset(sock):
    """Send more than the disk takes, until the gate cuts the session."""
    try:
        for piece in pattern(200 * MIB):
            sock.sendall(piece)
    except ConnectionError:
        return
    raise AssertionError("the gate took it all")


def test_a_full_disk_closes_the_route_and_it_opens_again_by_itself():
    with on_small_disk() as (gate, filler):
        near, far = gate.pair(7000)
        reader = Reader(far)
        filler.fill()
        until_reset(near)
        near.close()
        until(lambda: gate.stats()["failed"])
        with pytest.raises(ConnectionResetError):
            gate.greet(7000)
        filler.free()
        until(lambda: not gate.stats()["failed"])
        near, again = gate.pair(7001)
        near.sendall(b"as if nothing had been")
        assert again.recv(100) == b"as if nothing had been"
        near.close()
        again.close()
        assert bytes(gate.closed(7001)[0].up) == b"as if nothing had been"
        (session,) = gate.closed(7000)
        assert session.close["reason"] == "evidence"
        with contextlib.suppress(ConnectionResetError):
            reader.result()
        assert reader.taken()[0] <= session.sizes[0]
        assert reader.taken()[1] == digest(reader.taken()[0])
        assert [r["reason"] for r in gate.records("Refused")] == ["evidence"]
        (gap,) = gate.records("Gap")
        assert (gap["scope"], gap["reason"]) == ("worker", "evidence-unavailable")
        assert gap["until"] > gap["since"] > 0
        far.close()


def test_on_an_open_route_sessions_go_on_and_a_gap_says_how_much_is_missing():
    with on_small_disk(route='on_evidence_failure = "open"') as (gate, filler):
        near, far = gate.pair(7000)
        reader = Reader(far)
        filler.fill()
        size = 100 * MIB
        for piece in pattern(size):
            near.sendall(piece)
        assert gate.stats()["failed"]
        late, late_far = gate.pair(7001)
        late.sendall(b"nobody writes this down")
        assert late_far.recv(100) == b"nobody writes this down"
        filler.free()
        until(lambda: not gate.stats()["failed"])
        late.sendall(b", but this")
        assert late_far.recv(100) == b", but this"
        for sock in (near, late, late_far):
            sock.close()
        assert reader.result() == (size, digest(size))
        far.close()
        (session,) = gate.closed(7000, missing=True)
        gap = session.record("Gap")
        assert (gap["scope"], gap["reason"]) == ("session", "evidence-unavailable")
        assert session.sizes[0] + gap["bytes_up"] == size == session.close["bytes_up"]
        assert gap["bytes_up"] > 0
        (session,) = gate.closed(7001, missing=True)
        assert session.open is not None
        assert session.record("Attributed") is not None
        assert bytes(session.up) == b", but this"
        assert session.record("Gap")["bytes_up"] == 23


def test_requests_that_wait_for_a_disk_that_is_full_never_arrive():
    with on_small_disk(route='durability = "fsync"') as (gate, filler):
        near, far = gate.pair(7000)
        reader = Reader(far)
        filler.fill()
        until_reset(near)
        near.close()
        with contextlib.suppress(ConnectionResetError):
            reader.result()
        assert reader.taken()[0] <= on_disk(gate, 7000).sizes[0]
        far.close()


def test_a_stop_on_a_full_disk_is_orderly():
    with on_small_disk() as (gate, filler):
        near, far = gate.pair(7000)
        reader = Reader(far)
        filler.fill()
        until_reset(near)
        assert gate.stop() == 0
        reader.join()
        (session,) = gate.closed(7000)
        assert session.close["reason"] == "evidence"
        assert [stop["reason"] for stop in gate.records("Stop")] == ["stopped"]
        assert os.listdir(gate.store.open) == []
        near.close()
        far.close()


# -- stop


def test_a_stop_gives_what_was_received_and_ends_every_session_in_order():
    with Gate() as gate:
        near, far = gate.pair(7000, receive_bytes=65536)
        idle, idle_far = gate.pair(7001)
        size = 3_000_000
        writer = threading.Thread(target=_until_cut, args=(far, size))
        writer.start()
        until(lambda: any(session["unsent"] for session in gate.sessions()))
        stopping = threading.Thread(target=gate.stop)
        stopping.start()
        assert idle.recv(1) == b""
        assert idle_far.recv(1) == b""
        time.sleep(0.3)
        received, seen = Reader(near).result()
        stopping.join()
        writer.join()
        assert gate.processes[0].returncode == 0
        for port in (7000, 7001):
            (session,) = gate.closed(port)
            assert (session.close["reason"], session.close["by"]) == ("stopped", "gate")
        (session,) = gate.closed(7000)
        assert (received, seen) == (session.sizes[1], digest(session.sizes[1]))
        assert [stop["reason"] for stop in gate.records("Stop")] == ["stopped"]
        assert os.listdir(gate.store.open) == os.listdir(gate.store.hot) == []
        for sock in (near, far, idle, idle_far):
            sock.close()


def _until_cut(sock, size):
    with contextlib.suppress(OSError):
        for piece in pattern(size):
            sock.sendall(piece)


def test_a_client_that_never_reads_does_not_keep_the_gate_from_stopping():
    with Gate() as gate:
        near, far = gate.pair(7000, receive_bytes=4096)
        threading.Thread(target=_until_cut, args=(far, 50_000_000), daemon=True).start()
        until(lambda: gate.sessions()[0]["unsent"])
        assert gate.stop(longest_s=25) == 0
        (session,) = gate.closed(7000)
        assert session.close["reason"] == "stopped"
        near.close()
        far.close()


# -- kill -9


class Sink:
    """A server that keeps what each client said."""

    def __init__(self, gate, port):
        self.received: list[bytearray] = []
        self._listener = gate.listen(port)
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock):
        mine = bytearray()
        self.received.append(mine)
        with sock, contextlib.suppress(OSError):
            while data := sock.recv(65536):
                mine += data
                sock.sendall(b"%d;" % len(data))

    def close(self):
        self._listener.close()


def talk(gate, port, name, stop):
    """Say things that name the client and count, until the session or the test ends."""
    while not stop.is_set():
        with contextlib.suppress(OSError):
            sock = gate.connect(port)
            with sock:
                dice = random.Random(name)
                for number in range(100_000):
                    if stop.is_set():
                        return
                    sock.sendall((b"%s/%d " % (name, number)) * dice.choice((1, 1, 1, 300)))
                    sock.recv(100)
        time.sleep(0.01)


def test_every_byte_that_a_server_got_survives_kills_in_mid_load():
    dice = random.Random(21)
    kills = 8
    with Gate(workers=2, evidence=f"segment_bytes = {8 * MIB}\nchunk_count = 3") as gate:
        gate.most_kept_bytes = 1 << 30
        sink, stop = Sink(gate, 7000), threading.Event()
        talkers = [
            threading.Thread(target=talk, args=(gate, 7000, b"client-%d" % n, stop))
            for n in range(6)
        ]
        for talker in talkers:
            talker.start()
        for _ in range(kills):
            time.sleep(0.05 + dice.random() * 0.3)
            victims = dice.choice(([0], [1], [0, 1]))
            for number in victims:
                gate.processes[number].kill()
            for number in victims:
                gate.processes[number].wait()
                gate.start(number)
            for number in victims:
                gate.wait_ready(number)
        stop.set()
        for talker in talkers:
            talker.join(30)
        for number in range(2):
            assert gate.stop(number) == 0
        sink.close()
        recorded = [bytes(s.up) for s in gate.recorded().values() if s.open]
        assert len(sink.received) >= kills
        for got in sink.received:
            assert any(up.startswith(bytes(got)) for up in recorded), got[:40]
        check_incarnations(gate)


def check_incarnations(gate):
    """Sessions of a killed worker have no end, and a Recovered record says why; all others have
    one.
    """
    recovered = {record["incarnation"] for record in gate.records("Recovered")}
    assert len(recovered) == len(gate.records("Recovered"))
    cut = 0
    for session in gate.recorded().values():
        if session.open and session.close is None:
            assert session.number >> 40 in recovered
            cut += 1
        elif session.open:
            assert session.records[-1]["record"] == "SessionClose"
            assert session.record("Attributed")
    assert cut
    assert os.listdir(gate.store.open) == []


def test_a_worker_that_was_killed_serves_again_as_soon_as_it_is_started():
    with Gate() as gate:
        near, far = gate.pair(7000)
        near.sendall(b"before")
        assert far.recv(100) == b"before"
        gate.kill()
        for sock in (near, far):
            with sock, contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""
        gate.start()
        gate.wait_ready()
        near, far = gate.pair(7000)
        near.sendall(b"after")
        assert far.recv(100) == b"after"
        near.close()
        far.close()
        (session,) = gate.closed(7000)
        assert bytes(session.up) == b"after"
        (said,) = gate.records("Recovered")
        assert not said["power_loss"]


def test_without_space_to_begin_with_a_worker_does_not_start_and_leaves_nothing():
    with small_disk(80 * MIB) as disk, Gate(disk=disk, workers=0, evidence=SMALL_EVIDENCE) as gate:
        filler = Filler(disk)
        gate.start()
        gate.wait_ready()
        assert gate.stop() == 0
        filler.fill()
        gate.start()
        assert gate.processes[0].wait(20) != 0
        assert os.listdir(gate.store.hot) == os.listdir(gate.store.open) == []
        filler.free()
        gate.start()
        gate.wait_ready()
        near, far = gate.pair(7000)
        near.sendall(b"x")
        assert far.recv(1) == b"x"
        near.close()
        far.close()
        with contextlib.suppress(OSError):
            near.shutdown(socket.SHUT_WR)
