"""Writes a capture file (pcapng, draft-ietf-opsawg-pcapng) of sessions that it reads.

    python -m capture.export.pcapng <input >output

A program, not a module: it uses scapy, which is GPL-2.0-only, so nothing of Narrows may import it,
and it imports nothing of Narrows. `capture.export.capturefile` runs it. Both ends are pipes, and
neither side holds more than one packet in memory.

Input, one JSON object a line:

    {"section": comment, "name": of the interface, "client": [address, port], "target": [...]}
        a session begins: a section with one interface (raw IP, times in nanoseconds)
    {"time": ns, "client": whether the client sends it, "flags": "PA", "sequence": n,
     "acknowledged": n, "comments": [...], "size": n}
        a packet; n bytes of data follow the line. Numbers count from 0 at SYN, and wrap
    {"end": true}
        nothing follows; an input that ends without it was cut

Exit code 0, 1 when the input is not that, 3 without scapy.
"""

from __future__ import annotations

import json
import logging
import resource
import socket
import struct
import sys
from typing import IO, Any

MOST_MEMORY = 1 << 30
SNAP_BYTES = 262_144
NANOSECONDS = 9
_SECTION, _INTERFACE, _PACKET = 0x0A0D0D0A, 1, 6
_RAW_IP = 101  #: LINKTYPE_RAW: IPv4 or IPv6 by its first four bits
_COMMENT, _NAME, _DESCRIPTION, _RESOLUTION = 1, 2, 3, 9
_WINDOW = 65_535  #: times 2**14: whatever a side sends fits into the other's window
_FLAGS = {"F": 1, "S": 2, "R": 4, "P": 8, "A": 16}
_WRAP = 0xFFFFFFFF
_TCP_BYTES = 20


class Sender:
    """One side of a session: the headers that scapy made for it, filled in for each packet.

    Building every packet as scapy objects takes 20 times as long.
    """

    def __init__(self, source: list[Any], target: list[Any]) -> None:
        from scapy.layers.inet import IP, TCP
        from scapy.layers.inet6 import IPv6
        from scapy.utils import checksum

        self._checksum = checksum
        self._six = ":" in source[0]
        ip = IPv6 if self._six else IP
        network = ip(src=source[0], dst=target[0])
        options = [("MSS", 65_495), ("WScale", 14)]
        tcp = TCP(sport=source[1], dport=target[1], window=_WINDOW)
        self._ip_bytes = len(network)
        self._plain = bytes(network / tcp)
        tcp.options = options
        self._opening = bytes(network / tcp)

    def packet(self, flags: str, sequence: int, acknowledged: int, data: bytes) -> bytes:
        """Return a packet."""
        made = bytearray(self._opening if "S" in flags else self._plain)
        at = self._ip_bytes
        bits = sum(_FLAGS[letter] for letter in flags)
        struct.pack_into(">II", made, at + 4, sequence & _WRAP, acknowledged & _WRAP)
        made[at + 13] = bits
        made[at + 16 : at + 18] = b"\0\0"
        length = len(made) - at + len(data)
        if self._six:
            struct.pack_into(">H", made, 4, length)
            pseudo = bytes(made[8:40]) + struct.pack(">II", length, socket.IPPROTO_TCP)
        else:
            struct.pack_into(">H", made, 2, at + length)
            struct.pack_into(">H", made, 10, 0)
            struct.pack_into(">H", made, 10, self._checksum(bytes(made[:at])))
            pseudo = bytes(made[12:20]) + struct.pack(">HH", socket.IPPROTO_TCP, length)
        whole = b"".join((pseudo, made[at:], data))
        struct.pack_into(">H", made, at + 16, self._checksum(whole))
        return bytes(made) + data


class Writer:
    """Writes the blocks."""

    def __init__(self, output: IO[bytes]) -> None:
        self._output = output

    def section(self, comment: str, name: str) -> None:
        """Begin a section with one interface."""
        head = struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1)
        said = [_option(_COMMENT, comment.encode())]
        self._block(_SECTION, head, [*said, _option(4, b"Narrows")])
        told = [
            _option(_NAME, name.encode()), *said,
            _option(_DESCRIPTION, b"synthetic TCP of a recorded session"),
            _option(_RESOLUTION, bytes([NANOSECONDS])),
        ]  # fmt: skip
        self._block(_INTERFACE, struct.pack("<HHI", _RAW_IP, 0, SNAP_BYTES), told)

    def packet(self, time_ns: int, packet: bytes, comments: list[str]) -> None:
        """Write a packet."""
        size = len(packet)
        head = struct.pack("<IIIII", 0, time_ns >> 32, time_ns & _WRAP, size, size)
        told = [_option(_COMMENT, comment.encode()) for comment in comments]
        self._block(_PACKET, head + packet, told)

    def _block(self, kind: int, body: bytes, options: list[bytes]) -> None:
        content = body + bytes(-len(body) % 4)
        if options:
            content += b"".join(options) + bytes(4)
        length = struct.pack("<I", len(content) + 12)
        self._output.write(struct.pack("<I", kind) + length + content + length)


def _option(code: int, value: bytes) -> bytes:
    value = value[:65_535]
    return struct.pack("<HH", code, len(value)) + value + bytes(-len(value) % 4)


def convert(source: IO[bytes], output: IO[bytes]) -> None:
    """Read sessions and write them; ValueError or KeyError when the input is not as above."""
    writer = Writer(output)
    senders: dict[bool, Sender] = {}
    while line := source.readline(1 << 20):
        asked = json.loads(line)
        if "end" in asked:
            output.flush()
            return
        if "section" in asked:
            client, target = asked["client"], asked["target"]
            senders = {True: Sender(client, target), False: Sender(target, client)}
            writer.section(asked["section"], asked["name"])
            continue
        data = source.read(asked["size"])
        if len(data) != asked["size"]:
            break
        sender = senders[asked["client"]]
        made = sender.packet(asked["flags"], asked["sequence"], asked["acknowledged"], data)
        writer.packet(asked["time"], made, asked["comments"])
    raise ValueError("it was cut")


def main() -> int:
    """Run the program."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.getLogger("scapy").setLevel(logging.ERROR)
    try:
        import scapy.layers.inet6  # noqa: F401 - whether it is there
    except ImportError as missing:
        print(f"pcapng needs scapy (narrows[pcapng]): {missing}", file=sys.stderr)
        return 3
    try:
        convert(sys.stdin.buffer, sys.stdout.buffer)
    except BrokenPipeError:
        return 1
    except (ValueError, KeyError, TypeError) as wrong:
        print(f"the input cannot be read: {type(wrong).__name__}: {wrong}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
