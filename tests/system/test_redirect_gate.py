"""The redirect with a real gate worker behind it, and the command line that drives both."""

import json
import shutil
import signal
import subprocess
import sys
import time
from operator import itemgetter
from pathlib import Path

import pytest
from netlink_killer import NetlinkKiller
from redirect_hosts import CLIENTS, Hosts, Server
from staging import end, wait_for

from appliance import live
from appliance.cli.outcome import FAILED, NOT_FOUND, OK, REFUSED, UNAVAILABLE
from appliance.lab import topology
from appliance.lab.topology import (
    CLIENT4,
    CLIENT6,
    GATE_CLIENT4,
    GATE_SERVER4,
    GATE_SERVER6,
    SERVER4,
    SERVER6,
)
from appliance.proxy import redirect
from capture.crypt import Keys
from capture.follow import Follower
from capture.frames import walk
from capture.records import KINDS, Decision, Flow, Gap, Refused, SessionOpen, decode
from capture.store import Store

pytestmark = pytest.mark.system


class Gate:
    """One gate worker on the middle host, its configuration and its evidence."""

    def __init__(self, hosts, state, run):
        self.hosts = hosts
        self.run = run
        self.config = hosts.config(f"""
[paths]
state = "{state}"
run = "{run}"
[gate]
connect_timeout_s = 2
[redirect]
{CLIENTS}
management = ["203.0.113.0/24"]
[[route]]
name = "best effort"
ports = [80, 8080]
on_failure = "bypass"
[[route]]
name = "datagrams"
protocol = "udp"
ports = [5000]
action = "allow"
[[route]]
name = "own"
ports = [81]
source = "gate"
[[route]]
name = "few"
ports = [8443]
""")
        self._process = None

    def start(self):
        self._process = self._started()
        wait_for(self._answers, what="the gate")

    def start_and_die(self, environment):
        """Start it in an environment that kills it, and wait for that."""
        self._process = self._started(env=environment)
        _, log = self._process.communicate(timeout=30)
        assert self._process.returncode == -signal.SIGKILL, log
        self._process = None

    def _started(self, **options):
        words = ["serve", "gate", "--worker", "0", "--config", self.config.file]
        argv = [sys.executable, "-m", "appliance", *words]
        gate = self.hosts.namespace("gate")
        return topology.start(gate, argv, stderr=subprocess.PIPE, text=True, **options)

    def _answers(self):
        assert self._process.poll() is None, self._process.stderr.read()
        try:
            return live.ask(self.run / "gate-0.sock", {"do": "stats"})
        except (OSError, ValueError):
            return None

    def stop(self, number=signal.SIGTERM):
        if self._process is not None:
            self._process.send_signal(number)
            try:
                _, self.log = self._process.communicate(timeout=20)
            finally:
                end(self._process)
                self._process = None

    def narrows(self, *words):
        argv = [sys.executable, "-m", "appliance", "redirect", *words, "--config", self.config.file]
        return self.hosts.program("gate", *argv)

    def records(self, kind):
        """Return the records of a type that are on disk, oldest first, as (stream, fields)."""
        store = Store(self.config.paths.state, self.config.paths.run)
        follower = Follower(store, Keys.load(self.config.paths.state))
        found = []
        while step := follower.step():
            for one in step:
                for number, _, time_ns, _, payload, _ in walk(one.plaintext, one.incarnation):
                    if number == KINDS[kind]:
                        found.append((time_ns, one.stream, decode(number, payload)))
        follower.close()
        return [(stream, fields) for _, stream, fields in sorted(found, key=itemgetter(0))]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    made = Hosts(tmp_path_factory.mktemp("redirect"))
    try:
        made.up()
        with Server(made, 80, 81, 8443, udp=[5000]):
            yield made
    finally:
        made.down()


@pytest.fixture
def gate(hosts):
    """A gate that is not started, with nothing applied."""
    hosts.gate(redirect.undo)
    folders = [Path(place, hosts.namespace("gate")) for place in ("/var/tmp", "/dev/shm")]
    made = Gate(hosts, *folders)
    try:
        yield made
    finally:
        made.stop(signal.SIGKILL)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def test_the_gate_starts_and_stops_without_any_redirect(gate):
    gate.start()
    gate.stop()
    assert "Traceback" not in gate.log
    assert gate.records(Gap) == []


def test_a_session_passes_the_gate_with_the_address_that_its_route_says(gate, hosts):
    assert gate.narrows("apply").returncode == OK
    gate.start()
    for address in (SERVER4, SERVER6):
        client = CLIENT6 if ":" in address else CLIENT4
        assert hosts.connect(address, 80, wait_s=5) == f"server {client}"
        gates = GATE_SERVER6 if ":" in address else GATE_SERVER4
        assert hosts.connect(address, 81, wait_s=5) == f"server {gates}"
    gate.stop()
    opened = [fields for _, fields in gate.records(SessionOpen)]
    assert {(o["client"], o["target"], o["target_port"], o["source"]) for o in opened} == {
        (CLIENT4, SERVER4, 80, "client"),
        (CLIENT4, SERVER4, 81, "gate"),
        (CLIENT6, SERVER6, 80, "client"),
        (CLIENT6, SERVER6, 81, "gate"),
    }


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        (GATE_CLIENT4, "own-address"),
        (GATE_SERVER6, "own-address"),
        ("203.0.113.2", "management"),
        ("169.254.7.7", "link-local"),
        (SERVER4, "no-route"),
    ],
)
def test_a_way_into_the_gate_or_past_it_is_refused_and_recorded(gate, hosts, address, reason):
    gate.narrows("apply")
    gate.start()
    port = 22 if reason == "no-route" else 8443
    assert hosts.connect(address, port, wait_s=5) == "reset"
    gate.stop()
    client = CLIENT6 if ":" in address else CLIENT4
    ((_, refused),) = gate.records(Refused)
    assert (refused["client"], refused["target"], refused["target_port"], refused["reason"]) == (
        client, address, port, reason,
    )  # fmt: skip
    assert len(refused["reference"]) == 13


def test_what_passed_while_the_gate_was_dead_is_a_gap_of_the_next_one(gate, hosts):
    gate.narrows("apply")
    gate.start()
    gate.stop(signal.SIGKILL)
    dead = time.time_ns()
    assert hosts.connect(SERVER4, 80) == f"server {CLIENT4}"
    assert hosts.connect(SERVER4, 8443) == "lost"
    packets = sum(
        n for k, n in hosts.counts().items() if k in ("bypass.best effort", "answer.best effort")
    )
    again = time.time_ns()
    gate.start()
    wait_for(lambda: hosts.counts()["bypass.best effort"] == 0, what="the settling")
    gate.stop()
    ((stream, gap),) = gate.records(Gap)
    assert (stream, gap["scope"], gap["reason"], gap["detail"]) == (
        "gate-0", "route", "bypass", "best effort",
    )  # fmt: skip
    assert gap["packets"] == packets > 6
    assert dead - 20_000_000 <= gap["since"] <= again <= gap["until"]
    assert gap["bytes_up"] > 0 < gap["bytes_down"]


def test_a_gate_that_dies_before_a_bypass_is_settled_loses_nothing_of_it(gate, hosts, tmp_path):
    """Record and counters are both there: it is told again, from the same time on, as a whole."""
    gate.narrows("apply")
    assert hosts.connect(SERVER4, 80) == f"server {CLIENT4}"
    gate.start_and_die(NetlinkKiller(tmp_path).environment(1))
    assert hosts.counts()["bypass.best effort"] > 0
    assert hosts.connect(SERVER4, 80) == f"server {CLIENT4}"
    gate.start()
    wait_for(lambda: hosts.counts()["bypass.best effort"] == 0, what="the settling")
    gate.stop()
    first, again = (gap for _, gap in gate.records(Gap) if gap["reason"] == "bypass")
    assert abs(first["since"] - again["since"]) < 20_000_000  # the kernel's timers are that exact
    assert again["packets"] >= 2 * first["packets"] > 6


def test_flows_are_recorded_at_the_stop_at_the_latest(gate, hosts):
    gate.narrows("apply")
    gate.start()
    for _ in range(7):
        assert hosts.datagram(SERVER4, 5000) == "answer 4"
    gate.stop()
    ((_, flow),) = gate.records(Flow)
    assert (flow["client"], flow["protocol"], flow["port"]) == (CLIENT4, "udp", 5000)
    assert (flow["packets"], flow["bytes"]) == (14, 7 * 32 + 7 * 36)
    assert flow["since"] < flow["until"]


def test_flows_and_bypasses_that_nobody_recorded_are_recorded_by_undo(gate, hosts):
    gate.narrows("apply")
    hosts.datagram(SERVER4, 5000)
    assert hosts.connect(SERVER4, 80) == f"server {CLIENT4}"
    done = gate.narrows("undo")
    assert (done.returncode, done.stderr) == (OK, "")
    assert done.stdout.splitlines()[0] == "remove table inet narrows"
    ((stream, flow),) = gate.records(Flow)
    assert (stream, flow["packets"]) == ("cli", 2)
    ((_, gap),) = gate.records(Gap)
    assert gap["packets"] > 6
    decided = [fields for _, fields in gate.records(Decision)]
    assert [d["action"] for d in decided] == ["redirect-apply", "redirect-undo"]
    assert decided[0]["actor"].startswith("uid:0(root)")
    assert hosts.connect(SERVER4, 22) == "refused"  # by the server: the way is open


def test_undo_is_refused_while_it_cannot_be_recorded(gate, hosts):
    gate.narrows("apply")
    segments = Store(gate.config.paths.state, gate.config.paths.run).segments
    shutil.rmtree(segments)
    segments.write_text("in the way")
    done = gate.narrows("undo")
    assert done.returncode == REFUSED
    assert "--unrecorded" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert hosts.connect(SERVER4, 8443) == "lost"
    assert gate.narrows("status").returncode == OK
    assert gate.narrows("undo", "--unrecorded").returncode == OK
    assert hosts.connect(SERVER4, 8443) == f"server {CLIENT4}"


def test_the_gate_leaves_the_counts_alone_while_somebody_undoes(gate, hosts):
    gate.narrows("apply")
    gate.start()
    with redirect.alone(gate.config.paths.run, wait=True) as mine:
        assert mine
        hosts.datagram(SERVER4, 5000)
        gate.stop()
    assert gate.records(Flow) == []
    gate.start()
    gate.stop()
    assert [fields["packets"] for _, fields in gate.records(Flow)] == [2]


def test_the_command_line_plans_applies_shows_and_undoes(gate):
    assert gate.narrows("status").returncode == NOT_FOUND
    planned = gate.narrows("plan", "--json")
    assert planned.returncode == OK
    steps = json.loads(planned.stdout)["steps"]
    assert [step["step"] for step in steps] == [
        "put the guard in place",
        "write table inet narrows",
    ]
    assert "add IPv4 rule 103: from 192.0.2.0/24 unreachable (guard)" in steps[0]["details"]
    assert gate.narrows("status").returncode == NOT_FOUND
    assert json.loads(gate.narrows("apply", "--json").stdout)["steps"] == steps
    assert gate.narrows("apply").stdout == "nothing changed\n"
    assert gate.narrows("plan").stdout == "nothing to change\n"
    shown = gate.narrows("status", "--json")
    assert shown.returncode == OK
    status = json.loads(shown.stdout)
    assert (status["state"], status["missing"], status["problems"]) == ("in place", [], [])
    assert status["counters"]["redirected"] == {"packets": 0, "bytes": 0}
    gate.hosts.nft("flush", "ruleset")
    partly = gate.narrows("status")
    assert (partly.returncode, partly.stdout.splitlines()[0]) == (FAILED, "partly in place")
    assert gate.narrows("apply").returncode == OK
    assert gate.narrows("undo").returncode == OK
    assert gate.narrows("undo").stdout == "nothing to undo\n"
    assert gate.narrows("status").stdout.splitlines()[0] == "not in place"


def test_the_command_line_says_what_would_keep_sessions_from_working(gate, hosts):
    hosts.sysctl("gate", "ipv4/ip_forward", "0")
    try:
        done = gate.narrows("apply")
        assert done.returncode == OK
        assert "net.ipv4.ip_forward is 0" in done.stderr
        assert json.loads(gate.narrows("status", "--json").stdout)["problems"]
    finally:
        hosts.sysctl("gate", "ipv4/ip_forward", "1")


def test_without_privileges_the_command_line_says_so_in_one_line(gate):
    gate.run.mkdir()
    config = gate.run / "narrows.toml"
    config.write_text("")
    # Imported first: others may not be able to read the folder that this runs in.
    code = "import os, sys; from appliance.cli import main, redirect; os.seteuid(65534); "
    words = ["redirect", "plan", "--config", str(config)]
    argv = [sys.executable, "-c", f"{code}sys.exit(main({words!r}))"]
    gate.run.chmod(0o755)
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == UNAVAILABLE
    assert done.stderr == "narrows: redirect plan needs root (sudo narrows ...)\n"


def test_a_rule_set_that_somebody_removed_is_a_gap(gate, hosts):
    gate.narrows("apply")
    hosts.nft("flush", "ruleset")
    assert gate.narrows("apply").returncode == OK
    ((stream, gap),) = gate.records(Gap)
    assert (stream, gap["scope"], gap["reason"]) == ("cli", "flow", "counts-lost")
    hosts.nft("flush", "ruleset")
    gate.start()
    gate.stop()
    assert [stream for stream, _ in gate.records(Gap)] == ["cli", "gate-0"]
    assert "narrows redirect apply" in gate.log
    assert hosts.connect(SERVER4, 80) not in ("lost", f"server {CLIENT4}")


def test_an_address_that_the_gate_is_given_later_is_refused_too(gate, hosts):
    gate.narrows("apply")
    gate.start()
    hosts.ip("addr add 198.51.100.99/24 dev server0")
    try:
        with Server(hosts, 81, addresses=["198.51.100.99"], role="gate"):
            wait_for(lambda: hosts.connect("198.51.100.99", 81) == "reset", what="a refusal")
    finally:
        hosts.ip("addr del 198.51.100.99/24 dev server0")
    gate.stop()
    assert [fields["reason"] for _, fields in gate.records(Refused)] == ["own-address"]
