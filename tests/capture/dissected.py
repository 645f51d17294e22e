"""Reads capture files with tshark, which shares no code with what wrote them."""

import json
import subprocess

FIELDS = (
    "frame.number", "frame.time_epoch", "frame.protocols", "frame.comment", "frame.interface_name",
    "ip.src", "ipv6.src", "tcp.srcport", "tcp.dstport", "tcp.flags.str", "tcp.seq", "tcp.ack",
    "tcp.len", "tcp.payload", "tcp.analysis.flags", "tcp.checksum.status", "ip.checksum.status",
    "_ws.malformed", "pgsql.query", "http.request.uri", "http.response.code", "http.authorization",
)  # fmt: skip


def dissect(file, *words):
    """Return a dictionary of lists for each packet; `words` are more of tshark's."""
    argv = ["tshark", "-n", "-r", str(file), "-T", "json", "-o", "tcp.check_checksum:TRUE"]
    argv += ["-o", "ip.check_checksum:TRUE", *words]
    for field in FIELDS:
        argv += ["-e", field]
    done = subprocess.run(argv, capture_output=True, check=True, timeout=60)
    return [packet["_source"]["layers"] for packet in json.loads(done.stdout)]


def sent(packets, port):
    """Return what the packets from a port carry, put together by their sequence numbers."""
    found = {}
    for packet in packets:
        if packet["tcp.srcport"] == [str(port)] and "tcp.payload" in packet:
            found[int(packet["tcp.seq"][0])] = bytes.fromhex(packet["tcp.payload"][0])
    whole = bytearray()
    for at in sorted(found):
        whole += bytes(at - 1 - len(whole)) + found[at]
    return bytes(whole)


def said(packets, name):
    """Return every value of a field."""
    return [value for packet in packets for value in packet.get(name, ())]
