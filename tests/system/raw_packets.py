"""TCP by hand: SYNs that no kernel would send, and their handshakes. The only user of scapy.

Packets are built and parsed here; they are sent and received by raw sockets of the host that the
caller names, whose kernel is kept from answering for a port that it does not know.
"""

import select
import socket
import struct
import subprocess
import time

from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from siphash24 import siphash24

IPV6_HDRINCL = 36
SO_RCVBUFFORCE = 33


def identity(handle, mac):
    """Return the identity option as scapy takes it."""
    return (253, b"NH" + handle.to_bytes(8, "little") + mac)


def signed(key, handle, packet):
    """Return the identity option that a sensor with `key` would write into a SYN."""
    head, segment = bytes(packet), bytes(packet[TCP])
    sport, dport, isn = struct.unpack("<HHI", segment[:8])  # as little-endian machines load them
    words = [handle, isn << 32 | sport << 16 | dport]
    if IPv6 in packet:
        ends = struct.unpack("<8I", head[8:40])
        words += [ends[n] << 32 | ends[n + 1] for n in (0, 2, 4, 6)]
    else:
        source, target = struct.unpack("<II", head[12:20])
        words += [source << 32 | target, 0, 0, 0]
    return identity(handle, siphash24(struct.pack("<6Q", *words), key=key).digest())


class Wire:
    """What passes a host's interface, in both directions."""

    def __init__(self, stage, role="client", interface="eth0"):
        self._stage, self._role = stage, role
        self._taps = stage.on(role, socket.socket, socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        self._taps.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
        self._taps.bind((interface, 3))  # ETH_P_ALL

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._taps.close()

    def send(self, packet):
        """Send a packet with lengths and checksums made anew."""
        whole = packet.copy()
        del whole[TCP].chksum
        six = IPv6 in whole
        if six:
            del whole.plen
        else:
            del whole.len, whole.chksum
        family = socket.AF_INET6 if six else socket.AF_INET
        with self._stage.on(self._role, socket.socket, family, socket.SOCK_RAW, 255) as raw:
            if six:
                raw.setsockopt(socket.IPPROTO_IPV6, IPV6_HDRINCL, 1)
            raw.sendto(bytes(whole), (whole.dst, 0))

    def wait(self, wanted, longest_s=10.0):
        """Return the next TCP packet for which `wanted` holds; None when there is none."""
        end = time.monotonic() + longest_s
        while (left := end - time.monotonic()) > 0:
            if not select.select([self._taps], [], [], left)[0]:
                break
            data = self._taps.recv(65535)
            packet = IPv6(data) if data[0] >> 4 == 6 else IP(data)
            if TCP in packet and wanted(packet):
                return packet
        return None


class Muted:
    """While it lasts, the host sends no resets from `port`: its kernel knows no such connection."""

    def __init__(self, stage, port, role="client"):
        self._stage, self._role, self._name = stage, role, f"mute{port}"
        self._rules = (
            f"add table inet {self._name}\n"
            f"add chain inet {self._name} output {{ type filter hook output priority 0; }}\n"
            f"add rule inet {self._name} output tcp sport {port} tcp flags & rst == rst drop\n"
        )

    def __enter__(self):
        self._nft(self._rules)

    def __exit__(self, *_):
        self._nft(f"delete table inet {self._name}\n")

    def _nft(self, words):
        done = self._stage.on(self._role, _nft, words)
        assert done.returncode == 0, done.stderr


def _nft(words):
    command = ["nft", "-f", "-"]
    return subprocess.run(command, input=words, capture_output=True, text=True, check=False)


class Handmade:
    """A connection whose client is this object."""

    def __init__(self, wire, syn):
        self._wire, self._syn = wire, syn
        self._ip = syn.copy()
        self._ip.remove_payload()
        self._next, self._seen = syn[TCP].seq + 1, 0
        self._stamps = []  # once they are negotiated, Linux drops segments without timestamps

    def opened(self):
        """Send the SYN and finish the handshake; say whether it was answered."""
        self._wire.send(self._syn)
        answer = self._wire.wait(lambda p: self._is_answer(p) and p[TCP].flags.S)
        if answer is None or answer[TCP].flags.R:
            return False
        self._seen = answer[TCP].seq + 1
        mine, theirs = (dict(p[TCP].options).get("Timestamp") for p in (self._syn, answer))
        if mine and theirs:
            self._stamps = [("Timestamp", (mine[0], theirs[0]))]
        self._send("A")
        return True

    def echoed(self, data):
        """Send data; return what came back in one segment, None after a reset."""
        self._send("PA", data)
        self._next += len(data)
        answer = self._wire.wait(
            lambda p: self._is_answer(p) and (p[TCP].flags.R or len(p[TCP].payload))
        )
        if answer is None or answer[TCP].flags.R:
            return None
        self._seen += len(answer[TCP].payload)
        return bytes(answer[TCP].payload)

    def _is_answer(self, packet):
        mine, theirs = self._syn[TCP], packet[TCP]
        return (theirs.sport, theirs.dport) == (mine.dport, mine.sport)

    def _send(self, flags, data=b""):
        segment = TCP(
            sport=self._syn[TCP].sport, dport=self._syn[TCP].dport, flags=flags, seq=self._next,
            ack=self._seen, window=65000, options=self._stamps,
        )  # fmt: skip
        self._wire.send(self._ip / segment / data)


def syn(source, target, *options, isn=1_000_000):
    """Return a SYN from (address, port) to (address, port)."""
    six = ":" in source[0]
    head = IPv6(src=source[0], dst=target[0]) if six else IP(src=source[0], dst=target[0])
    segment = TCP(
        sport=source[1], dport=target[1], flags="S", seq=isn, window=65000,
        options=[("MSS", 1400), *options],
    )  # fmt: skip
    return head / segment


def is_syn_from(port):
    """Return a test for the SYN of a connection from `port`."""
    return lambda packet: packet[TCP].sport == port and packet[TCP].flags == "S"


def identity_of(packet):
    """Return (handle, MAC) of a packet's identity option; None without one."""
    for kind, value in packet[TCP].options:
        if kind == 253 and value[:2] == b"NH":
            return int.from_bytes(value[2:10], "little"), value[10:]
    return None
