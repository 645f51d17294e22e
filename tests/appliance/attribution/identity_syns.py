"""SYNs as the kernel saves them, with an identity option made by an independent SipHash."""

import socket
import struct

KEY = bytes(range(16))
OTHER_KEY = bytes(range(16, 32))
HANDLE = 0x1234_0010_0000_0007
CLIENT = ("192.0.2.10", 40000)
TARGET = ("198.51.100.10", 5432)
CLIENT6 = ("2001:db8:1::10", 40001)
TARGET6 = ("2001:db8:2::10", 6379)
_ALL = (1 << 64) - 1
#: MSS, SACK permitted, timestamps: what Linux puts before it.
USUAL = bytes([2, 4, 5, 0xB4, 4, 2, 8, 10]) + bytes(8)


def siphash24(key, message):
    """SipHash-2-4 by its definition, over whole 64-bit words."""
    k0, k1 = struct.unpack("<QQ", key)
    a, b = k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D
    c, d = k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573

    def turn(value, bits):
        return ((value << bits) | (value >> (64 - bits))) & _ALL

    def mix(a, b, c, d):
        a = (a + b) & _ALL
        b = turn(b, 13) ^ a
        a = turn(a, 32)
        c = (c + d) & _ALL
        d = turn(d, 16) ^ c
        a = (a + d) & _ALL
        d = turn(d, 21) ^ a
        c = (c + b) & _ALL
        b = turn(b, 17) ^ c
        return a, b, turn(c, 32), d

    words = [*struct.unpack(f"<{len(message) // 8}Q", message), (len(message) & 255) << 56]
    for word in words:
        d ^= word
        a, b, c, d = mix(*mix(a, b, c, d))
        a ^= word
    c ^= 0xFF
    for _ in range(4):
        a, b, c, d = mix(a, b, c, d)
    return a ^ b ^ c ^ d


def _mac(key, handle, source, target, isn):
    """The words as the kernel builds them: network-order fields loaded as little-endian."""
    family = socket.AF_INET6 if ":" in source[0] else socket.AF_INET
    (seq,) = struct.unpack("<I", struct.pack(">I", isn))
    sport, dport = struct.unpack("<HH", struct.pack(">HH", source[1], target[1]))
    words = [handle, seq << 32 | sport << 16 | dport]
    local, remote = socket.inet_pton(family, source[0]), socket.inet_pton(family, target[0])
    if family == socket.AF_INET:
        words += [struct.unpack("<I", local)[0] << 32 | struct.unpack("<I", remote)[0], 0, 0, 0]
    else:
        four = [*struct.unpack("<4I", local), *struct.unpack("<4I", remote)]
        words += [four[n] << 32 | four[n + 1] for n in (0, 2, 4, 6)]
    return siphash24(key, struct.pack("<6Q", *words)).to_bytes(8, "little")


def identity(key=KEY, handle=HANDLE, source=CLIENT, target=TARGET, isn=1, *, mac_bytes=8):
    """The option alone."""
    body = b"NH" + struct.pack("<Q", handle) + _mac(key, handle, source, target, isn)[:mac_bytes]
    return bytes([253, len(body) + 2]) + body


def saved(source=CLIENT, target=TARGET, isn=1, options=b"", *, extensions=b"", ip_options=b""):
    """IP and TCP headers with `options` after the usual ones."""
    tail = USUAL + options
    tail += b"\x01" * (-len(tail) & 3)
    offset = (20 + len(tail)) // 4
    tcp = (
        struct.pack(">HHIIBBHHH", source[1], target[1], isn, 0, offset << 4, 2, 64240, 0, 0) + tail
    )
    if ":" not in source[0]:
        head = struct.pack(
            ">BBHHHBBH", 0x40 | (20 + len(ip_options)) // 4, 0, 40 + len(tcp), 0, 0, 64, 6, 0
        )
        ends = socket.inet_aton(source[0]) + socket.inet_aton(target[0])
        return head + ends + ip_options + tcp
    first = extensions[0] if extensions else 6
    body = extensions[1:] + tcp
    head = struct.pack(">IHBB", 6 << 28, len(body), first, 64)
    ends = socket.inet_pton(socket.AF_INET6, source[0]) + socket.inet_pton(
        socket.AF_INET6, target[0]
    )
    return head + ends + body


def with_identity(
    source=CLIENT, target=TARGET, isn=1, *, key=KEY, handle=HANDLE, mac_bytes=8, **more
):
    """A SYN whose option is right for it."""
    option = identity(key, handle, source, target, isn, mac_bytes=mac_bytes)
    return saved(source, target, isn, option, **more)
