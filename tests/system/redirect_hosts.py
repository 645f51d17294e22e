"""Three hosts, the redirect in the middle one, and ways to see which way a packet took.

No gate runs here: `Listener` is the transparent listener of the gate with a thread that says who
reached it and whom they meant.
"""

import contextlib
import itertools
import os
import select
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path

from staging import end

from appliance.config import load
from appliance.lab import topology
from appliance.lab.topology import CLIENT4, CLIENT6, SERVER4, SERVER6
from appliance.proxy import redirect
from appliance.proxy.listener import open_listener
from appliance.proxy.upstream import dial

CLIENTS = 'clients = ["192.0.2.0/24", "2001:db8:1::/64"]\n'
EVERYTHING = f'[redirect]\n{CLIENTS}\n[[route]]\nname = "everything"\n'
#: A route that may be bypassed, one that may not, and one for datagrams.
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
SERVERS = (SERVER4, SERVER6)
HOSTS = ((CLIENT4, SERVER4), (CLIENT6, SERVER6))
LOST_S = 0.25  # what took no time at all on these hosts is not coming any more after this
_numbers = itertools.count()


class Hosts:
    """Client, gate and server of one test module."""

    def __init__(self, folder):
        self._topology = topology.Topology(f"nt{os.getpid() % 10000:04d}r{next(_numbers)}")
        self._folder = folder

    def up(self):
        """Make the hosts, and wait until IPv6 works: a new link takes about a second for it."""
        topology.up(self._topology)
        for path in ("ipv4/icmp_ratelimit", "ipv6/icmp/ratelimit"):
            for role in topology.ROLES:
                self.sysctl(role, path, "0")
        until = time.monotonic() + 10
        while self.connect(SERVER6, 9) != "refused":
            assert time.monotonic() < until, "IPv6 does not work between the hosts"

    def down(self):
        topology.down(self._topology)

    def namespace(self, role):
        return self._topology.namespace(role)

    def on(self, role, function, *arguments, **options):
        """Call a function inside a host's namespace: sockets it makes stay there."""
        return topology.run(self.namespace(role), lambda: function(*arguments, **options))

    def gate(self, function, *arguments):
        return self.on("gate", function, *arguments)

    def config(self, text=EVERYTHING):
        path = self._folder / f"{next(_numbers)}.toml"
        path.write_text(text, encoding="utf-8")
        return load(path)

    def apply(self, text=EVERYTHING):
        config = self.config(text)
        self.gate(redirect.apply, config)
        return config

    def program(self, role, *argv, **options):
        """Run a program on a host to its end."""
        process = topology.start(
            self.namespace(role), argv, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            **options,
        )  # fmt: skip
        try:
            out, err = process.communicate(timeout=30)
        finally:
            end(process)
        return subprocess.CompletedProcess(argv, process.returncode, out, err)

    def nft(self, *words):
        """Ask the independent tool; its answer."""
        done = self.program("gate", "nft", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def ip(self, words):
        """Call iproute2 on the gate; its answer."""
        done = self.program("gate", "ip", *words.split())
        assert done.returncode == 0, done.stderr
        return done.stdout

    def sysctl(self, role, path, value=None):
        """Set a switch of a host's kernel; return what it was."""
        switch = Path("/proc/sys/net", path)
        before = self.on(role, switch.read_text).strip()
        if value is not None:
            self.on(role, switch.write_text, value)
        return before

    def counts(self):
        """Return packets by counter."""
        return {name: packets for name, (packets, _) in self.gate(redirect.counted).items()}

    def socket(self, role, address, kind=socket.SOCK_STREAM, protocol=0):
        return self.on(role, socket.socket, family(address), kind, protocol)

    def connect(self, address, port, source=None, role="client", wait_s=LOST_S):
        """Try a connection; return what the other end says first, or how it failed."""
        with self.socket(role, address) as sock:
            sock.settimeout(wait_s)
            try:
                if source is not None:
                    sock.bind((source, 0))
                sock.connect((address, port))
                return sock.recv(200).decode() or "closed"
            except TimeoutError:
                return "lost"
            except ConnectionError as wrong:
                return "reset" if isinstance(wrong, ConnectionResetError) else "refused"
            except OSError as wrong:
                return os.strerror(wrong.errno)

    def outcomes(self):
        """Return the ways that connections to a bypassable and to another port go."""
        return {self.connect(address, port).split()[0] for address in SERVERS for port in (80, 81)}

    def datagram(self, address, port, source=None, payload=b"ping", role="client"):
        """Send a datagram; return the answer's text, or how it failed."""
        with self.socket(role, address, socket.SOCK_DGRAM) as sock:
            sock.settimeout(LOST_S)
            if source is not None:
                sock.bind(source)
            try:
                sock.connect((address, port))
                sock.send(payload)
                return sock.recv(65535).decode()
            except TimeoutError:
                return "lost"
            except ConnectionRefusedError:
                return "rejected"
            except OSError as wrong:
                return os.strerror(wrong.errno)


def family(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def name(address, port):
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


class _Served:
    """Sockets that are looked after by a thread until the end of a `with`."""

    def __init__(self):
        self.sockets = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ending = os.pipe()

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        os.write(self._ending[1], b"x")
        self._thread.join()
        for sock in self.sockets:
            sock.close()
        for fd in self._ending:
            os.close(fd)

    def _run(self):
        while True:
            ready, _, _ = select.select([self._ending[0], *self.sockets], [], [])
            if self._ending[0] in ready:
                return
            for sock in ready:
                with contextlib.suppress(OSError):
                    self.ready(sock)


def full_socket(bare):
    """Return the socket of a bare one, as the gate makes them: with accept, and with `with`."""
    return socket.socket(fileno=bare.detach())


class Listener(_Served):
    """The gate's listeners; what comes in is told where it meant to go, and noted."""

    def __init__(self, hosts, port=15001):
        super().__init__()
        self.seen = []
        families = (socket.AF_INET, socket.AF_INET6)
        self.sockets = [full_socket(hosts.gate(open_listener, one, port)) for one in families]

    def ready(self, sock):
        near, peer = sock.accept()
        with near:
            host, port = near.getsockname()[:2]
            self.seen.append((peer[0], name(host, port)))
            near.sendall(f"gate {name(host, port)}".encode())


class Relay(Listener):
    """Listeners that dial the server, from the client's address or the gate's own, and pass its
    first word on.
    """

    def __init__(self, hosts, *, own_address=False):
        super().__init__(hosts)
        self._hosts, self._own_address = hosts, own_address

    def ready(self, sock):
        near, peer = sock.accept()
        target = near.getsockname()[:2]
        source = None if self._own_address else peer[0]
        with near, full_socket(self._hosts.gate(dial, target, source)) as far:
            self.seen.append((peer[0], name(*target)))
            far.settimeout(1)
            near.sendall(b"relayed " + far.recv(200))


class Server(_Served):
    """TCP servers that say whom they see, and UDP servers that answer."""

    def __init__(self, hosts, *ports, udp=(), addresses=SERVERS, role="server"):
        super().__init__()
        self.seen = []
        for address in addresses:
            self.sockets += [hosts.on(role, self._tcp, address, port) for port in ports]
            self.sockets += [hosts.on(role, self._udp, address, port) for port in udp]

    def ready(self, sock):
        if sock.type == socket.SOCK_DGRAM:
            data, peer = sock.recvfrom(65535)
            self.seen.append((peer[0], len(data)))
            sock.sendto(f"answer {len(data)}".encode(), peer)
            return
        near, peer = sock.accept()
        with near:
            self.seen.append((peer[0], 0))
            near.sendall(f"server {peer[0]}".encode())

    @staticmethod
    def _tcp(address, port):
        sock = socket.socket(family(address), socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        sock.listen(64)
        return sock

    @staticmethod
    def _udp(address, port):
        sock = socket.socket(family(address), socket.SOCK_DGRAM)
        sock.bind((address, port))
        return sock


class Capture:
    """Packets that reach an interface of a host, from their IP header on."""

    def __init__(self, hosts, role, interface="eth0"):
        self._socket = hosts.on(role, socket.socket, socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        self._socket.bind((interface, 3))  # ETH_P_ALL
        self._socket.setblocking(False)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._socket.close()

    def packets(self, keep, most=1, wait_s=5.0):
        """Return packets for which `keep` holds, as soon as there are `most` of them."""
        found = []
        until = time.monotonic() + wait_s
        while len(found) < most:
            if not select.select([self._socket], [], [], max(until - time.monotonic(), 0))[0]:
                break
            packet = self._socket.recv(65535)
            found += [packet] if keep(packet) else []
        return found


def checksum(data):
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ip_packet(source, target, protocol, payload, *, identifier=1, fragment=0):
    """Return an IP packet; `fragment` are IPv4's flags and offset."""
    if family(source) == socket.AF_INET6:
        head = struct.pack(">IHBB", 6 << 28, len(payload), protocol, 64)
        return head + _packed(source) + _packed(target) + payload
    head = struct.pack(
        ">BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), identifier, fragment, 64, protocol, 0,
        _packed(source), _packed(target),
    )  # fmt: skip
    return head[:10] + struct.pack(">H", checksum(head)) + head[12:] + payload


def transport(source, target, protocol, segment, at):
    """Return a segment with the checksum at `at` filled in."""
    pseudo = _packed(source) + _packed(target) + struct.pack(">II", len(segment), protocol)
    value = checksum(pseudo + segment)
    return segment[:at] + struct.pack(">H", value) + segment[at + 2 :]


def tcp_segment(source, target, ports, *, flags=2, options=b"", sequence=1000):
    """Return a TCP segment; `options` are a multiple of four bytes."""
    offset = (5 + len(options) // 4) << 4
    head = struct.pack(">HHIIBBHHH", *ports, sequence, 0, offset, flags, 64240, 0, 0)
    return transport(source, target, 6, head + options, 16)


def udp_segment(source, target, ports, payload):
    head = struct.pack(">HHHH", *ports, 8 + len(payload), 0)
    return transport(source, target, 17, head + payload, 6)


def inject(hosts, role, target, packet):
    """Send a whole IP packet from a host."""
    six = family(target) == socket.AF_INET6
    with hosts.on(role, socket.socket, family(target), socket.SOCK_RAW, 255) as sock:
        if six:
            sock.setsockopt(socket.IPPROTO_IPV6, 36, 1)  # IPV6_HDRINCL
        sock.sendto(packet, (target, 0))


def is_segment(packet, port):
    """Say whether a packet is TCP to a port."""
    start, protocol = (20, packet[9]) if packet[0] >> 4 == 4 else (40, packet[6])
    return protocol == 6 and packet[start + 2 : start + 4] == struct.pack(">H", port)


def tcp_options(packet):
    """Return (kind, value) of the TCP options of an IP packet."""
    start = 20 if packet[0] >> 4 == 4 else 40
    options = packet[start + 20 : start + (packet[start + 12] >> 4) * 4]
    found = []
    while options and options[0]:
        length = 1 if options[0] == 1 else options[1]
        found.append((options[0], options[2:length]))
        options = options[length:]
    return found


def _packed(address):
    return socket.inet_pton(family(address), address)
