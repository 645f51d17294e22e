"""Sessions while the sensor is dead, after it came back, and of two accounts at once."""

import ctypes
import json
import os
import signal
import struct
import sys
import time
from pathlib import Path

import pytest
from attributed import PORT, Sessions, echo
from short_lives import FIRST_PORT, program
from staging import Stage, end, own_place, wait_for

from appliance import live
from appliance.lab.place import BLOB
from appliance.lab.topology import CLIENT4, SERVER4

pytestmark = pytest.mark.system
PATIENT = "[attribution]\nwait_ms = 5000\n"
#: Connects for every line that it reads, from the port in the line; lives longer than the sensor.
DAEMON = """
import socket, sys
for line in sys.stdin:
    s = socket.socket()
    s.bind(("", int(line)))
    s.connect((sys.argv[1], int(sys.argv[2])))
    s.sendall(b"hello")
    assert s.recv(5) == b"hello"
    s.close()
    print(line, end="", flush=True)
"""
NOISE = """
import socket, sys
for _ in range(200):
    socket.socket().connect_ex((sys.argv[1], 9))
"""


@pytest.fixture
def stage():
    made = Stage(own_place())
    yield made
    made.down()


class Daemon:
    """A client that lives on."""

    def __init__(self, stage, account):
        argv = [sys.executable, "-c", DAEMON, SERVER4, str(PORT)]
        self._process = stage.spawn("client", argv, account=account, stdin=-1, stdout=-1, text=True)
        self.pid = self._process.pid

    def __enter__(self):
        return self

    def __exit__(self, *_):
        end(self._process)

    def begin(self, port):
        print(port, file=self._process.stdin, flush=True)

    def done(self, port):
        assert self._process.stdout.readline() == f"{port}\n"

    def connect(self, port):
        self.begin(port)
        self.done(port)

    def kill(self):
        end(self._process)


def attributed(stage, port):
    """Return what the session from a port is recorded as."""
    sessions = Sessions(stage)
    (found,) = wait_for(
        lambda: sessions.more().opened().get(port, {}).get("Attributed"), what="the session"
    )
    return found


def attached(cgroup):
    """Return how many programs are attached to a cgroup, by the kernel's own account."""
    count = 0
    fd = os.open(cgroup, os.O_RDONLY)
    for kind in (10, 11, 3):  # connect4, connect6, sock_ops
        query = struct.pack("=IIIIQI", fd, kind, 0, 0, 0, 0).ljust(152, b"\0")
        answer = ctypes.create_string_buffer(query, len(query))
        assert ctypes.CDLL(None).syscall(321, 16, answer, len(query)) == 0  # BPF_PROG_QUERY
        count += struct.unpack_from("=I", answer, 24)[0]
    os.close(fd)
    return count


def told(stage):
    """Return the process ids of the sensors that the workers are connected to; 0 is none."""
    paths = live.workers(stage.config.paths.run)
    return {live.ask(path, {"do": "stats"})["sensor_pid"] for path in paths}


def sensing(stage, but=0):
    """Return the process id of a sensor that every worker listens to, and that is not `but`.

    What the workers say of one that was killed a moment ago, and what the supervisor does, may both
    be old: only the two together, with another process id than before, are a new sensor.
    """

    def new():
        found = stage.pids("sensor")
        return found[0] if found and but not in found and told(stage) == {*found} else None

    return wait_for(new, what="a sensor")


def test_a_dead_sensor_leaves_nothing_and_sessions_say_so_until_it_is_back(stage):
    stage.up(PATIENT)
    (supervisor,) = stage.pids("supervisor")
    with echo(stage), Daemon(stage, "backup-job") as old:
        old.connect(43_000)
        before = attributed(stage, 43_000)
        assert (before["account"], before["how"]) == ("backup-job", "syn")
        assert attached(stage.place.clients) == 3

        pid = sensing(stage)
        os.kill(supervisor, signal.SIGSTOP)  # nobody starts it again meanwhile
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: attached(stage.place.clients) == 0, what="the end of the links")
        wait_for(lambda: told(stage) == {0}, what="the workers' notice")
        time.sleep(1.1)  # for that long a new sensor's word is waited for
        old.connect(43_001)
        without = attributed(stage, 43_001)
        assert (without["account"], without["reason"]) == (None, "no-sensor")
        assert without["owner"] is None

        os.kill(supervisor, signal.SIGCONT)
        sensing(stage, but=pid)
        old.connect(43_002)
        again = attributed(stage, 43_002)
        assert (again["account"], again["how"]) == ("backup-job", "syn")
        assert again["owner"]["handle"] != before["owner"]["handle"]
        same = ("pid", "exe", "exe_sha256", "argv", "cgroup")
        assert [again["owner"][n] for n in same] == [before["owner"][n] for n in same]
        assert again["owner"]["pid"] == old.pid


def sockets(stage, role, port, state):
    """Return the rows of a host's IPv4 TCP sockets that have a port and a state."""
    table = stage.on(role, Path("/proc/thread-self/net/tcp").read_text)
    rows = [line.split() for line in table.splitlines()[1:]]
    return [row for row in rows if row[3] == state and row[1].endswith(f":{port:04X}")]


def retries(stage, port):
    """Return how often the SYN from a port of the client host was sent again; -1 without one."""
    syn_sent = sockets(stage, "client", port, "02")
    return int(syn_sent[0][6], 16) if syn_sent else -1


def kill_gates(stage):
    """Kill the workers, and wait until nobody listens: a process that was killed goes on for a
    moment.
    """
    for pid in stage.pids("gate"):
        os.kill(pid, signal.SIGKILL)
    port = stage.config.gate.listen_port
    wait_for(lambda: not sockets(stage, "gate", port, "0A"), what="the end of the listeners")


def test_clients_that_waited_for_a_dead_gate_are_named_when_it_is_back(stage):
    """Their SYNs have no option any more by then, and nobody heard their connect events."""
    stage.up(PATIENT)
    (supervisor,) = stage.pids("supervisor")
    backup, report, deployer = (
        Daemon(stage, account) for account in ("backup-job", "report-job", "ci-deployer")
    )
    with echo(stage), backup, report, deployer:
        os.kill(supervisor, signal.SIGSTOP)  # nobody starts them again meanwhile
        kill_gates(stage)
        deployer.begin(43_001)
        wait_for(lambda: retries(stage, 43_001) >= 1, what="a retry")
        deployer.kill()
        wait_for(lambda: retries(stage, 43_001) == -1, what="the end of the first try")
        report.begin(43_001)
        backup.begin(43_000)
        wait_for(lambda: min(retries(stage, port) for port in (43_000, 43_001)) >= 3, 30)
        os.kill(supervisor, signal.SIGCONT)
        for client, port, account in (
            (backup, 43_000, "backup-job"),
            (report, 43_001, "report-job"),
        ):
            client.done(port)
            found = attributed(stage, port)
            assert (found["account"], found["how"]) == (account, "event")
            assert found["owner"]["pid"] == client.pid


def test_a_sensor_that_dies_under_load_costs_names_and_never_gives_a_wrong_one(stage):
    stage.up(PATIENT)
    count = 1500
    with echo(stage):
        argv = [program(), "spawn", "0", str(count), "1", SERVER4, str(PORT)]
        spawner = stage.spawn("client", argv, account="backup-job", stdout=-1, text=True)
        sessions = Sessions(stage)
        pid = 0
        for share in (4, 2):
            wait_for(lambda share=share: len(sessions.more().opened()) > count / share, 60)
            pid = sensing(stage, but=pid)
            os.kill(pid, signal.SIGKILL)
        out, _ = spawner.communicate(timeout=100)
        assert spawner.returncode == 0
        wait_for(lambda: sessions.more().closed() >= count, 60, "the end of every session")
    ran = dict(map(int, line.split()) for line in out.splitlines())
    assert len(ran) == count
    digest_of = {}
    reasons = {}
    for nonce, pid in ran.items():
        (found,) = sessions.opened()[FIRST_PORT + nonce]["Attributed"]
        reasons[found["reason"]] = reasons.get(found["reason"], 0) + 1
        if found["reason"] is None:
            owner = found["owner"]
            assert (owner["pid"], owner["argv"][2]) == (pid, f"nonce-{nonce}")
            digest_of[owner["exe"]] = owner["exe_sha256"]
        else:
            assert found["account"] is None
    assert set(digest_of) == {str(program())}
    assert set(reasons) <= {None, "no-sensor", "no-owner", "timeout"}
    assert reasons[None] > count / 2


def test_two_accounts_that_match_one_session_are_named_and_neither_gets_it(stage):
    place = stage.place
    stage.up(
        PATIENT
        + f"""
[[account]]
name = "by-cgroup"
owner = "team"
purpose = "test"
match = {{ cgroup = "{place.prefix}/clients/by-cgroup" }}

[[account]]
name = "by-user"
owner = "team"
purpose = "test"
match = {{ uid = 0, exe = "{os.path.realpath(sys.executable)}" }}
"""
    )
    with echo(stage), Daemon(stage, "by-cgroup") as client:
        client.connect(43_000)
        sessions = Sessions(stage)
        records = wait_for(
            lambda: "Alarm" in (found := sessions.more().opened().get(43_000, {})) and found
        )
    (found,), (alarm,) = records["Attributed"], records["Alarm"]
    assert (found["account"], found["reason"]) == (None, "ambiguous")
    assert sorted(found["candidates"]) == ["by-cgroup", "by-user"]
    assert found["owner"]["pid"] == client.pid
    assert alarm["kind"] == "ambiguous"
    assert sorted(alarm["detail"]["accounts"]) == ["by-cgroup", "by-user"]
    (session,) = wait_for(stage.sessions, what="the session in the list")
    shown = stage.narrows("sessions", "show", session["id"]).stdout
    assert "unknown (ambiguous)" in shown
    assert "by-cgroup, by-user" in shown


def test_what_the_sensor_lost_is_in_the_heartbeats_and_the_next_session_has_its_name(stage):
    """A sensor that gets no processor for a while, with room for 34 events."""
    place = stage.place
    blob = json.loads(BLOB.read_text())
    blob["maps"]["connect_ring"]["entries"] = 4096
    small = Path("/run", f"{place.prefix}.blob")
    small.write_text(json.dumps(blob))
    try:
        paths = f'state = "{place.disk}/state"\nrun = "{place.memory}"\nblob = "{small}"\n'
        stage.up(f"{PATIENT}\n[paths]\n{paths}")
        pid = sensing(stage)
        os.kill(pid, signal.SIGSTOP)
        stage.client([sys.executable, "-c", NOISE, CLIENT4])
        os.kill(pid, signal.SIGCONT)
        sessions = Sessions(stage)
        lost = wait_for(
            lambda: {beat["sensor_lost"] for beat in sessions.more().all("Heartbeat")} - {0}, 30
        )
        assert lost == {200 - 4096 // 120}
        with echo(stage), Daemon(stage, "backup-job") as client:
            client.connect(43_000)
            assert attributed(stage, 43_000)["account"] == "backup-job"
    finally:
        small.unlink()
