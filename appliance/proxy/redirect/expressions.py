"""The expressions that nftables rules are made of, each as the kernel reads it.

`appliance.proxy.redirect.rules` writes rules with them: a rule is a list of expressions, and goes
on to the next only while they hold. Names and numbers: linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import struct

from appliance.proxy.redirect.netlink import Tree, be32, text

Expression = Tree
Rule = list[Expression]

META_MARK, META_IIFNAME, META_NFPROTO, META_L4PROTO = 3, 6, 15, 16
NETWORK, TRANSPORT = 1, 2  #: bases of `payload`
LOCAL = 2  #: RTN_LOCAL
_FIB_SADDR, _FIB_DADDR, _FIB_IIF, _FIB_PRESENT = 1, 2, 8, 32
_FIB_OIF, _FIB_KIND = 1, 3
_TRANSPARENT, _WILDCARD = 0, 2
_GOTO = -4
_OBJECT_COUNTER = 1
_FLAGS_OF_TCP = 13
_SYN, _ACK = 0x02, 0x10


def expression(name: str, *attributes: tuple[int, bytes | Tree]) -> Expression:
    """Return an expression by its kernel name."""
    return ((1, text(name)), (2, attributes))


#: An anonymous counter, as elements of a dynamic set have.
COUNTER = expression("counter")


def meta(key: int, register: int = 1) -> Expression:
    """Load a meta key into a register."""
    return expression("meta", (1, be32(register)), (2, be32(key)))


def payload(base: int, offset: int, length: int, register: int = 1) -> Expression:
    """Load bytes of the packet, from its network or transport header, into a register."""
    numbers = (register, base, offset, length)
    return expression("payload", *((n, be32(value)) for n, value in enumerate(numbers, 1)))


def load(value: bytes, register: int = 1) -> Expression:
    """Load a constant into a register."""
    return expression("immediate", (1, be32(register)), (2, ((1, value),)))


def equals(value: bytes, *, inverted: bool = False) -> Expression:
    """Continue when register 1 is `value`, or is not."""
    return expression("cmp", (1, be32(1)), (2, be32(inverted)), (3, ((1, value),)))


def in_set(name: str, *, inverted: bool = False) -> Expression:
    """Continue when register 1 is in a set, or is not."""
    return expression("lookup", (1, text(name)), (2, be32(1)), (5, be32(inverted)))


def set_mark(mark: int) -> Rule:
    """Set the packet's mark, which the policy rules look at."""
    return [load(struct.pack("=I", mark)), expression("meta", (2, be32(META_MARK)), (3, be32(1)))]


def transparent_socket() -> Rule:
    """Continue when the packet, or what an ICMP error is about, belongs to a transparent socket of
    this host, be it a listener, connected, or in TIME_WAIT.
    """
    return [_socket(_TRANSPARENT), equals(b"\1")]


def wildcard_socket(*, inverted: bool = False) -> Rule:
    """Continue when the packet's socket is bound to every address, as a listener is, or is not.

    The rule ends when the socket is none that can tell: a half-open one, or in TIME_WAIT
    (net/netfilter/nft_socket.c).
    """
    return [_socket(_WILDCARD), equals(b"\0" if inverted else b"\1")]


def kind_of_destination() -> Expression:
    """Load what the destination is to this host: local, broadcast, unicast... (RTN_*)."""
    return expression("fib", (1, be32(1)), (2, be32(_FIB_KIND)), (3, be32(_FIB_DADDR)))


def from_local() -> Rule:
    """Continue when the source is an address of this host."""
    kind = expression("fib", (1, be32(1)), (2, be32(_FIB_KIND)), (3, be32(_FIB_SADDR)))
    return [kind, equals(struct.pack("=I", LOCAL))]


def to_local() -> Rule:
    """Continue when the destination is an address of this host."""
    return [kind_of_destination(), equals(struct.pack("=I", LOCAL))]


def source_elsewhere() -> Rule:
    """Continue when no route leads back to the source through the interface that the packet came in
    on.
    """
    flags = _FIB_SADDR | _FIB_IIF | _FIB_PRESENT
    found = expression("fib", (1, be32(1)), (2, be32(_FIB_OIF)), (3, be32(flags)))
    return [found, equals(bytes(4))]


def opens_no_connection() -> Rule:
    """Continue when a TCP packet is no SYN without ACK."""
    flags = payload(TRANSPORT, _FLAGS_OF_TCP, 1)
    both = bytes([_SYN | _ACK])
    masked = expression(
        "bitwise", (1, be32(1)), (2, be32(1)), (3, be32(1)), (4, ((1, both),)), (5, ((1, b"\0"),))
    )
    return [flags, masked, equals(bytes([_SYN]), inverted=True)]


def to_listener(family: int, port: int) -> Rule:
    """Give the packet to the transparent listener on `port`; the rule ends here when there is
    none.
    """
    return [load(struct.pack(">H", port)), expression("tproxy", (1, be32(family)), (3, be32(1)))]


def strip_option(kind: int) -> Expression:
    """Overwrite a TCP option with no-operations. Any further attribute makes the kernel refuse the
    rule.
    """
    return expression("exthdr", (2, bytes([kind])), (6, be32(1)))


def reject_port() -> Expression:
    """Answer with "port unreachable" of the packet's family."""
    return expression("reject", (1, be32(2)), (2, b"\1"))


def count(name: str) -> Expression:
    """Count in a named counter."""
    return expression("objref", (1, be32(_OBJECT_COUNTER)), (2, text(name)))


def remember(name: str) -> Expression:
    """Make or find the element of a dynamic set whose key starts in register 1, and count it; the
    rule ends when the set is full.
    """
    return expression("dynset", (1, text(name)), (3, be32(0)), (4, be32(1)))


def goto(chain: str) -> Expression:
    """Go on in another chain and do not come back."""
    return expression("immediate", (1, be32(0)), (2, ((2, ((1, be32(_GOTO)), (2, text(chain)))),)))


def _socket(key: int) -> Expression:
    return expression("socket", (1, be32(key)), (2, be32(1)))


def _verdict(code: int) -> Expression:
    return expression("immediate", (1, be32(0)), (2, ((2, ((1, be32(code)),)),)))


DROP, ACCEPT = _verdict(0), _verdict(1)
