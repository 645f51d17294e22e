"""The identity option of a SYN: found in what the kernel kept of the SYN, and verified.

`appliance.attribution.join` calls it once per accepted connection, with what
getsockopt(TCP_SAVED_SYN) gave: the IP and TCP headers, nothing else. It does no I/O and never
raises on any bytes: a SYN is written by strangers.

On the wire (RFC 6994 shared experimental option; `ebpf/programs` writes it), little-endian numbers:

    253 | length 20 or 16 | "NH" | handle, 8 bytes | MAC, 8 or 4 bytes

The MAC is SipHash-2-4 under a key that sensor and gate share, over six 64-bit words: the handle;
ISN << 32 | source port << 16 | destination port; and the addresses. The kernel loads ports, ISN and
addresses as they lie in the packet, so on a little-endian machine each word is a rearrangement of
the packet's bytes and no number is ever decoded. An IPv4 SYN leaves the last three words zero.
"""

from __future__ import annotations

from hmac import compare_digest
from typing import TYPE_CHECKING, NamedTuple

from siphash24 import siphash24

if TYPE_CHECKING:
    from collections.abc import Iterable

KIND = 253
EXID = b"NH"
_END, _NOP = 0, 1
_V4_REST = bytes(24)
_TCP = 6
#: IPv6 extension headers that may stand before TCP: hop-by-hop, routing, destination (RFC 8200).
_EXTENSIONS = frozenset({0, 43, 60})
_MOST_EXTENSIONS = 8


class SynOption(NamedTuple):
    """An identity option as it was claimed; nothing in it is true before `verified`."""

    handle: int
    mac: bytes  #: 8 or 4 bytes; empty when the option had another length, which never verifies
    message: bytes  #: the 48 bytes that the MAC is computed over


def find(saved: bytes) -> SynOption | None:
    """Return the identity option of a saved SYN; None without one, or when it makes no sense."""
    size = len(saved)
    if size < 40:
        return None
    version = saved[0] >> 4
    if version == 4:
        tcp = (saved[0] & 15) << 2
        if tcp < 20 or saved[9] != _TCP:
            return None
    elif version == 6:
        tcp = 40 if saved[6] == _TCP else _after_extensions(saved)
        if not tcp:
            return None
    else:
        return None
    if tcp + 20 > size:
        return None
    end = tcp + (saved[tcp + 12] >> 4 << 2)
    at = tcp + 20
    if end > size:
        return None
    while at + 1 < end:
        kind = saved[at]
        if kind == _NOP:
            at += 1
            continue
        length = saved[at + 1]
        if kind == _END or length < 2 or at + length > end:
            return None
        if kind == KIND and saved[at + 2 : at + 4] == EXID:
            return _claimed(saved, tcp, at, length)
        at += length
    return None


def _claimed(saved: bytes, tcp: int, at: int, length: int) -> SynOption:
    handle = saved[at + 4 : at + 12]
    words = handle + saved[tcp + 2 : tcp + 4] + saved[tcp : tcp + 2] + saved[tcp + 4 : tcp + 8]
    if saved[0] >> 4 == 4:
        message = words + saved[16:20] + saved[12:16] + _V4_REST
    else:
        message = words + b"".join(
            [saved[n + 4 : n + 8] + saved[n : n + 4] for n in (8, 16, 24, 32)]
        )
    mac = saved[at + 12 : at + length] if length in {20, 16} else b""
    return SynOption(int.from_bytes(handle, "little"), mac, message)


def _after_extensions(saved: bytes) -> int:
    """Return where TCP starts after IPv6 extension headers; 0 when it is not found."""
    following, at = saved[6], 40
    for _ in range(_MOST_EXTENSIONS):
        if following not in _EXTENSIONS or at + 8 > len(saved):
            return 0
        following, at = saved[at], at + 8 + (saved[at + 1] << 3)
        if following == _TCP:
            return at
    return 0


def verified(option: SynOption, keys: Iterable[bytes]) -> int | None:
    """Return the full 64-bit MAC when one of `keys` (16 bytes each) made the option's; else None.

    The full MAC stands for this very SYN, also when the option carried only half of it: the replay
    cache keeps it.
    """
    mac = option.mac
    if not mac:
        return None
    for key in keys:
        whole = siphash24(option.message, key=key).digest()
        if compare_digest(whole[: len(mac)], mac):
            return int.from_bytes(whole, "little")
    return None
