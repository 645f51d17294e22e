"""Sets of an nftables table: ranges and keys that rules look up, and keys that rules count.

`appliance.proxy.redirect.nft` puts them into tables. Names and numbers:
linux/netfilter/nf_tables.h; the data types are libnftables', and only `nft list` looks at them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyroute2.netlink import NLM_F_CREATE

from appliance.proxy.redirect.expressions import COUNTER
from appliance.proxy.redirect.netlink import (
    Message,
    Tree,
    agrees,
    be32,
    dump,
    first,
    parse,
    text,
    transact,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

NEWSET, GETSET, DELSET, NEWSETELEM, GETSETELEM, DELSETELEM = range(9, 15)
TYPE_IPV4, TYPE_IPV6, TYPE_PROTOCOL, TYPE_PORT, TYPE_MARK = 7, 8, 12, 13, 19
TYPE_ADDRESS_KIND, TYPE_IFNAME = 38, 41
ELEMENTS_AT_ONCE = 500  # an attribute ends at 64 KiB
_INTERVAL, _TIMEOUT, _EVAL = 0x4, 0x10, 0x20
_HOST_ORDER = struct.pack("=BBI", 0, 4, 1)


@dataclass(frozen=True, slots=True)
class ExactSet:
    """A set of keys; `elements` are (key, is the end of a range)."""

    key_type: int
    key_bytes: int
    elements: frozenset[tuple[bytes, bool]]

    @classmethod
    def of(cls, key_type: int, keys: Sequence[bytes]) -> ExactSet:
        """Return the set of keys of one length; there is one at least."""
        return cls(key_type, len(keys[0]), frozenset((key, False) for key in keys))

    def definition(self) -> Tree:
        """Return the attributes of the set itself."""
        return ((4, be32(self.key_type)), (5, be32(self.key_bytes)), (13, _HOST_ORDER))

    def is_in(self, data: bytes) -> bool:
        """Say whether the kernel's attributes are those of this set."""
        return agrees(self.definition(), data)

    def messages(self, table: str, name: str, number: int) -> list[Message]:
        """Return the messages that make the set; `number` is its own in the transaction."""
        return [*_made(self, table, name, number), *_filled(self.elements, table, name)]


@dataclass(frozen=True, slots=True)
class IntervalSet:
    """A set of ranges; `elements` are (key, is the end of a range)."""

    key_type: int
    key_bytes: int
    elements: frozenset[tuple[bytes, bool]]

    @classmethod
    def of(cls, key_type: int, key_bytes: int, ranges: Iterable[tuple[int, int]]) -> IntervalSet:
        """Return the set of inclusive ranges; those that touch become one."""
        merged: list[list[int]] = []
        for low, high in sorted(ranges):
            if merged and low <= merged[-1][1] + 1:
                merged[-1][1] = max(merged[-1][1], high)
            else:
                merged.append([low, high])
        last = (1 << key_bytes * 8) - 1
        starts = {(low.to_bytes(key_bytes, "big"), False) for low, _ in merged}
        ends = {(high + 1).to_bytes(key_bytes, "big") for _, high in merged if high < last}
        return cls(key_type, key_bytes, frozenset(starts | {(end, True) for end in ends}))

    def definition(self) -> Tree:
        """Return the attributes of the set itself."""
        return ((3, be32(_INTERVAL)), (4, be32(self.key_type)), (5, be32(self.key_bytes)))

    def is_in(self, data: bytes) -> bool:
        """Say whether the kernel's attributes are those of this set."""
        return agrees(self.definition(), data)

    def messages(self, table: str, name: str, number: int) -> list[Message]:
        """Return the messages that make the set; `number` is its own in the transaction."""
        return [*_made(self, table, name, number), *_filled(self.elements, table, name)]


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
        return (*self._shape(), (17, COUNTER))

    def is_in(self, data: bytes) -> bool:
        """Say whether the kernel's attributes are those of this set.

        Its expression is left out: kernels give it back in more than one form.
        """
        return agrees(self._shape(), data)

    def messages(self, table: str, name: str, number: int) -> list[Message]:
        """Return the messages that make the set; `number` is its own in the transaction."""
        return _made(self, table, name, number)

    def _shape(self) -> Tree:
        return (
            (3, be32(_TIMEOUT | _EVAL)),
            (4, be32(self.key_type)),
            (5, be32(self.key_bytes)),
            (9, ((1, be32(self.size)),)),
            (11, struct.pack(">Q", self.timeout_ms)),
        )


AnySet = IntervalSet | ExactSet | DynamicSet


@dataclass(frozen=True, slots=True)
class Element:
    """One key of a set; `age_ms` and the counts are those of a dynamic set."""

    key: bytes
    end: bool
    packets: int
    bytes: int
    age_ms: int


def elements(table: str, name: str, timeout_ms: int = 0) -> list[Element]:
    """Return the elements of a set; `timeout_ms` is the set's own, which the kernel may leave
    out.
    """
    found = []
    for data in dump(GETSETELEM, ((1, text(table)), (2, text(name)))):
        for _, item in parse(first(data, 3) or b""):
            element = _element(item, timeout_ms)
            if element is not None:
                found.append(element)
    return found


def forget(table: str, name: str, keys: Sequence[bytes]) -> None:
    """Remove keys of a set, ELEMENTS_AT_ONCE at most. A key that is not there is an error of the
    kernel's, and none is removed.
    """
    items = tuple((1, ((1, ((1, key),)),)) for key in keys)
    if items:
        transact([(DELSETELEM, 0, ((1, text(table)), (2, text(name)), (3, items)))])


def counts(data: bytes | None) -> tuple[int, int]:
    """Return (packets, bytes) of a counter's attributes."""
    size, packets = first(data or b"", 1), first(data or b"", 2)
    return int.from_bytes(packets or b"", "big"), int.from_bytes(size or b"", "big")


def _element(item: bytes, timeout_ms: int) -> Element | None:
    fields = dict(parse(item))
    key = first(fields.get(1, b""), 1)
    if key is None:
        return None  # the end of everything, which the kernel may give without a key
    packets, size = counts(first(fields.get(7, b""), 2))
    whole = int.from_bytes(fields[4], "big") if 4 in fields else timeout_ms
    age = whole - int.from_bytes(fields[5], "big") if 5 in fields else 0
    return Element(key, bool(fields.get(3, b"\0")[-1] & 1), packets, size, max(age, 0))


def _made(wanted: AnySet, table: str, name: str, number: int) -> list[Message]:
    itself = ((1, text(table)), (2, text(name)), (10, be32(number)))
    return [(NEWSET, NLM_F_CREATE, (*itself, *wanted.definition()))]


def _filled(wanted: frozenset[tuple[bytes, bool]], table: str, name: str) -> list[Message]:
    items: list[tuple[int, Tree]] = []
    for value, end in sorted(wanted):
        flags: Tree = ((3, be32(1)),) if end else ()
        items.append((1, ((1, ((1, value),)), *flags)))
    parts = [items[at : at + ELEMENTS_AT_ONCE] for at in range(0, len(items), ELEMENTS_AT_ONCE)]
    itself = ((1, text(table)), (2, text(name)))
    return [(NEWSETELEM, NLM_F_CREATE, (*itself, (3, tuple(part)))) for part in parts]
