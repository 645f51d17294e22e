"""What is not TCP and passes is counted: exactly, once, and within bounds."""

import asyncio
import ipaddress
import socket
import threading
import time
from collections import Counter

import pytest
from redirect_hosts import CLIENTS, HOSTS, SERVERS, Hosts, Server, family

from appliance.lab.topology import CLIENT4, SERVER4
from appliance.proxy import redirect
from appliance.proxy.redirect import rules

pytestmark = pytest.mark.system

ALLOWED = f"""
[redirect]
{CLIENTS}
quic_reject = false
[[route]]
name = "datagrams"
protocol = "udp"
action = "allow"
[[route]]
name = "tunnels"
protocol = "47"
action = "allow"
[[route]]
name = "ping"
protocol = "icmp"
action = "allow"
"""
CLOCK = 20_000_000  # the kernel's timers are that exact


@pytest.fixture(scope="module")
def module_hosts(tmp_path_factory):
    made = Hosts(tmp_path_factory.mktemp("redirect"))
    try:
        made.up()
        yield made
    finally:
        made.down()


@pytest.fixture
def hosts(module_hosts):
    """The hosts with the redirect applied and nothing counted."""
    module_hosts.gate(redirect.undo)
    module_hosts.apply(ALLOWED)
    return module_hosts


def turn(hosts, record=lambda flow: None):
    """Record flows as the gate does; return them."""
    found = []

    def note(flow):
        record(flow)
        found.append(flow)

    hosts.gate(lambda: asyncio.run(redirect.record_flows(redirect.FlowMeter(), note)))
    return found


def send(hosts, address, port, count, size=100):
    with hosts.socket("client", address, socket.SOCK_DGRAM) as sock:
        for _ in range(count):
            sock.sendto(bytes(size), (address, port))


def totals(flows):
    """Return packets and bytes by client, protocol and port."""
    packets, size = Counter(), Counter()
    for flow in flows:
        packets[flow.client, flow.protocol, flow.port] += flow.packets
        size[flow.client, flow.protocol, flow.port] += flow.bytes
    return {key: (packets[key], size[key]) for key in packets}


@pytest.mark.parametrize(("client", "address"), HOSTS)
def test_datagrams_are_counted_exactly_with_their_interval(hosts, client, address):
    head = 48 if ":" in address else 28
    first = time.time_ns()
    send(hosts, address, 5000, 37, 100)
    send(hosts, address, 5001, 11, 900)
    last = time.time_ns()
    time.sleep(0.05)
    flows = [flow for flow in turn(hosts) if flow.protocol == "udp"]
    assert totals(flows) == {
        (client, "udp", 5000): (37, 37 * (100 + head)),
        (client, "udp", 5001): (11, 11 * (900 + head)),
    }
    for flow in flows:
        assert first - CLOCK <= flow.since <= last + CLOCK
        assert last < flow.until <= time.time_ns()
    assert turn(hosts) == []


@pytest.mark.parametrize(("client", "address"), HOSTS)
def test_answers_are_counted_under_the_clients_port(hosts, client, address):
    with Server(hosts, udp=[5300]):
        for _ in range(5):
            assert hosts.datagram(address, 5300) == "answer 4"
    head = 48 if ":" in address else 28
    assert totals(turn(hosts)) == {(client, "udp", 5300): (10, 5 * (head + 4) + 5 * (head + 8))}


@pytest.mark.parametrize(("client", "address"), HOSTS)
def test_a_protocol_without_ports_is_counted_without_one(hosts, client, address):
    with hosts.on("client", socket.socket, family(address), socket.SOCK_RAW, 47) as sock:
        for _ in range(6):
            sock.sendto(bytes(20), (address, 0))
    found = totals(turn(hosts))
    assert found[client, "47", 0] == (6, 6 * (60 if ":" in address else 40))


def test_an_error_that_comes_back_is_counted_as_icmp(hosts):
    assert hosts.datagram(SERVER4, 6000) == "rejected"
    assert totals(turn(hosts)) == {
        (CLIENT4, "udp", 6000): (1, 32),
        (CLIENT4, "icmp", 0): (1, 60),
    }


def test_nothing_is_lost_or_counted_twice_while_the_sets_are_turned(hosts):
    count, flows = 2500, []

    def flood(address, port):
        with hosts.socket("client", address, socket.SOCK_DGRAM) as sock:
            for _ in range(count):
                sock.sendto(bytes(10), (address, port))
                time.sleep(0.0001)

    with Server(hosts, udp=[7000, 7001, 7002]) as server:
        threads = [
            threading.Thread(target=flood, args=(address, 7000 + n))
            for n, address in enumerate([*SERVERS, SERVER4])
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            flows += turn(hosts)
        sent = 3 * count
        deadline = time.monotonic() + 5
        while len(server.seen) < sent and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
    flows += turn(hosts)
    flows += turn(hosts)
    found = totals(flow for flow in flows if flow.protocol == "udp")
    answers = len(server.seen)
    assert sum(packets for packets, _ in found.values()) == sent + answers
    assert len({flow.until for flow in flows}) > 3


def test_what_could_not_be_recorded_is_recorded_later_and_once(hosts):
    for port in (5000, 5001, 5002):
        send(hosts, SERVER4, port, 4)
    taken = []

    def full_after_one(flow):
        if taken:
            raise OSError("no room")
        taken.append(flow)

    with pytest.raises(OSError, match="no room"):
        turn(hosts, full_after_one)
    send(hosts, SERVER4, 5001, 3)
    later = [*turn(hosts), *turn(hosts)]
    found = totals([*taken, *later])
    udp = {key[2]: packets for key, (packets, _) in found.items() if key[1] == "udp"}
    assert udp == {5000: 4, 5001: 7, 5002: 4}


def test_counts_outlive_the_process_and_another_configuration(hosts):
    send(hosts, SERVER4, 5000, 8)
    hosts.apply(ALLOWED.replace("tunnels", "others"))
    assert hosts.gate(redirect.plan, hosts.config(ALLOWED)) != []
    assert totals(turn(hosts))[CLIENT4, "udp", 5000][0] == 8
    assert hosts.gate(redirect.plan, hosts.config(ALLOWED.replace("tunnels", "others"))) == []


def test_without_a_redirect_there_are_no_flows(module_hosts):
    module_hosts.gate(redirect.undo)
    assert turn(module_hosts) == []


def test_what_finds_no_room_in_a_full_set_does_not_pass(hosts, tmp_path):
    start = ipaddress.ip_address("10.0.0.0")
    taken = ", ".join(f"{start + n} . udp . 53" for n in range(rules.FLOW_SIZE))
    script = tmp_path / "full.nft"
    script.write_text(f"add element inet narrows {rules.flow_set(4, 'a')} {{ {taken} }}")
    hosts.nft("-f", str(script))
    dropped = hosts.counts()["dropped"]
    with Server(hosts, udp=[5000], addresses=[SERVER4]) as server:
        assert hosts.datagram(SERVER4, 5000) == "lost"
        assert not server.seen
        assert hosts.counts()["dropped"] > dropped
        assert len(turn(hosts)) == rules.FLOW_SIZE
        assert hosts.datagram(SERVER4, 5000) == "answer 4"
    assert [flow.client for flow in turn(hosts)] == [CLIENT4]
