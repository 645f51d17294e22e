"""One nftables table: what it shall hold, one atomic replacement, and reading it all back.

`appliance.proxy.redirect.rules` builds a `Table`, `replace` makes the kernel's table equal to it in
one transaction, and `differences` says where the kernel's table is something else. Names and
numbers: linux/netfilter/nf_tables.h. Nothing here knows what the rules are for, and no other table
is ever touched.

Counters and sets that rules fill outlive a replacement, so that nothing that was counted is lost by
it. Two processes may change the table at one time (the gate counts flows, somebody applies): a
transaction names a rule that must still be the one that was read, and fails with `Overtaken`
otherwise.
"""

from __future__ import annotations

import errno
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pyroute2.netlink import NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL
from pyroute2.netlink.exceptions import NetlinkError

from appliance.proxy.redirect.netlink import (
    Message,
    Tree,
    agrees,
    be32,
    dump,
    first,
    get,
    text,
    transact,
)
from appliance.proxy.redirect.sets import DELSET, GETSET, AnySet, DynamicSet, counts, elements

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from appliance.proxy.redirect.expressions import Rule

NEWTABLE, GETTABLE, DELTABLE, NEWCHAIN, GETCHAIN, DELCHAIN, NEWRULE, GETRULE, DELRULE = range(9)
NEWOBJ, GETOBJ, DELOBJ, GETOBJ_RESET = range(18, 22)
PREROUTING, MANGLE = 0, -150
_ACCEPT = 1
_OBJECT_COUNTER = 1
_OVERTAKEN = {errno.ENOENT, errno.EEXIST, errno.EBUSY}


class Overtaken(Exception):
    """Somebody else changed the table since it was read; nothing was done. Read it again."""


@dataclass(slots=True)
class Table:
    """What a table of family inet shall hold. `base` is the chain at prerouting; the rules of a
    chain are in order.
    """

    name: str
    base: str
    chains: dict[str, list[Rule]] = field(default_factory=dict)
    sets: dict[str, AnySet] = field(default_factory=dict)
    counters: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Applied:
    """What the kernel has of a table: attributes of each object, by name."""

    name: str
    exists: bool
    asleep: bool  #: its chains are not called (a flag that `nft` can set)
    chains: dict[str, bytes]
    rules: dict[str, list[bytes]]
    sets: dict[str, bytes]
    counters: dict[str, tuple[int, int]]  #: (packets, bytes)


def read(name: str) -> Applied:
    """Return what the kernel has of a table."""
    wanted = text(name)
    tables = [data for data in dump(GETTABLE) if first(data, 1) == wanted]
    chains = {_name(data, 3): data for data in dump(GETCHAIN) if first(data, 1) == wanted}
    sets = {_name(d, 2): d for d in dump(GETSET, ((1, wanted),)) if first(d, 1) == wanted}
    rules: dict[str, list[bytes]] = {}
    for data in dump(GETRULE, ((1, wanted),)):
        if first(data, 1) == wanted:
            rules.setdefault(_name(data, 2), []).append(data)
    asleep = any(any(first(data, 2) or b"") for data in tables)
    return Applied(name, bool(tables), asleep, chains, rules, sets, counters(name))


def exists(name: str) -> bool:
    """Say whether the table is there."""
    return any(first(data, 1) == text(name) for data in dump(GETTABLE))


def counters(table: str) -> dict[str, tuple[int, int]]:
    """Return (packets, bytes) of each named counter of a table."""
    found = {}
    for data in dump(GETOBJ, ((1, text(table)), (3, be32(_OBJECT_COUNTER)))):
        if first(data, 1) == text(table):
            found[_name(data, 2)] = counts(first(data, 4))
    return found


def reset_counter(table: str, name: str) -> tuple[int, int]:
    """Set a named counter to zero and return what it had, with nothing lost in between."""
    key: Tree = ((1, text(table)), (2, text(name)), (3, be32(_OBJECT_COUNTER)))
    answers = get(GETOBJ_RESET, key)
    return counts(first(answers[0], 4)) if answers else (0, 0)


def differences(table: Table, applied: Applied) -> list[str]:
    """Say, one text each, where the kernel's table is something else; empty when it is what is
    wanted.
    """
    if not applied.exists:
        return [f"table inet {table.name} is missing"]
    found = [f"table inet {table.name} is asleep"] * applied.asleep
    found += [f"chain {name} is not ours" for name in applied.chains if name not in table.chains]
    found += [f"set {name} is not ours" for name in applied.sets if name not in table.sets]
    missing = [name for name in table.counters if name not in applied.counters]
    found += [f"counter {name} is missing" for name in missing]
    for name, rules in table.chains.items():
        found += _chain_differences(table, name, rules, applied)
    for name, wanted in table.sets.items():
        found += _set_differences(table.name, name, wanted, applied.sets.get(name))
    return found


def replace(table: Table, applied: Applied) -> None:
    """Make the kernel's table, which was read as `applied`, what is wanted, in one transaction.

    Counters, and sets that rules fill, keep what they counted. Raises Overtaken, NetlinkError.
    """
    key: tuple[int, bytes] = (1, text(table.name))
    fresh = 0 if applied.exists else NLM_F_EXCL
    messages: list[Message] = [(NEWTABLE, NLM_F_CREATE | fresh, (key, (2, be32(0))))]
    kept = {name for name, data in applied.sets.items() if _kept(table, name, data)}
    if applied.exists:
        messages += _witness(applied)
        messages.append((DELRULE, 0, (key,)))
        stale = [name for name, data in applied.chains.items() if not _usable(table, name, data)]
        messages += [(DELCHAIN, 0, (key, (3, text(name)))) for name in stale]
        gone = [name for name in applied.sets if name not in kept]
        messages += [(DELSET, 0, (key, (2, text(name)))) for name in gone]
    for name in table.counters:
        counter: Tree = (key, (2, text(name)), (3, be32(_OBJECT_COUNTER)), (4, ()))
        messages.append((NEWOBJ, NLM_F_CREATE, counter))
    for number, (name, wanted) in enumerate(table.sets.items(), 1):
        if name not in kept:
            messages += wanted.messages(table.name, name, number)
    for name in table.chains:
        messages.append((NEWCHAIN, NLM_F_CREATE, (key, *_chain(table, name))))
    for name, rules in table.chains.items():
        messages += [_new_rule(table.name, name, rule) for rule in rules]
    with _overtaken():
        transact(messages)


def rules_in(table: str, chains: Iterable[str]) -> dict[str, list[bytes]]:
    """Return the attributes of the rules of some chains; a chain that is not there has none."""
    found: dict[str, list[bytes]] = {}
    for name in chains:
        for data in dump(GETRULE, ((1, text(table)), (2, text(name)))):
            if first(data, 1) == text(table) and first(data, 2) == text(name):
                found.setdefault(name, []).append(data)
    return found


def rewrite(table: str, old: dict[str, list[bytes]], new: dict[str, list[Rule]]) -> None:
    """Give chains, whose rules were read as `old`, others, in one transaction.

    Raises Overtaken, NetlinkError.
    """
    messages: list[Message] = []
    for name, rules in new.items():
        messages += [_old_rule(table, name, rule) for rule in old.get(name, [])]
        messages += [_new_rule(table, name, rule) for rule in rules]
    with _overtaken():
        transact(messages)


def remove(table: str) -> None:
    """Remove a table and all in it. Raises NetlinkError."""
    transact([(DELTABLE, 0, ((1, text(table)),))])


@contextmanager
def _overtaken() -> Iterator[None]:
    """Turn the kernel's word for "that is not as you said" into Overtaken."""
    try:
        yield
    except NetlinkError as refused:
        if refused.code in _OVERTAKEN:
            raise Overtaken(str(refused)) from refused
        raise


def _witness(applied: Applied) -> list[Message]:
    """Return messages that fail when a chain's first rule is not what was read."""
    return [_old_rule(applied.name, name, rules[0]) for name, rules in applied.rules.items()]


def _old_rule(table: str, chain: str, data: bytes) -> Message:
    handle = first(data, 3) or b""
    return DELRULE, 0, ((1, text(table)), (2, text(chain)), (3, handle))


def _new_rule(table: str, chain: str, rule: Rule) -> Message:
    expressions = tuple((1, expression) for expression in rule)
    attributes: Tree = ((1, text(table)), (2, text(chain)), (4, expressions))
    return NEWRULE, NLM_F_CREATE | NLM_F_APPEND, attributes


def _chain(table: Table, name: str) -> Tree:
    if name != table.base:
        return ((3, text(name)),)
    hook: Tree = ((1, be32(PREROUTING)), (2, be32(MANGLE)))
    return ((3, text(name)), (4, hook), (5, be32(_ACCEPT)), (7, text("filter")))


def _usable(table: Table, name: str, data: bytes) -> bool:
    """Say whether a chain can stay: ours, and at the hook where it belongs, or at none."""
    hooked = first(data, 4) is not None
    right_place = hooked == (name == table.base)
    return name in table.chains and right_place and agrees(_chain(table, name), data)


def _kept(table: Table, name: str, data: bytes) -> bool:
    """Say whether a set can stay: one that rules fill, as it is wanted. Others are made anew with
    their elements.
    """
    wanted = table.sets.get(name)
    return isinstance(wanted, DynamicSet) and wanted.is_in(data)


def _chain_differences(
    table: Table, name: str, rules: Iterable[Rule], applied: Applied
) -> list[str]:
    data = applied.chains.get(name)
    if data is None or not _usable(table, name, data):
        return [f"chain {name} is {'missing' if data is None else 'another'}"]
    wanted, present = list(rules), applied.rules.get(name, [])
    if len(present) != len(wanted):
        return [f"chain {name} has {len(present)} rules instead of {len(wanted)}"]
    return [
        f"rule {number} of chain {name} is another"
        for number, (rule, data) in enumerate(zip(wanted, present, strict=True), 1)
        if not agrees(((4, tuple((1, expression) for expression in rule)),), data)
    ]


def _set_differences(table: str, name: str, wanted: AnySet, data: bytes | None) -> list[str]:
    if data is None or not wanted.is_in(data):
        return [f"set {name} is {'missing' if data is None else 'another'}"]
    if isinstance(wanted, DynamicSet):
        return []
    present = {(element.key, element.end) for element in elements(table, name)}
    return [] if present == wanted.elements else [f"set {name} has other elements"]


def _name(data: bytes, kind: int) -> str:
    return (first(data, kind) or b"\0")[:-1].decode("utf-8", "backslashreplace")
