"""Where members of the running kernel's structs lie, from the type data that the kernel publishes.

`ebpf.loader` asks once, at start; the programs follow the pointers at these offsets. The format is
that of Documentation/bpf/btf.rst: a header, types in a row (a type's number is its place in the
row), and strings. Only structs and unions are looked into. About 0.1 s for a whole kernel.
"""

from __future__ import annotations

import struct
from array import array
from pathlib import Path
from typing import Final

VMLINUX: Final = Path("/sys/kernel/btf/vmlinux")

_HEADER = struct.Struct("=HBBIIIII")
_MAGIC = 0xEB9F
_HEAD = struct.Struct("=III")
_MEMBER = struct.Struct("=III")
_STRUCT, _UNION = 4, 5
#: Bytes after a type's 12-byte head: (fixed, per entry), by kind; kinds that are not here have
#: none.
_REST: Final = {
    1: (4, 0), 3: (12, 0), 4: (0, 12), 5: (0, 12), 6: (0, 8), 13: (0, 8), 14: (4, 0), 15: (0, 12),
    17: (4, 0), 19: (0, 12),
}  # fmt: skip


class TypesMissing(Exception):
    """The kernel publishes no type data, or a struct is not in it."""


class Types:
    """The struct types of one kernel."""

    def __init__(self, path: Path = VMLINUX) -> None:
        """Read them; TypesMissing when they are not there or make no sense."""
        try:
            self._data = path.read_bytes()
            magic, _, _, head, types, size, strings, strings_size = _HEADER.unpack_from(self._data)
        except (OSError, struct.error) as wrong:
            raise TypesMissing(f"no kernel types at {path}: {wrong}") from wrong
        if magic != _MAGIC:
            raise TypesMissing(f"{path} holds no type data of this machine's byte order")
        self._strings = head + strings
        self._strings_end = self._strings + strings_size
        self._places = array("I", [0])
        self._structs: dict[int, int] = {}
        self._walk(head + types, head + types + size)

    def offset(self, name: str, member: str) -> int:
        """Return the offset in bytes of a member of struct `name`, also of one in a nested struct
        without a name; TypesMissing when there is none.
        """
        place = self._structs.get(self._string(name))
        found = None if place is None else self._member(place, self._string(member))
        if found is None:
            raise TypesMissing(f"this kernel has no {name}.{member}")
        return found

    def _walk(self, at: int, end: int) -> None:
        """Note where each type begins, and the first struct of every name."""
        unpack, places, structs, data = _HEAD.unpack_from, self._places, self._structs, self._data
        while at < end:
            name, info, _ = unpack(data, at)
            kind = info >> 24 & 31
            places.append(at)
            if kind == _STRUCT and name:
                structs.setdefault(name, at)
            fixed, each = _REST.get(kind, (0, 0))
            at += 12 + fixed + each * (info & 0xFFFF)

    def _string(self, text: str) -> int:
        """Return the number by which types name a string; -1 when no type does."""
        at = self._data.find(b"\0" + text.encode() + b"\0", self._strings, self._strings_end)
        return at + 1 - self._strings if at >= 0 else -1

    def _member(self, place: int, wanted: int) -> int | None:
        info: int = _HEAD.unpack_from(self._data, place)[1]
        bitfields = info >> 31
        for number in range(info & 0xFFFF):
            name, kind, offset = _MEMBER.unpack_from(self._data, place + 12 + 12 * number)
            bits: int = offset & 0xFFFFFF if bitfields else offset
            if name == wanted:
                return bits // 8
            inner = None if name else self._nested(kind, wanted)
            if inner is not None:
                return bits // 8 + inner
        return None

    def _nested(self, kind: int, wanted: int) -> int | None:
        place = self._places[kind]
        _, info, _ = _HEAD.unpack_from(self._data, place)
        return self._member(place, wanted) if info >> 24 & 31 in {_STRUCT, _UNION} else None
