"""The parts of an nftables table: expressions, rules, chains, sets, counters; one atomic
replacement; and reading it all back.

`appliance.proxy.redirect.rules` builds a `Table` with it, `replace` makes the kernel's table equal
to it in one transaction, and `differences` says where the kernel's table is something else. Names
and numbers: linux/netfilter/nf_tables.h. Nothing here knows what the rules are for, and no other
table is ever touched.

Counters and dynamic sets outlive a replacement, so that nothing that was counted is lost by it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from pyroute2.netlink import NLM_F_APPEND, NLM_F_CREATE

from appliance.proxy.redirect.netlink import (
    Tree,
    agrees,
    be32,
    dump,
    first,
    get,
    parse,
    text,
    transact,
)

NEWTABLE, GETTABLE, DELTABLE, NEWCHAIN, GETCHAIN, DELCHAIN = range(6)
NEWRULE, GETRULE, DELRULE, NEWSET, GETSET, DELSET = range(6, 12)
NEWSETELEM, GETSETELEM, DELSETELEM = range(12, 15)
NEWOBJ, GETOBJ, DELOBJ, GETOBJ_RESET = range(18, 22)

PREROUTING, MANGLE = 0, -150
TYPE_IPV4, TYPE_IPV6, TYPE_PROTOCOL, TYPE_PORT, TYPE_MARK, TYPE_IFNAME = 7, 8, 12, 13, 19, 41
META_MARK, META_IIFNAME, META_NFPROTO, META_L4PROTO = 3, 6, 15, 16
FIB_SADDR, FIB_DADDR, FIB_IIF, FIB_PRESENT = 1, 2, 8, 32
NETWORK, TRANSPORT = 1, 2  #: bases of `payload`
_SET_INTERVAL, _SET_TIMEOUT, _SET_EVAL = 0x4, 0x10, 0x20
_OBJECT_COUNTER = 1
_ELEMENTS_AT_ONCE = 500  # an attribute ends at 64 KiB
_GOTO = -4
_HOST_ORDER = struct.pack("=BBI", 0, 4, 1)  # of keys; only `nft list` looks at it

Expression = Tree


def _expression(name: str, *attributes: tuple[int, bytes | Tree]) -> Expression:
    return ((1, text(name)), (2, attributes))


def meta(key: int, register: int = 1) -> Expression:
    """Load a meta key into a register."""
    return _expression("meta", (1, be32(register)), (2, be32(key)))


def payload(base: int, offset: int, length: int, register: int = 1) -> Expression:
    """Load bytes of the packet, from its network or transport header, into a register."""
    numbers = (register, base, offset, length)
    return _expression("payload", *((n, be32(value)) for n, value in enumerate(numbers, 1)))


def load(value: bytes, register: int = 1) -> Expression:
    """Load a constant into a register."""
    return _expression("immediate", (1, be32(register)), (2, ((1, value),)))


def equals(value: bytes) -> Expression:
    """Continue when register 1 is `value`."""
    return _expression("cmp", (1, be32(1)), (2, be32(0)), (3, ((1, value),)))


def in_set(name: str, *, inverted: bool = False) -> Expression:
    """Continue when register 1 is in a set, or is not."""
    return _expression("lookup", (1, text(name)), (2, be32(1)), (5, be32(inverted)))


def set_mark(mark: int) -> list[Expression]:
    """Set the packet's mark, which the policy rules look at."""
    return [load(struct.pack("=I", mark)), _expression("meta", (2, be32(META_MARK)), (3, be32(1)))]


def own_sockets() -> list[Expression]:
    """Continue when the packet, or what an ICMP error is about, belongs to a transparent socket
    that is no listener.
    """
    transparent = _expression("socket", (1, be32(0)), (2, be32(1)))
    wildcard = _expression("socket", (1, be32(2)), (2, be32(1)))
    return [transparent, equals(b"\1"), wildcard, equals(b"\0")]


def to_local() -> list[Expression]:
    """Continue when the destination is an address of this host."""
    found = _expression("fib", (1, be32(1)), (2, be32(3)), (3, be32(FIB_DADDR)))
    return [found, equals(struct.pack("=I", 2))]


def source_elsewhere() -> list[Expression]:
    """Continue when no route leads back to the source through the interface that the packet came in
    on.
    """
    flags = FIB_SADDR | FIB_IIF | FIB_PRESENT
    return [_expression("fib", (1, be32(1)), (2, be32(1)), (3, be32(flags))), equals(bytes(4))]


def to_listener(family: int, port: int) -> list[Expression]:
    """Give the packet to the transparent listener on `port`; the rule ends here when there is
    none.
    """
    return [load(struct.pack(">H", port)), _expression("tproxy", (1, be32(family)), (3, be32(1)))]


def strip_option(kind: int) -> Expression:
    """Overwrite a TCP option with no-operations. Any further attribute makes the kernel refuse the
    rule.
    """
    return _expression("exthdr", (2, bytes([kind])), (6, be32(1)))


def reject_port() -> Expression:
    """Answer with "port unreachable" of the packet's family."""
    return _expression("reject", (1, be32(2)), (2, b"\1"))


def count(name: str) -> Expression:
    """Count in a named counter."""
    return _expression("objref", (1, be32(_OBJECT_COUNTER)), (2, text(name)))


def remember(name: str) -> Expression:
    """Make or find the element of a dynamic set whose key starts in register 1; the rule ends when
    the set is full.
    """
    return _expression("dynset", (1, text(name)), (3, be32(0)), (4, be32(1)))


def goto(chain: str) -> Expression:
    """Go on in another chain and do not come back."""
    return _expression("immediate", (1, be32(0)), (2, ((2, ((1, be32(_GOTO)), (2, text(chain)))),)))


def _verdict(code: int) -> Expression:
    return _expression("immediate", (1, be32(0)), (2, ((2, ((1, be32(code)),)),)))


DROP, ACCEPT = _verdict(0), _verdict(1)


@dataclass(frozen=True, slots=True)
class IntervalSet:
    """A set of ranges; `elements` are (key, is the end of a range)."""

    key_type: int
    key_bytes: int
    elements: frozenset[tuple[bytes, bool]]

    @classmethod
    def of(cls, key_type: int, key_bytes: int, ranges: list[tuple[int, int]]) -> IntervalSet:
        """Return the set of inclusive ranges; those that touch become one."""
        merged: list[list[int]] = []
        for low, high in sorted(ranges):
            if merged and low <= merged[-1][1] + 1:
                merged[-1][1] = max(merged[-1][1], high)
            else:
                merged.append([low, high])
        elements = {(low.to_bytes(key_bytes, "big"), False) for low, _ in merged}
        last = (1 << key_bytes * 8) - 1
        elements |= {
            ((high + 1).to_bytes(key_bytes, "big"), True) for _, high in merged if high < last
        }
        return cls(key_type, key_bytes, frozenset(elements))

    def definition(self) -> Tree:
        """Return the attributes of the set itself."""
        return ((3, be32(_SET_INTERVAL)), (4, be32(self.key_type)), (5, be32(self.key_bytes)))


@dataclass(frozen=True, slots=True)
class ExactSet:
    """A set of single keys."""

    key_type: int
    key_bytes: int
    elements: frozenset[tuple[bytes, bool]]

    def definition(self) -> Tree:
        """Return the attributes of the set itself."""
        return ((4, be32(self.key_type)), (5, be32(self.key_bytes)), (13, _HOST_ORDER))


@dataclass(frozen=True, slots=True)
class DynamicSet:
    """A set that rules fill, each element with a counter; `timeout_ms` counts from an element's
    first packet.
    """

    key_type: int
    key_bytes: int
    size: int
    timeout_ms: int

    def definition(self) -> Tree:
        """Return the attributes of the set itself."""
        return (
            (3, be32(_SET_TIMEOUT | _SET_EVAL)),
            (4, be32(self.key_type)),
            (5, be32(self.key_bytes)),
            (9, ((1, be32(self.size)),)),
            (11, struct.pack(">Q", self.timeout_ms)),
            (17, _expression("counter")),
        )


AnySet = IntervalSet | ExactSet | DynamicSet


@dataclass(slots=True)
class Table:
    """What a table of family inet shall hold. `base` is the chain at prerouting; the rules of a
    chain are in order.
    """

    name: str
    base: str
    chains: dict[str, list[list[Expression]]] = field(default_factory=dict)
    sets: dict[str, AnySet] = field(default_factory=dict)
    counters: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Applied:
    """What the kernel has of a table: attributes of each object, by name."""

    exists: bool
    chains: dict[str, bytes]
    rules: dict[str, list[bytes]]
    sets: dict[str, bytes]
    counters: dict[str, tuple[int, int]]  #: (packets, bytes)


@dataclass(frozen=True, slots=True)
class Element:
    """One key of a set; `age_ms` and the counts are those of a dynamic set."""

    key: bytes
    end: bool
    packets: int
    bytes: int
    age_ms: int


def read(name: str) -> Applied:
    """Return what the kernel has of a table."""
    wanted = text(name)
    chains, sets = {}, {}
    rules: dict[str, list[bytes]] = {}
    for data in dump(GETCHAIN):
        if first(data, 1) == wanted:
            chains[_name(data, 3)] = data
    for data in dump(GETRULE, ((1, wanted),)):
        if first(data, 1) == wanted:
            rules.setdefault(_name(data, 2), []).append(data)
    for data in dump(GETSET, ((1, wanted),)):
        if first(data, 1) == wanted:
            sets[_name(data, 2)] = data
    exists = any(first(data, 1) == wanted for data in dump(GETTABLE))
    return Applied(exists, chains, rules, sets, counters(name))


def counters(table: str) -> dict[str, tuple[int, int]]:
    """Return (packets, bytes) of each named counter of a table."""
    found = {}
    for data in dump(GETOBJ, ((1, text(table)), (3, be32(_OBJECT_COUNTER)))):
        if first(data, 1) == text(table):
            found[_name(data, 2)] = _counts(first(data, 4))
    return found


def reset_counter(table: str, name: str) -> tuple[int, int]:
    """Set a named counter to zero and return what it had, with nothing lost in between."""
    key: Tree = ((1, text(table)), (2, text(name)), (3, be32(_OBJECT_COUNTER)))
    answers = get(GETOBJ_RESET, key)
    return _counts(first(answers[0], 4)) if answers else (0, 0)


def elements(table: str, name: str, timeout_ms: int = 0) -> list[Element]:
    """Return the elements of a set; `timeout_ms` is the set's own, which the kernel may leave
    out.
    """
    found = []
    for data in dump(GETSETELEM, ((1, text(table)), (2, text(name)))):
        for _, item in parse(first(data, 3) or b""):
            key = first(item, 1, 1)
            if key is None:
                continue
            flags, timeout, expires = first(item, 3), first(item, 4), first(item, 5)
            packets, size = _counts(first(item, 7, 2))
            whole = int.from_bytes(timeout, "big") if timeout else timeout_ms
            age = whole - int.from_bytes(expires, "big") if expires else 0
            end = bool(flags and flags[-1] & 1)
            found.append(Element(key, end, packets, size, max(age, 0)))
    return found


def differences(table: Table) -> list[str]:
    """Say, one text each, where the kernel's table is something else; empty when it is what is
    wanted.
    """
    applied = read(table.name)
    if not applied.exists:
        return [f"table inet {table.name} is missing"]
    found = [f"chain {name} is not ours" for name in applied.chains if name not in table.chains]
    found += [f"set {name} is not ours" for name in applied.sets if name not in table.sets]
    found += [
        f"counter {name} is missing" for name in table.counters if name not in applied.counters
    ]
    for name, rules in table.chains.items():
        found += _chain_differences(table, name, rules, applied)
    for name, wanted in table.sets.items():
        data = applied.sets.get(name)
        if data is None or not agrees(_without_expression(wanted.definition()), data):
            found.append(f"set {name} is {'missing' if data is None else 'another'}")
        elif not isinstance(wanted, DynamicSet):
            present = {(element.key, element.end) for element in elements(table.name, name)}
            if present != wanted.elements:
                found.append(f"set {name} has other elements")
    return found


def replace(table: Table) -> None:
    """Make the kernel's table what is wanted, in one transaction; counters and dynamic sets keep
    what they counted.
    """
    applied = read(table.name)
    key: tuple[int, bytes] = (1, text(table.name))
    messages: list[tuple[int, int, Tree]] = [(NEWTABLE, NLM_F_CREATE, (key,))]
    if applied.exists:
        messages.append((DELRULE, 0, (key,)))
        stale = [name for name, data in applied.chains.items() if not _usable(table, name, data)]
        messages += [(DELCHAIN, 0, (key, (3, text(name)))) for name in stale]
        kept = {name for name, data in applied.sets.items() if _kept(table, name, data)}
        messages += [
            (DELSET, 0, (key, (2, text(name)))) for name in applied.sets if name not in kept
        ]
    else:
        kept = set()
    for name in table.counters:
        messages.append(
            (NEWOBJ, NLM_F_CREATE, (key, (2, text(name)), (3, be32(_OBJECT_COUNTER)), (4, ())))
        )
    for number, (name, wanted) in enumerate(table.sets.items(), 1):
        if name not in kept:
            messages += _new_set(key, name, wanted, number)
    for name in table.chains:
        messages.append((NEWCHAIN, NLM_F_CREATE, (key, *_chain(table, name))))
    for name, rules in table.chains.items():
        messages += rule_messages(table.name, name, rules)
    transact(messages)


def remove(table: str) -> None:
    """Remove a table and all in it."""
    transact([(DELTABLE, 0, ((1, text(table)),))])


def forget(table: str, name: str, keys: list[bytes]) -> None:
    """Remove keys of a set; all of them when `keys` is empty. Keys that are not there are an error
    of the kernel's.
    """
    items = tuple((1, ((1, ((1, key),)),)) for key in keys)
    transact(
        [(DELSETELEM, 0, ((1, text(table)), (2, text(name)), *(((3, items),) if keys else ())))]
    )


def rule_messages(
    table: str, chain: str, rules: list[list[Expression]]
) -> list[tuple[int, int, Tree]]:
    """Return the messages that append rules to a chain."""
    return [
        (
            NEWRULE,
            NLM_F_CREATE | NLM_F_APPEND,
            (
                (1, text(table)),
                (2, text(chain)),
                (4, tuple((1, expression) for expression in rule)),
            ),
        )
        for rule in rules
    ]


def _chain(table: Table, name: str) -> Tree:
    if name != table.base:
        return ((3, text(name)),)
    hook: Tree = ((1, be32(PREROUTING)), (2, be32(MANGLE)))
    return ((3, text(name)), (4, hook), (5, be32(1)), (7, text("filter")))


def _usable(table: Table, name: str, data: bytes) -> bool:
    """Say whether a chain can stay: ours, and at the hook where it belongs, or at none."""
    hooked = first(data, 4) is not None
    return (
        name in table.chains
        and hooked == (name == table.base)
        and agrees(_chain(table, name), data)
    )


def _kept(table: Table, name: str, data: bytes) -> bool:
    """Say whether a set can stay: one that rules fill, as it is wanted. Others are made anew with
    their elements.
    """
    wanted = table.sets.get(name)
    return isinstance(wanted, DynamicSet) and agrees(_without_expression(wanted.definition()), data)


def _without_expression(definition: Tree) -> Tree:
    """Leave out the set's expression, which kernels give back in more than one form."""
    return tuple(attribute for attribute in definition if attribute[0] != 17)


def _new_set(
    key: tuple[int, bytes], name: str, wanted: AnySet, number: int
) -> list[tuple[int, int, Tree]]:
    definition = (key, (2, text(name)), (10, be32(number)), *wanted.definition())
    messages: list[tuple[int, int, Tree]] = [(NEWSET, NLM_F_CREATE, definition)]
    if isinstance(wanted, DynamicSet):
        return messages
    items: list[tuple[int, Tree]] = []
    for value, end in sorted(wanted.elements):
        flags: Tree = ((3, be32(1)),) if end else ()
        items.append((1, ((1, ((1, value),)), *flags)))
    for at in range(0, len(items), _ELEMENTS_AT_ONCE):
        part = tuple(items[at : at + _ELEMENTS_AT_ONCE])
        messages.append((NEWSETELEM, NLM_F_CREATE, (key, (2, text(name)), (3, part))))
    return messages


def _chain_differences(
    table: Table, name: str, rules: list[list[Expression]], applied: Applied
) -> list[str]:
    data = applied.chains.get(name)
    if data is None or not _usable(table, name, data):
        return [f"chain {name} is {'missing' if data is None else 'another'}"]
    present = applied.rules.get(name, [])
    if len(present) != len(rules):
        return [f"chain {name} has {len(present)} rules instead of {len(rules)}"]
    return [
        f"rule {number} of chain {name} is another"
        for number, (wanted, rule) in enumerate(zip(rules, present, strict=True), 1)
        if not agrees(((4, tuple((1, expression) for expression in wanted)),), rule)
    ]


def _name(data: bytes, kind: int) -> str:
    return (first(data, kind) or b"\0")[:-1].decode("utf-8", "backslashreplace")


def _counts(data: bytes | None) -> tuple[int, int]:
    """Return (packets, bytes) of a counter's data."""
    size, packets = first(data or b"", 1), first(data or b"", 2)
    return int.from_bytes(packets or b"", "big"), int.from_bytes(size or b"", "big")
