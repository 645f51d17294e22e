"""What happens when the gate is dead, the rules are gone, or a change was cut off in the middle."""

import json
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from redirect_hosts import (
    CLIENTS,
    EVERYTHING,
    HOSTS,
    SERVERS,
    Capture,
    Hosts,
    Listener,
    Server,
    inject,
    ip_packet,
    is_segment,
    name,
    tcp_segment,
)
from staging import wait_for

from appliance.lab import topology
from appliance.lab.topology import CLIENT4, SERVER4
from appliance.proxy import redirect
from appliance.proxy.redirect import nft, routing, rules

pytestmark = pytest.mark.system

MIXED = f"""
[redirect]
{CLIENTS}
bypass = ["203.0.113.0/24"]
[[route]]
name = "best effort"
ports = [80, 8080]
on_failure = "bypass"
[[route]]
name = "names"
protocol = "udp"
ports = [53]
action = "allow"
[[route]]
name = "rest"
"""
#: Redirects another subnet as well, and one that is there no longer.
OTHER = MIXED.replace('"192.0.2.0/24"', '"192.0.2.0/24", "10.44.0.0/16"')
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


def outcomes(hosts):
    """Return the ways that connections to a bypassable and to another port go, by IP version."""
    return {hosts.connect(address, port).split()[0] for address in SERVERS for port in (80, 81)}


def dump(hosts, *, handles=False):
    """Return all rules and routes of the gate's kernel as other tools show them, without counts.

    Rules keep their order in a chain; the order of chains and sets means nothing.
    """
    listed = json.loads(hosts.nft("-j", "-a", "list", "ruleset"))["nftables"]
    shown = {}
    for item in listed:
        ((kind, about),) = item.items()
        about = {k: v for k, v in about.items() if handles or k != "handle"}
        text = re.sub(r'"(packets|bytes|expires)": \d+', "", json.dumps(about))
        place = (kind, about.get("table"), about.get("chain")) if kind == "rule" else (kind, text)
        shown.setdefault(place, []).append(text)
    for words in ("-4 rule", "-6 rule", "-4 route show table all", "-6 route show table all"):
        lines = [re.sub(r" expires \d+sec", "", line) for line in hosts.ip(words).splitlines()]
        shown[words] = sorted(lines) if "route" in words else lines
    return shown


@pytest.mark.parametrize("text", [EVERYTHING, MIXED])
def test_a_flushed_ruleset_fails_closed_with_and_without_a_gate(bare, text):
    bare.apply(text)
    bare.nft("flush", "ruleset")
    with Capture(bare, "server") as capture:
        assert not {"gate", "server"} & outcomes(bare)
        assert not capture.packets(lambda packet: is_segment(packet, 80), wait_s=0)
    with Listener(bare) as listener:
        assert not {"gate", "server"} & outcomes(bare)
        assert not listener.seen
        bare.apply(text)
        assert outcomes(bare) == {"gate"}


def test_without_a_gate_redirected_connections_are_lost(bare):
    bare.apply()
    assert outcomes(bare) == {"lost"}
    assert bare.counts()["dropped"] > 0


def test_without_a_gate_only_a_route_that_says_so_is_bypassed(bare):
    bare.apply(MIXED)
    for client, address in HOSTS:
        assert bare.connect(address, 80) == f"server {client}"
        assert bare.connect(address, 81) == "lost"
    with Listener(bare):
        assert outcomes(bare) == {"gate"}


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
        with_gate = outcomes(hosts)
    return "server" not in with_gate | {hosts.connect(address, 81) for address in SERVERS}


@pytest.mark.parametrize("steps", [1, 2])
def test_a_first_apply_that_is_cut_off_leaves_nothing_open(bare, steps):
    text = bare.config(MIXED).file
    assert interrupted(bare, text, steps) == 2
    assert closed_or_working(bare)
    bare.apply(MIXED)
    with Listener(bare):
        assert outcomes(bare) == {"gate"}


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@pytest.mark.parametrize(("before", "after"), [(MIXED, EVERYTHING), (OTHER, MIXED)])
def test_a_change_that_is_cut_off_leaves_nothing_open(bare, before, after, steps):
    bare.apply(before)
    assert interrupted(bare, bare.config(after).file, steps) <= 3
    assert closed_or_working(bare)
    bare.apply(after)
    with Listener(bare):
        assert outcomes(bare) == {"gate"}


@pytest.mark.parametrize("steps", [0, 1])
def test_an_undo_that_is_cut_off_leaves_nothing_open(bare, steps):
    bare.apply(MIXED)
    assert interrupted(bare, "undo", steps) == 2
    assert closed_or_working(bare)


def test_undo_opens_the_way_in_its_last_step_only(bare):
    bare.apply(MIXED)
    assert interrupted(bare, "undo", 2) == 2
    assert outcomes(bare) == {"server"}
    assert bare.gate(redirect.undo) == []


def test_a_process_killed_at_any_moment_leaves_nothing_open(bare):
    config = bare.config(MIXED).file
    dice = random.Random(5)
    before = "undone"
    for _ in range(12):
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


def test_applying_again_changes_nothing(bare):
    bare.apply(MIXED)
    first = dump(bare, handles=True)
    assert bare.gate(redirect.apply, bare.config(MIXED)) == []
    assert dump(bare, handles=True) == first


def test_tables_rules_and_routes_of_others_stay_as_they_are(bare):
    bare.nft(
        "add table inet other; add set inet other s { type ipv4_addr; };"
        "add element inet other s { 10.0.0.1 };"
        "add chain inet other c { type filter hook prerouting priority -200; };"
        "add rule inet other c ip saddr @s counter drop;"
        "add table ip narrows; add chain ip narrows x { type filter hook input priority 0; }"
    )
    for words in (
        "-4 rule add pref 90 from 10.9.0.0/16 lookup 900",
        "-4 rule add pref 102 from 10.8.0.0/16 lookup 900",
        "-6 rule add pref 200 from 2001:db8:77::/64 lookup 900",
        "-4 route add 10.7.0.0/16 dev server0 table 7100",
        "-4 route add 10.6.0.0/16 dev server0 table 900",
    ):
        bare.ip(words)
    try:
        before = dump(bare, handles=True)
        bare.apply(MIXED)
        during = dump(bare, handles=True)
        for place, lines in before.items():
            assert [line for line in during[place] if line in lines] == lines
        bare.apply(OTHER)
        bare.gate(redirect.undo)
        assert dump(bare, handles=True) == before
    finally:
        bare.nft("flush", "ruleset")
        for words in (
            "-4 rule del pref 90", "-4 rule del pref 102", "-6 rule del pref 200",
            "-4 route flush table 7100", "-4 route flush table 900",
        ):  # fmt: skip
            bare.ip(words)


def first_handle(hosts, chain):
    listed = json.loads(hosts.nft("-j", "-a", "list", "chain", "inet", "narrows", chain))
    return str(next(item["rule"]["handle"] for item in listed["nftables"] if "rule" in item))


DAMAGE = {
    "a rule deleted": lambda h: h.nft(
        "delete", "rule", "inet", "narrows", "from4", "handle", first_handle(h, "from4")
    ),
    "the way to the listener deleted": lambda h: h.nft(
        "delete", "rule", "inet", "narrows", "tcp4", "handle", first_handle(h, "tcp4")
    ),
    "a rule added": lambda h: h.nft("insert", "rule", "inet", "narrows", "from4", "accept"),
    "a chain emptied": lambda h: h.nft("flush", "chain", "inet", "narrows", "pre"),
    "a client subnet deleted": lambda h: h.nft("flush", "set", "inet", "narrows", "clients4"),
    "a destination added to the list": lambda h: h.nft(
        "add", "element", "inet", "narrows", "bypass4", "{ 198.51.100.0/24 }"
    ),
    "a chain and a set added": lambda h: h.nft(
        "add chain inet narrows x; add set inet narrows y { type ipv4_addr; }"
    ),
    "the table asleep": lambda h: h.nft("add table inet narrows { flags dormant; }"),
    "the table deleted": lambda h: h.nft("delete", "table", "inet", "narrows"),
    "an IPv6 table only": lambda h: h.nft(
        "delete table inet narrows; add table inet narrows; add chain inet narrows to6"
    ),
    **{
        f"policy rule {number} of IPv{version} deleted": (
            lambda h, v=version, n=number: h.ip(f"-{v} rule del pref {n}")
        )
        for version in (4, 6)
        for number in range(100, 106)
    },
    "a policy rule twice": lambda h: h.ip(
        "rule add pref 103 from 10.55.0.0/16 unreachable protocol 78"
    ),
    "the local route deleted": lambda h: h.ip("route flush table 7100"),
    "everything flushed": lambda h: (
        h.nft("flush", "ruleset"), h.ip("rule flush"),
        h.ip("rule add pref 32766 lookup main"),
        h.ip("rule add pref 32767 lookup default"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_any_half_state_is_seen_and_repaired(bare, damage):
    config = bare.apply(MIXED)
    whole = dump(bare)
    DAMAGE[damage](bare)
    assert bare.gate(redirect.plan, config)
    assert bare.gate(redirect.apply, config)
    assert dump(bare) == whole
    assert bare.gate(redirect.plan, config) == []


def test_a_plan_is_overtaken_by_another_change_and_made_anew(bare):
    bare.apply(MIXED)
    old = bare.gate(nft.read, rules.TABLE)
    bare.apply(OTHER)
    shown = dump(bare, handles=True)
    table = rules.build(bare.config(MIXED), ["client0"], "a")
    with pytest.raises(nft.Overtaken):
        bare.gate(nft.replace, table, old)
    with pytest.raises(nft.Overtaken):
        bare.gate(nft.replace, table, nft.Applied(rules.TABLE, False, False, {}, {}, {}, {}))
    assert dump(bare, handles=True) == shown
    assert bare.gate(redirect.apply, bare.config(MIXED))


def test_thousands_of_networks_and_hundreds_of_routes_are_applied_at_once(bare):
    networks = [f"10.{n // 200}.{n % 200}.0/25" for n in range(4000)]
    networks += [f"2001:db8:{n:x}::/64" for n in range(0x1000, 0x1400)]
    clients = ", ".join([CLIENTS.split("[", 1)[1].rsplit("]", 1)[0],
                         *(f'"172.16.{n}.0/25"' for n in range(250))])  # fmt: skip
    routes = "".join(f'[[route]]\nname = "r{n}"\nports = [{n}]\n' for n in range(1000, 1150))
    text = f"[redirect]\nclients = [{clients}]\nbypass = {json.dumps(networks)}\n{routes}"
    config = bare.apply(text)
    assert bare.gate(redirect.plan, config) == []
    with Listener(bare):
        assert bare.connect(SERVER4, 1149) == f"gate {name(SERVER4, 1149)}"


def test_a_kernel_that_refuses_is_a_redirect_error_that_says_what(bare):
    text = f'[redirect]\n{CLIENTS}[[route]]\nname = "{"x" * 300}"\non_failure = "bypass"\n'
    with pytest.raises(redirect.RedirectError, match="write table inet narrows"):
        bare.apply(text)
    assert "server" not in outcomes(bare)
