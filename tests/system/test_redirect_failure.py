"""What happens when the gate is dead, the rules are gone, or a change was cut off in the middle."""

import random
import signal
import socket
import subprocess
import sys
import time

import pytest
from redirect_hosts import (
    EVERYTHING,
    HOSTS,
    LOST_S,
    MIXED,
    OTHER,
    SERVERS,
    Capture,
    Hosts,
    Listener,
    Server,
    full_socket,
    inject,
    ip_packet,
    is_segment,
    tcp_segment,
)
from staging import wait_for

from appliance.lab import topology
from appliance.lab.topology import CLIENT4, SERVER4
from appliance.proxy import redirect
from appliance.proxy.listener import open_listener
from appliance.proxy.redirect import nft, routing, rules

pytestmark = pytest.mark.system

STEPS = """
import os, signal, sys
from pathlib import Path
from appliance.config import load
from appliance.proxy import redirect
steps = redirect.undo_steps() if sys.argv[1] == "undo" else redirect.plan(load(Path(sys.argv[1])))
for step in steps[: int(sys.argv[2])]:
    step.run()
print(len(steps), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
APPLY = """
import sys
from pathlib import Path
from appliance.config import load
from appliance.proxy import redirect
config = load(Path(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
redirect.apply(config) if sys.argv[1] == "apply" else redirect.undo()
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    made = Hosts(tmp_path_factory.mktemp("redirect"))
    try:
        made.up()
        with Server(made, 80, 81):
            yield made
    finally:
        made.down()


@pytest.fixture
def bare(hosts):
    """The hosts without anything applied."""
    hosts.gate(redirect.undo)
    return hosts


@pytest.mark.parametrize("text", [EVERYTHING, MIXED])
def test_a_flushed_ruleset_fails_closed_with_and_without_a_gate(bare, text):
    bare.apply(text)
    bare.nft("flush", "ruleset")
    with Capture(bare, "server") as capture:
        assert not {"gate", "server"} & bare.outcomes()
        assert not capture.packets(lambda packet: is_segment(packet, 80), wait_s=0)
    with Listener(bare) as listener:
        assert not {"gate", "server"} & bare.outcomes()
        assert not listener.seen
        bare.apply(text)
        assert bare.outcomes() == {"gate"}


def test_without_a_gate_redirected_connections_are_lost(bare):
    bare.apply()
    assert bare.outcomes() == {"lost"}
    assert bare.counts()["dropped"] > 0


def test_without_a_gate_only_a_route_that_says_so_is_bypassed(bare):
    bare.apply(MIXED)
    for client, address in HOSTS:
        assert bare.connect(address, 80) == f"server {client}"
        assert bare.connect(address, 81) == "lost"
    with Listener(bare):
        assert bare.outcomes() == {"gate"}


def test_a_connection_of_a_bypass_ends_when_the_gate_is_back(bare):
    bare.apply(MIXED)
    with bare.on("server", socket.create_server, (SERVER4, 8080)) as server:
        client = bare.on("client", socket.create_connection, (SERVER4, 8080), 2)
        near, _ = server.accept()
        with client, near:
            client.send(b"x")
            assert near.recv(1) == b"x"
            with Listener(bare):
                client.send(b"y")
                with pytest.raises(ConnectionResetError):
                    client.recv(1)
                near.settimeout(LOST_S)
                with pytest.raises(TimeoutError):
                    near.recv(1)


def test_a_running_session_outlives_other_rules_and_goes_on_after_a_flush(bare):
    bare.apply(EVERYTHING)
    with full_socket(bare.gate(open_listener, socket.AF_INET, 15001)) as listener:
        listener.settimeout(2)
        client = bare.on("client", socket.create_connection, (SERVER4, 80), 2)
        near, _ = listener.accept()
        with client, near:
            near.settimeout(5)
            bare.apply(MIXED)
            client.send(b"1")
            assert near.recv(1) == b"1"
            bare.nft("flush", "ruleset")
            client.send(b"2")
            near.send(b"3")
            bare.apply(MIXED)
            assert near.recv(1) == b"2"
            assert client.recv(1) == b"3"


def shoot(hosts, count, client=CLIENT4, address=SERVER4):
    """Send segments that the server answers with as many resets, and wait for these."""
    answers = hosts.counts()["answer.best effort"]
    for number in range(count):
        segment = tcp_segment(client, address, (4000 + number, 8080), flags=0x10)
        inject(hosts, "client", address, ip_packet(client, address, 6, segment))
    wait_for(lambda: hosts.counts()["answer.best effort"] == answers + count)


@pytest.mark.parametrize(("client", "address"), HOSTS)
def test_what_passed_without_a_gate_becomes_one_gap_with_its_interval(bare, client, address):
    bare.apply(MIXED)
    assert bare.gate(redirect.bypass_gaps) == []
    first = time.time_ns()
    shoot(bare, 7, client, address)
    time.sleep(0.05)
    (gap,) = bare.gate(redirect.bypass_gaps)
    size = 60 if ":" in client else 40
    assert (gap.scope, gap.reason, gap.detail) == ("route", "bypass", "best effort")
    assert (gap.packets, gap.bytes_up, gap.bytes_down) == (14, 7 * size, 7 * size)
    clock = 20_000_000  # the kernel's timers are that exact
    assert first - clock <= gap.since <= gap.until - 50_000_000 + clock
    assert gap.until <= time.time_ns()


def test_a_bypass_is_settled_without_loss_and_without_counting_twice(bare):
    bare.apply(MIXED)
    shoot(bare, 3)
    gaps = bare.gate(redirect.bypass_gaps)
    assert [gap.packets for gap in gaps] == [6]
    shoot(bare, 2)  # after they were read and before they are settled
    (late,) = bare.gate(redirect.settle_bypass, gaps)
    assert (late.packets, late.bytes_up, late.bytes_down) == (4, 80, 80)
    assert late.since == gaps[0].until
    assert bare.gate(redirect.bypass_gaps) == []
    time.sleep(0.05)
    shoot(bare, 1)
    (later,) = bare.gate(redirect.bypass_gaps)
    assert later.packets == 2
    assert later.since > late.until


def test_counts_of_a_bypass_outlive_another_configuration(bare):
    bare.apply(MIXED)
    shoot(bare, 5)
    bare.apply(OTHER.replace("best effort", "renamed"))
    (gap,) = bare.gate(redirect.bypass_gaps)
    assert (gap.detail, gap.packets) == ("best effort", 10)
    assert gap.since > 0


def test_without_a_redirect_there_is_nothing_to_record(bare):
    assert bare.gate(redirect.bypass_gaps) == []
    assert bare.gate(redirect.settle_bypass, []) == []


def interrupted(hosts, what, steps):
    """Run the first steps of a change in a process that then dies; return how many there were."""
    done = hosts.program("gate", sys.executable, "-c", STEPS, str(what), str(steps))
    assert done.returncode == -signal.SIGKILL, done.stderr
    return int(done.stdout)


def closed_or_working(hosts):
    """Say whether no connection reaches a server around the gate, with a gate and without one."""
    with Listener(hosts):
        with_gate = hosts.outcomes()
    return "server" not in with_gate | {hosts.connect(address, 81) for address in SERVERS}


@pytest.mark.parametrize("steps", [1, 2])
def test_a_first_apply_that_is_cut_off_leaves_nothing_open(bare, steps):
    text = bare.config(MIXED).file
    assert interrupted(bare, text, steps) == 2
    assert closed_or_working(bare)
    bare.apply(MIXED)
    with Listener(bare):
        assert bare.outcomes() == {"gate"}


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize(("before", "after"), [(MIXED, EVERYTHING), (OTHER, MIXED)])
def test_a_change_that_is_cut_off_leaves_nothing_open(bare, before, after, steps):
    bare.apply(before)
    assert interrupted(bare, bare.config(after).file, steps) <= 3
    assert closed_or_working(bare)
    bare.apply(after)
    with Listener(bare):
        assert bare.outcomes() == {"gate"}


@pytest.mark.parametrize("steps", [0, 1])
def test_an_undo_that_is_cut_off_leaves_nothing_open(bare, steps):
    bare.apply(MIXED)
    assert interrupted(bare, "undo", steps) == 2
    assert closed_or_working(bare)


def test_undo_opens_the_way_in_its_last_step_only(bare):
    bare.apply(MIXED)
    assert interrupted(bare, "undo", 2) == 2
    assert bare.outcomes() == {"server"}
    assert bare.gate(redirect.undo) == []


def test_a_process_killed_at_any_moment_leaves_nothing_open(bare):
    config = bare.config(MIXED).file
    dice = random.Random(5)
    before = "undone"
    for _ in range(8):
        what = "undo" if before == "applied" else "apply"
        process = topology.start(
            bare.namespace("gate"), [sys.executable, "-c", APPLY, what, config],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        with process:
            process.stdout.readline()
            process.stdin.write(b"\n")
            process.stdin.flush()
            time.sleep(dice.uniform(0, 0.06))
            process.kill()
        guarded = bool(bare.gate(routing.present))
        if guarded:
            assert closed_or_working(bare)
        else:  # not begun, or undone to the end
            assert not bare.gate(nft.exists, rules.TABLE)
        before = "applied" if guarded else "undone"
