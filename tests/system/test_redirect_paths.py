"""Which way packets take when the redirect is applied and listeners are there."""

import socket
import struct
import time
from pathlib import Path

import pytest
from redirect_hosts import (
    CLIENTS,
    EVERYTHING,
    HOSTS,
    LOST_S,
    SERVERS,
    Capture,
    Hosts,
    Listener,
    Relay,
    Server,
    checksum,
    family,
    full_socket,
    inject,
    ip_packet,
    is_segment,
    name,
    tcp_options,
    tcp_segment,
    transport,
)
from staging import wait_for

from appliance.lab.topology import (
    CLIENT4,
    CLIENT6,
    GATE_CLIENT4,
    GATE_CLIENT6,
    GATE_SERVER4,
    GATE_SERVER6,
    SERVER4,
    SERVER6,
)
from appliance.proxy.upstream import dial

pytestmark = pytest.mark.system

SYN_OPTION = bytes([253, 20]) + b"NH" + bytes(range(16))


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    made = Hosts(tmp_path_factory.mktemp("redirect"))
    try:
        made.up()
        yield made
    finally:
        made.down()


@pytest.fixture
def everything(hosts):
    """Listeners, and the redirect with one route for all."""
    hosts.apply()
    with Listener(hosts) as listener:
        yield listener


@pytest.mark.parametrize("address", SERVERS)
@pytest.mark.parametrize("port", [1, 22, 443, 5432, 15001, 65535])
def test_any_port_reaches_the_listener_with_the_original_destination(
    hosts, everything, address, port
):
    assert hosts.connect(address, port) == f"gate {name(address, port)}"
    assert everything.seen[-1] == (CLIENT6 if ":" in address else CLIENT4, name(address, port))


@pytest.mark.parametrize("address", ["203.0.113.77", "2001:db8:99::77"])
def test_a_destination_that_no_route_leads_to_reaches_the_listener_too(hosts, everything, address):
    assert hosts.connect(address, 80) == f"gate {name(address, 80)}"


@pytest.mark.parametrize(
    "address",
    [GATE_CLIENT4, GATE_SERVER4, GATE_CLIENT6, GATE_SERVER6, "169.254.9.9"],
)
def test_the_gates_own_and_link_local_addresses_reach_only_the_listener(hosts, everything, address):
    refused = hosts.counts()["refused"]
    with Server(
        hosts, 8443, udp=[8443], addresses=[GATE_CLIENT4, GATE_SERVER6], role="gate"
    ) as api:
        assert hosts.connect(address, 8443) == f"gate {name(address, 8443)}"
        assert hosts.datagram(address, 8443) == "lost"
        assert not api.seen
    assert hosts.counts()["refused"] > refused


def link_local(hosts, interface):
    """Return the link-local address of an interface of the gate."""

    def read():
        return Path("/proc/thread-self/net/if_inet6").read_text(encoding="ascii").splitlines()

    fields = [line.split() for line in hosts.gate(read)]
    found = next(f for f in fields if f[0].startswith("fe80") and f[5] == interface)
    return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(found[0]))


def test_a_link_local_source_reaches_only_the_listener(hosts, everything):
    address = link_local(hosts, "client0")
    with Server(hosts, 8443, addresses=["::"], role="gate") as api:
        with hosts.socket("client", address) as sock:
            sock.settimeout(LOST_S)
            sock.connect((address, 8443, 0, hosts.on("client", socket.if_nametoindex, "eth0")))
            assert sock.recv(100).startswith(f"gate [{address}".encode())
        assert not api.seen


def test_a_management_network_reaches_only_the_listener(hosts):
    hosts.apply('[redirect]\nmanagement = ["198.51.100.0/24", "2001:db8:2::/64"]\n'
                'bypass = ["0.0.0.0/0", "::/0"]\n' + CLIENTS
                + '[[route]]\nname = "udp"\nprotocol = "udp"\naction = "allow"\n')  # fmt: skip
    with Listener(hosts), Server(hosts, 80, udp=[53]) as server:
        for address in SERVERS:
            assert hosts.connect(address, 80) == f"gate {name(address, 80)}"
            assert hosts.datagram(address, 53) == "lost"
        assert not server.seen


@pytest.mark.parametrize(("client", "address"), HOSTS)
def test_a_session_can_reach_the_server_with_the_clients_own_address(hosts, client, address):
    hosts.apply()
    with Relay(hosts), Server(hosts, 7777):
        assert hosts.connect(address, 7777) == f"relayed server {client}"


def test_what_the_bypass_list_names_is_routed_and_nothing_else(hosts):
    hosts.apply('[redirect]\nbypass = ["198.51.100.10/32", "2001:db8:2::10/128"]\n' + CLIENTS
                + '[[route]]\nname = "everything"\n')  # fmt: skip
    with Listener(hosts) as listener, Server(hosts, 80, udp=[53, 443]):
        for client, address in HOSTS:
            assert hosts.connect(address, 80) == f"server {client}"
            assert hosts.datagram(address, 53) == "answer 4"
            assert hosts.datagram(address, 443) == "answer 4"
        assert not listener.seen
        for other in ("198.51.100.11", "2001:db8:2::11"):
            assert hosts.connect(other, 80) == f"gate {name(other, 80)}"
    assert hosts.counts()["bypass"] > 0


@pytest.mark.parametrize(("client", "address"), [(CLIENT4, GATE_SERVER4), (CLIENT6, GATE_SERVER6)])
def test_a_session_can_never_be_one_with_the_gate_itself(hosts, client, address):
    hosts.apply()
    before = hosts.counts()["spoofed"]
    with Server(hosts, 8443, addresses=[address], role="gate") as api:
        with full_socket(hosts.gate(dial, (address, 8443), client)) as sock:
            sock.settimeout(LOST_S)
            with pytest.raises(TimeoutError):
                sock.recv(1)
        assert not api.seen
        assert hosts.counts()["spoofed"] > before
        assert hosts.connect(address, 8443, role="gate") == f"server {address}"


@pytest.mark.parametrize("address", SERVERS)
def test_quic_is_rejected_at_once_so_that_it_falls_back_to_tcp(hosts, everything, address):
    before = hosts.counts()["quic"]
    with Server(hosts, udp=[443]) as server:
        assert hosts.datagram(address, 443) == "rejected"
        assert not server.seen
    assert hosts.counts()["quic"] > before


UDP_AND_PING = f"""
[redirect]
{CLIENTS}
[[route]]
name = "names"
protocol = "udp"
ports = [53, "9000-9001"]
action = "allow"
[[route]]
name = "ping"
protocol = "icmp"
action = "allow"
destinations = ["198.51.100.10/32", "2001:db8:2::10/128"]
"""


@pytest.mark.parametrize("address", SERVERS)
def test_what_is_not_tcp_passes_only_where_a_route_allows_it(hosts, address):
    hosts.apply(UDP_AND_PING)
    with Server(hosts, udp=[53, 54, 9001]) as server:
        assert hosts.datagram(address, 53) == "answer 4"
        assert hosts.datagram(address, 9001) == "answer 4"
        seen = len(server.seen)
        assert hosts.datagram(address, 54) == "lost"
        assert len(server.seen) == seen
    assert hosts.datagram(address, 9000) == "rejected"  # by the server: ICMP errors come back
    assert _ping(hosts, address)


def _ping(hosts, address):
    six = ":" in address
    protocol = socket.IPPROTO_ICMPV6 if six else socket.IPPROTO_ICMP
    with hosts.socket("client", address, socket.SOCK_RAW, protocol) as sock:
        sock.settimeout(LOST_S)
        echo = struct.pack(">BBHHH", 128 if six else 8, 0, 0, 7, 1)
        if not six:
            echo = struct.pack(">BBHHH", 8, 0, 0xFFFF - 0x0800 - 7 - 1, 7, 1)
        sock.sendto(echo, (address, 0))
        until = time.monotonic() + LOST_S
        while time.monotonic() < until:
            try:
                data, peer = sock.recvfrom(2000)
            except TimeoutError:
                return False
            if peer[0] == address and data[0 if six else 20] in (0, 129):
                return True
    return False


@pytest.mark.parametrize("address", SERVERS)
def test_ping_is_answered_by_the_gate_and_does_not_pass(hosts, address):
    hosts.apply()
    assert _ping(hosts, GATE_CLIENT6 if ":" in address else GATE_CLIENT4)
    assert not _ping(hosts, address)


def test_hosts_of_two_client_subnets_get_the_answers_that_a_route_allows(hosts):
    both = 'clients = ["192.0.2.0/24", "198.51.100.0/24", "2001:db8:1::/64", "2001:db8:2::/64"]\n'
    hosts.apply(UDP_AND_PING.replace(CLIENTS, both) + '[[route]]\nname = "rest"\n')
    with Relay(hosts), Server(hosts, 80, udp=[53]):
        for client, address in HOSTS:
            assert hosts.datagram(address, 53) == "answer 4"
            assert hosts.connect(address, 80) == f"relayed server {client}"


def test_the_gate_itself_can_connect_to_a_host_of_a_client_subnet(hosts):
    hosts.apply()
    with Server(hosts, 80, addresses=[CLIENT4, CLIENT6], role="client"):
        assert hosts.connect(CLIENT4, 80, role="gate") == f"server {GATE_CLIENT4}"
        assert hosts.connect(CLIENT6, 80, role="gate") == f"server {GATE_CLIENT6}"


@pytest.mark.parametrize(("client", "address"), HOSTS)
def test_no_server_opens_a_connection_to_a_client(hosts, client, address):
    hosts.apply("[redirect]\n" + CLIENTS + '[[route]]\nname = "x"\non_failure = "bypass"\n')
    with Server(hosts, 22, udp=[22], addresses=[CLIENT4, CLIENT6], role="client") as inside:
        assert hosts.connect(client, 22, role="server") == "lost"
        assert hosts.datagram(client, 22, role="server") == "lost"
        assert not inside.seen


@pytest.mark.parametrize("target", [GATE_SERVER4, GATE_SERVER6])
def test_nobody_reaches_the_listener_by_its_own_port(hosts, everything, target):
    assert hosts.connect(target, 15001, role="server") == "lost"
    assert hosts.counts()["direct"] > 0


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("10.9.9.9", SERVER4),
        ("198.51.100.77", SERVER4),
        ("2001:db8:9::9", SERVER6),
        ("2001:db8:2::77", SERVER6),
    ],
)
def test_a_client_with_another_address_does_not_get_around(hosts, everything, source, target):
    before = hosts.counts()["spoofed"]
    segment = tcp_segment(source, target, (4000, 80))
    with Capture(hosts, "server") as capture:
        inject(hosts, "client", target, ip_packet(source, target, 6, segment))
        assert not capture.packets(lambda packet: packet.endswith(segment), wait_s=LOST_S)
    assert hosts.counts()["spoofed"] == before + 1


def test_an_ipv4_address_in_ipv6_dress_is_dropped(hosts, everything):
    target = f"::ffff:{SERVER4}"
    dropped = hosts.counts()["dropped"]
    segment = tcp_segment(CLIENT6, target, (4000, 80))
    inject(hosts, "client", SERVER6, ip_packet(CLIENT6, target, 6, segment))
    wait_for(lambda: hosts.counts()["dropped"] == dropped + 1)
    assert not everything.seen


@pytest.mark.parametrize(
    "target",
    ["198.51.100.255", "192.0.2.255", "255.255.255.255", "224.0.0.5", "2001:db8:1::", "ff02::9"],
)
def test_broadcast_anycast_and_multicast_reach_no_service_of_the_gate(hosts, target):
    hosts.apply(f'[redirect]\n{CLIENTS}[[route]]\nname = "u"\nprotocol = "udp"\naction = "allow"\n')
    dropped = hosts.counts()["dropped"]
    wild = "::" if ":" in target else "0.0.0.0"
    with Server(hosts, udp=[9999], addresses=[wild], role="gate") as service:
        with hosts.socket("client", target, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
            sock.bind((CLIENT6 if ":" in target else CLIENT4, 0))
            sock.sendto(b"hello", (target, 9999))
        wait_for(lambda: hosts.counts()["dropped"] > dropped)
        assert not service.seen


def whole(packet):
    """Say whether a packet's TCP checksum is right."""
    start = 20 if packet[0] >> 4 == 4 else 40
    addresses = packet[12:20] if start == 20 else packet[8:40]
    segment = packet[start:]
    return checksum(addresses + struct.pack(">II", len(segment), 6) + segment) == 0


@pytest.mark.parametrize(("client", "address"), HOSTS)
@pytest.mark.parametrize("way", ["bypass", "on_failure"])
def test_the_identity_is_stripped_from_what_leaves_unproxied(hosts, client, address, way):
    listed = 'bypass = ["198.51.100.0/24", "2001:db8:2::/64"]\n' if way == "bypass" else ""
    hosts.apply(f'[redirect]\n{CLIENTS}{listed}[[route]]\nname = "x"\non_failure = "bypass"\n')
    options = bytes([2, 4, 5, 180]) + SYN_OPTION + bytes([1, 3, 3, 7])
    segment = tcp_segment(client, address, (4000, 80), options=options)
    with Capture(hosts, "server") as capture:
        inject(hosts, "client", address, ip_packet(client, address, 6, segment))
        (packet,) = capture.packets(lambda packet: is_segment(packet, 80))
    assert whole(packet)
    assert [kind for kind, _ in tcp_options(packet) if kind != 1] == [2, 3]
    assert b"NH" not in packet


@pytest.mark.parametrize("size", [10, 4000])
@pytest.mark.parametrize("address", SERVERS)
def test_fragments_are_judged_as_the_packet_that_they_make(hosts, address, size):
    hosts.apply(UDP_AND_PING)
    with Server(hosts, udp=[53, 54]):
        assert hosts.datagram(address, 53, payload=bytes(size)) == f"answer {size}"
        assert hosts.datagram(address, 54, payload=bytes(size)) == "lost"


def test_a_connection_request_in_fragments_reaches_the_listener(hosts, everything):
    segment = tcp_segment(CLIENT4, SERVER4, (4000, 80), options=SYN_OPTION)
    more = 0x2000
    with Capture(hosts, "client") as capture:
        for at in (0, 16, 32):
            part = segment[at : at + 16]
            flags = (more if at + 16 < len(segment) else 0) | at // 8
            packet = ip_packet(CLIENT4, SERVER4, 6, part, identifier=77, fragment=flags)
            inject(hosts, "client", SERVER4, packet)
        (answer,) = capture.packets(lambda packet: is_segment(packet, 4000))
    assert answer[33] == 0x12  # SYN, ACK


def test_a_connection_request_behind_an_extension_header_reaches_the_listener(hosts, everything):
    segment = tcp_segment(CLIENT6, SERVER6, (4000, 80))
    options = bytes([6, 0, 1, 4, 0, 0, 0, 0])  # a destination options header that says nothing
    with Capture(hosts, "client") as capture:
        inject(hosts, "client", SERVER6, ip_packet(CLIENT6, SERVER6, 60, options + segment))
        (answer,) = capture.packets(lambda packet: is_segment(packet, 4000))
    assert answer[53] == 0x12  # SYN, ACK


def test_icmp_errors_pass_to_a_client_only_where_something_passes_that_they_could_be_about(hosts):
    body = struct.pack(">BBHI", 3, 1, 0, 0) + ip_packet(CLIENT4, SERVER4, 17, bytes(8))
    body = body[:2] + struct.pack(">H", checksum(body)) + body[4:]
    error = ip_packet(SERVER4, CLIENT4, 1, body)
    for text, passes in ((EVERYTHING, False), (UDP_AND_PING, True)):
        hosts.apply(text)
        with Capture(hosts, "client") as capture:
            inject(hosts, "server", CLIENT4, error)
            found = capture.packets(lambda packet: packet.endswith(body), wait_s=LOST_S)
        assert bool(found) == passes


@pytest.fixture
def upstream(hosts, request):
    """A session's connection to a server, from the client's address: (gate's end, server's)."""
    client, address = request.param
    hosts.apply()
    with hosts.on("server", socket.create_server, (address, 81), family=family(address)) as server:
        sock = full_socket(hosts.gate(dial, (address, 81), client))
        near, _ = server.accept()
    with sock, near:
        yield sock, near


both_families = pytest.mark.parametrize("upstream", HOSTS, indirect=True)


@both_families
def test_an_icmp_error_about_a_session_reaches_the_sessions_socket(hosts, upstream):
    sock, near = upstream
    client, address = sock.getsockname()[0], near.getsockname()[0]
    with Capture(hosts, "server") as capture:
        near.send(b"x")  # so that the answer's sequence number is one that is expected
        (inner,) = capture.packets(lambda packet: is_segment(packet, 81))
    if ":" in client:
        body = struct.pack(">BBHI", 2, 0, 0, 1300) + inner
        error = ip_packet(address, client, 58, transport(address, client, 58, body, 2))
        level, option = 41, 24  # IPV6_MTU
    else:
        body = struct.pack(">BBHHH", 3, 4, 0, 0, 1300) + inner[:28]
        body = body[:2] + struct.pack(">H", checksum(body)) + body[4:]
        error = ip_packet(address, client, 1, body)
        level, option = 0, 14  # IP_MTU
    assert sock.getsockopt(level, option) == 1500
    inject(hosts, "server", client, error)
    wait_for(lambda: sock.getsockopt(level, option) == 1300, 3, what="the smaller MTU")


@both_families
def test_a_late_segment_of_a_finished_session_is_answered_by_its_socket(hosts, upstream):
    sock, near = upstream
    client, port = sock.getsockname()[:2]
    address = near.getsockname()[0]
    sock.close()
    assert near.recv(1) == b""
    near.close()
    wait_for(lambda: _state(hosts, port) == ["06"], 3, what="TIME_WAIT")
    late = tcp_segment(address, client, (81, port), flags=0x11, sequence=99)
    with Capture(hosts, "server") as capture:
        inject(hosts, "server", client, ip_packet(address, client, 6, late))
        assert capture.packets(lambda packet: is_segment(packet, 81), wait_s=2)


def _state(hosts, port):
    """Return the kernel's numbers of the states of the gate's sockets that have a port."""

    def read():
        names = (Path("/proc/thread-self/net", name) for name in ("tcp", "tcp6"))
        return "".join(path.read_text(encoding="ascii") for path in names).splitlines()

    lines = [line.split() for line in hosts.gate(read)]
    return [fields[3] for fields in lines if fields[1].endswith(f":{port:04X}")]
