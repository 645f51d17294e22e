"""Connections of real processes: events, SYN options, losses, and what a sensor leaves behind."""

import contextlib
import ctypes
import errno
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from watching import BLOB, HERE, HERE6, PREFIXES, Gate, ip_network

from appliance.attribution import synopt
from appliance.lab import topology
from ebpf import sensor as sensors
from ebpf.events import Message
from ebpf.host import AlreadyRunning
from ebpf.loader import LoadError
from ebpf.sensor import Sensor, SensorSettings

ROOT = Path(__file__).parents[2]
TCP_SAVE_SYN, TCP_SAVED_SYN = 27, 28
CONNECT = """
import socket, sys
for _ in range(int(sys.argv[3])):
    socket.create_connection((sys.argv[1], int(sys.argv[2]))).close()
"""
TRY = """
import socket, sys
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("", int(sys.argv[3])))
s.connect((sys.argv[1], int(sys.argv[2])))
"""
MPTCP = """
import socket, sys
socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262).connect((sys.argv[1], int(sys.argv[2])))
"""
COUNTERS = """
table ip count {
    counter syns { }
    counter others { }
    chain output {
        type filter hook output priority 0;
        tcp option 253 exists tcp flags & (syn|ack) == syn counter name syns
        tcp option 253 exists tcp flags & (syn|ack) != syn counter name others
    }
}
"""


class Listener:
    """A socket that keeps the SYNs of what it accepts."""

    def __init__(self, watched, address=HERE):
        self.socket = watched.listen(address)
        self.socket.setsockopt(socket.IPPROTO_TCP, TCP_SAVE_SYN, 1)
        self.socket.settimeout(10)
        self.port = self.socket.getsockname()[1]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def accepted(self):
        """Return (peer, saved SYN)."""
        near, peer = self.socket.accept()
        with near:
            return peer[:2], near.getsockopt(socket.IPPROTO_TCP, TCP_SAVED_SYN, 256)


def connect(watched, address, port, times=1, code=CONNECT, **options):
    return watched.run([sys.executable, "-c", code, address, port, times], **options)


def key(sensor):
    return sensor._key


@pytest.mark.parametrize("address", [HERE, HERE6])
def test_a_connect_event_says_who_and_where_before_the_connection_is_accepted(watched, address):
    gate = watched.gate()
    with Listener(watched, address) as listener:
        pid, _ = connect(watched, address, listener.port)
        (event,) = watched.until(gate.connects)
        peer, _ = listener.accepted()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    assert (event.tgid, event.tid, event.uid, event.gid) == (pid, pid, 0, 0)
    assert event.comm.rstrip(b"\0") == b"python"
    assert (event.saddr, event.sport) == (socket.inet_pton(family, peer[0]), peer[1])
    assert (event.daddr, event.dport) == (socket.inet_pton(family, address), listener.port)
    assert event.version == (6 if ":" in address else 4)
    assert event.cgroup == watched.cgroup.stat().st_ino
    assert 0 <= time.monotonic_ns() - event.ts < 20_000_000_000
    assert watched.until(lambda: gate.owner(event.handle))["pid"] == pid


@pytest.mark.parametrize("address", [HERE, HERE6, f"::ffff:{HERE}"])
def test_the_syn_says_who_sent_it_under_the_key_that_gates_are_told(watched, address):
    gate = watched.gate()
    with Listener(watched, address.removeprefix("::ffff:")) as listener:
        pid, _ = connect(watched, address, listener.port)
        _, syn = listener.accepted()
    option = synopt.find(syn)
    assert len(option.mac) == 8
    assert synopt.verified(option, [key(watched.sensor)])
    assert not synopt.verified(option, [bytes(16)])
    assert watched.until(lambda: gate.owner(option.handle))["pid"] == pid


def test_without_timestamps_the_whole_mac_fits_too(watched):
    setting = Path("/proc/sys/net/ipv4/tcp_timestamps")
    topology.run(watched.name, setting.write_text, "0")
    with Listener(watched) as listener:
        connect(watched, HERE, listener.port)
        option = synopt.find(listener.accepted()[1])
    assert len(option.mac) == 8
    assert synopt.verified(option, [key(watched.sensor)])


@pytest.mark.skipif(
    not Path("/proc/sys/net/mptcp/enabled").exists(), reason="kernel: it has no MPTCP"
)
def test_mptcp_leaves_room_for_half_of_the_mac(watched):
    gate = watched.gate()
    with Listener(watched) as listener:
        pid, _ = connect(watched, HERE, listener.port, code=MPTCP)
        option = synopt.find(listener.accepted()[1])
    assert len(option.mac) == 4
    assert synopt.verified(option, [key(watched.sensor)])
    assert watched.until(lambda: gate.owner(option.handle))["pid"] == pid


def test_the_option_goes_towards_configured_prefixes_only(idle):
    idle.start(prefixes=(ip_network("203.0.113.0/24"),))
    gate = idle.gate()
    with Listener(idle) as listener:
        connect(idle, HERE, listener.port)
        _, syn = listener.accepted()
        idle.until(gate.connects)
    assert len(syn) >= 40
    assert synopt.find(syn) is None


def test_only_the_syn_carries_the_option(watched):
    """Counted by nftables, in the namespace: SYNs and all other packets with option 253."""
    nft = topology.start(watched.name, ["nft", "-f", "-"], stdin=subprocess.PIPE, text=True)
    nft.communicate(COUNTERS)
    assert nft.returncode == 0
    code = CONNECT.replace(".close()", ".sendall(bytes(100_000))")
    with Listener(watched) as listener:
        connect(watched, HERE, listener.port, code=code)
        listener.accepted()
    command = ["nft", "list", "counters"]
    shown = topology.start(watched.name, command, stdout=subprocess.PIPE, text=True)
    out, _ = shown.communicate()
    found = [int(line.split()[1]) for line in out.splitlines() if "packets" in line]
    assert found == [1, 0]


def test_what_stays_on_the_host_is_nobodys_business(watched):
    gate = watched.gate()
    for address in ("127.0.0.1", "127.8.9.10", "::1"):
        with Listener(watched, address) as listener:
            connect(watched, address, listener.port)
            assert synopt.find(listener.accepted()[1]) is None
    with Listener(watched) as listener:
        connect(watched, HERE, listener.port)
        listener.accepted()
        (event,) = watched.until(gate.connects)
    assert event.dport == listener.port


def test_a_gates_own_sockets_are_left_alone(watched):
    """A gate is whoever is connected to the sensor's socket; here it sits in the same cgroup."""
    gate = watched.gate()
    code = f"""
import socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect({str(watched.settings.socket)!r})
s.recv(5)
{CONNECT}
"""
    with Listener(watched) as listener:
        connect(watched, HERE, listener.port, code=code)
        assert synopt.find(listener.accepted()[1]) is None
        other, _ = connect(watched, HERE, listener.port)
        assert synopt.find(listener.accepted()[1]) is not None
        watched.until(gate.connects)
    assert [event.tgid for event in gate.connects()] == [other]


def test_skipped_cgroups_are_left_alone(idle):
    below = idle.cgroup / "gate"
    below.mkdir()
    idle.start(skipped=(below,))
    gate = idle.gate()
    with Listener(idle) as listener:
        connect(idle, HERE, listener.port, cgroup=below)
        assert synopt.find(listener.accepted()[1]) is None
        other, _ = connect(idle, HERE, listener.port)
        idle.until(gate.connects)
    assert [event.tgid for event in gate.connects()] == [other]


def test_the_option_is_left_away_after_retries_and_the_connection_comes_about(idle):
    """A middlebox that drops SYNs with options that it does not know, made with nftables."""
    idle.start(give_up=0)
    rule = "add table ip box; add chain ip box in { type filter hook input priority 0; }; "
    rule += "add rule ip box in tcp option 253 exists drop"
    nft = topology.start(idle.name, ["nft", rule])
    assert nft.wait() == 0
    gate = idle.gate()
    with Listener(idle) as listener:
        connect(idle, HERE, listener.port)
        peer, syn = listener.accepted()
        (event,) = idle.until(gate.connects)
    assert synopt.find(syn) is None
    assert event.sport == peer[1]


def unanswered(watched, listener, source):
    """Let a process try to connect to a port whose SYNs are dropped; return it."""
    gate = watched.gate()
    process = watched.python(TRY, HERE, listener.port, source)
    watched.until(lambda: process.pid in [event.tgid for event in gate.connects()])
    return process


@pytest.fixture
def unheard(watched):
    """A sensor and a listener that no SYN reaches, as of a gate that is dead."""
    with Listener(watched) as listener:
        rule = "add table ip dead; add chain ip dead in { type filter hook input priority 0; }; "
        rule += f"add rule ip dead in tcp dport {listener.port} drop"
        assert topology.start(watched.name, ["nft", rule]).wait() == 0
        yield watched, listener


def test_a_gate_that_comes_later_is_told_who_still_connects_and_nobody_else(unheard):
    watched, dead = unheard
    process = unanswered(watched, dead, 3000)
    with Listener(watched) as listener:
        connect(watched, HERE, listener.port)
    (event,) = watched.gate().connects()
    assert (event.sport, event.tgid) == (3000, process.pid)
    assert topology.start(watched.name, ["nft", "flush ruleset"]).wait() == 0
    peer, _ = dead.accepted()
    assert peer[1] == 3000
    assert watched.gate().connects() == []


def test_of_two_who_tried_from_the_same_port_a_later_gate_hears_of_the_second(unheard):
    watched, dead = unheard
    first = unanswered(watched, dead, 3000)
    first.kill()
    first.wait()
    second = unanswered(watched, dead, 3000)
    (event,) = watched.gate().connects()
    assert event.tgid == second.pid


def test_gates_are_told_again_because_they_forget(unheard):
    watched, dead = unheard
    gate = watched.gate()
    unanswered(watched, dead, 3000)
    watched.sensor._again_at = time.monotonic()
    watched.until(lambda: len(gate.connects()) == 2)
    first, again = gate.connects()
    assert first == again
    assert topology.start(watched.name, ["nft", "flush ruleset"]).wait() == 0
    dead.accepted()
    watched.sensor._again_at = time.monotonic()
    watched.until(lambda: watched.sensor._again_at == 0)
    assert len(gate.connects()) == 2


def test_after_a_loss_a_later_gate_is_told_nothing_of_before(idle, tmp_path):
    idle.start(blob=small(tmp_path, "connect_ring"))
    with Listener(idle) as listener:
        rule = "add table ip dead; add chain ip dead in { type filter hook input priority 0; }; "
        rule += "add rule ip dead in tcp sport 3000 drop"
        assert topology.start(idle.name, ["nft", rule]).wait() == 0
        unanswered(idle, listener, 3000)
        assert [event.sport for event in idle.gate().connects()] == [3000]
        process = idle.spawn([sys.executable, "-c", CONNECT, HERE, listener.port, 100])
        assert process.wait() == 0  # and the sensor did not get its turn
        assert [event.sport for event in idle.gate().connects()] == []


def small(folder, ring):
    """Return a blob whose ring has one page."""
    blob = json.loads(BLOB.read_text())
    blob["maps"][ring]["entries"] = 4096
    path = folder / "small.blob"
    path.write_text(json.dumps(blob))
    return path


def test_events_that_find_no_room_are_counted_and_told(idle, tmp_path):
    idle.start(blob=small(tmp_path, "connect_ring"))
    gate = idle.gate()
    with Listener(idle) as listener:
        process = idle.spawn([sys.executable, "-c", CONNECT, HERE, listener.port, 100])
        assert process.wait() == 0  # and the sensor did not get its turn
        idle.until(gate.losses)
        lost = gate.losses()[-1]["connect_ring"]
        assert len(gate.connects()) + lost == 100
        assert len(gate.connects()) == 4096 // 120
        connect(idle, HERE, listener.port, 3)
        idle.until(lambda: len(gate.connects()) + lost == 103)


def test_a_record_that_found_no_room_is_made_up_for_by_its_first_connection(idle, tmp_path):
    idle.start(blob=small(tmp_path, "record_ring"))
    gate = idle.gate()
    with Listener(idle) as listener:
        argv = [sys.executable, "-c", CONNECT, HERE, listener.port, 1]
        processes = [idle.spawn(argv) for _ in range(10)]
        assert not any(process.wait() for process in processes)
        idle.until(lambda: len(gate.connects()) == 10)
    assert idle.until(gate.losses)[-1]["record_ring"] >= 6
    for event in gate.connects():
        owner = idle.until(lambda event=event: gate.owner(event.handle))
        assert owner["pid"] == event.tgid
        assert owner["argv"][1] == "-c"


def test_every_start_has_an_epoch_and_a_key_of_its_own(idle):
    seen = []
    for _ in range(3):
        idle.start()
        hello = idle.gate().bodies(Message.HELLO)[0]
        seen.append((idle.sensor._host.epoch, key(idle.sensor)))
        assert key(idle.sensor).hex() in hello.decode()
        idle.stop()
    assert seen[1][0] == (seen[0][0] + 1) % 4096
    assert len({k for _, k in seen}) == 3


def test_a_second_sensor_of_the_same_gate_does_not_start(watched):
    with pytest.raises(AlreadyRunning):
        Sensor(watched.settings)
    assert watched.gate()  # and the first is not disturbed


def test_the_settings_give_the_key_to_nobody_but_gates(watched):
    """The socket, and what it lies in, are root's."""
    assert watched.settings.socket.stat().st_mode & 0o777 == 0o600
    assert watched.settings.socket.parent.stat().st_mode & 0o777 == 0o700


def test_a_cgroup_that_is_not_there_stops_the_start(idle):
    with pytest.raises(OSError) as wrong:
        idle.start(cgroup=idle.cgroup / "absent")
    assert wrong.value.errno == errno.ENOENT
    idle.start()  # and the failed start left nothing locked


def links(pid):
    """Return the ids of a process' BPF links."""
    found = []
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):
            words = path.read_text().split()
            if "link_id:" in words:
                found.append(int(words[words.index("link_id:") + 1]))
    return found


def link_exists(number):
    libc = ctypes.CDLL(None, use_errno=True)
    attributes = ctypes.create_string_buffer(struct.pack("=I", number).ljust(152, b"\0"), 152)
    fd = libc.syscall(321, 30, attributes, 152)  # BPF_LINK_GET_FD_BY_ID
    if fd >= 0:
        os.close(fd)
        return True
    assert ctypes.get_errno() == errno.ENOENT
    return False


PROGRAM = """
import sys
from ipaddress import ip_network
from pathlib import Path
from ebpf.sensor import SensorSettings, run
cgroup, sock, blob = map(Path, sys.argv[1:])
sys.exit(run(SensorSettings(cgroup, sock, blob, (ip_network("198.51.100.0/24"),))))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_stays_attached_however_a_sensor_ends(idle, number):
    sock = idle.folder / "run" / "sensor.sock"
    argv = [sys.executable, "-c", PROGRAM, idle.cgroup, sock, BLOB]
    process = subprocess.Popen(argv, cwd=ROOT)
    end = time.monotonic() + 20
    while not sock.exists() or len(links(process.pid)) < 6:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    attached = links(process.pid)
    assert len(attached) == 6
    assert all(map(link_exists, attached))
    with Listener(idle) as listener:
        connect(idle, HERE, listener.port)
        assert synopt.find(listener.accepted()[1]) is not None
        process.send_signal(number)
        assert process.wait(20) == (-9 if number == signal.SIGKILL else 0)
        while any(map(link_exists, attached)):
            assert time.monotonic() < end
            time.sleep(0.02)
        connect(idle, HERE, listener.port)
        assert synopt.find(listener.accepted()[1]) is None
    assert sock.exists() == (number == signal.SIGKILL)


def test_without_fanotify_it_does_with_less(idle):
    """As root without CAP_SYS_ADMIN: programs are hashed while they run."""
    sock = idle.folder / "run" / "sensor.sock"
    argv = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", sys.executable]
    process = subprocess.Popen(
        [*argv, "-c", PROGRAM, idle.cgroup, sock, BLOB], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    try:
        idle.until(lambda: sock.exists() or process.poll() is not None)
        gate = Gate(sock, None)
        idle.spawn([sys.executable, "-c", "import time; time.sleep(0.5)"]).wait()
        owner = idle.until(lambda: [o for o in gate.owners() if o["exe_sha256"]])[-1]
        gate.close()
    finally:
        process.terminate()
        _, said = process.communicate()
    assert owner["how"] == "proc"
    assert "no fanotify" in said


def test_a_sensor_waits_without_looking(watched):
    """Nothing happens in its cgroup: it sleeps until something does."""
    assert watched.gate().connects() == []
    # Programs that others on this machine execute are noticed, and forgotten after 0.1 s.
    watched.until(lambda: watched.sensor._wait_s() == -1)


def test_settings_say_what_a_sensor_needs_at_least(tmp_path):
    settings = SensorSettings(tmp_path, tmp_path / "sensor.sock")
    assert settings.prefixes == settings.covers == settings.skipped == ()
    assert PREFIXES


def test_a_machine_that_lacks_something_ends_the_start_with_69_and_says_what(idle):
    argv = [sys.executable, "-c", PROGRAM, idle.cgroup / "absent", idle.folder / "s", BLOB]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 69
    assert "the sensor cannot start" in done.stderr
    assert "absent" in done.stderr


def test_a_blob_that_does_not_fit_is_replaced_by_bcc_on_the_spot(idle, tmp_path):
    (tmp_path / "old.blob").write_text("{}")
    idle.start(blob=tmp_path / "old.blob")
    assert idle.gate()


def test_without_bcc_a_blob_that_does_not_fit_stops_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(LoadError, match=r"no blob at .*; and BCC could not build one"):
        sensors.fitting(tmp_path / "absent")
