"""Where the kernel's structs have their members."""

import struct

import pytest

from ebpf.btf import Types, TypesMissing
from ebpf.loader import kernel_offsets

STRUCT, UNION, INT, ENUM, PROTO = 4, 5, 1, 6, 13


class Made:
    """A file of types, built by hand."""

    def __init__(self, path):
        self.path = path
        self._types, self._strings = b"", b"\0"

    def name(self, text):
        if not text:
            return 0
        at = self._strings.find(b"\0" + text.encode() + b"\0")
        if at >= 0:
            return at + 1
        self._strings += text.encode() + b"\0"
        return len(self._strings) - len(text) - 1

    def add(self, kind, name, rest=b"", count=0, *, bitfields=False):
        info = bitfields << 31 | kind << 24 | count
        self._types += struct.pack("=III", self.name(name), info, 0) + rest

    def struct(self, name, *members, kind=STRUCT, bitfields=False):
        rest = b"".join(struct.pack("=III", self.name(n), of, at) for n, of, at in members)
        self.add(kind, name, rest, len(members), bitfields=bitfields)

    def write(self, magic=0xEB9F):
        head = struct.pack(
            "=HBBIIIII", magic, 1, 0, 24, 0, len(self._types), len(self._types), len(self._strings)
        )
        self.path.write_bytes(head + self._types + self._strings)
        return self.path


@pytest.fixture
def made(tmp_path):
    return Made(tmp_path / "btf")


def test_members_are_found_behind_types_of_every_length(made):
    made.add(INT, "int", bytes(4))
    made.add(3, "", bytes(12))  # an array
    made.add(ENUM, "colour", bytes(8 * 3), 3)
    made.add(19, "wide", bytes(12 * 2), 2)
    made.add(PROTO, "", bytes(8 * 2), 2)
    made.add(14, "variable", bytes(4))
    made.add(15, "section", bytes(12), 1)
    made.add(17, "tag", bytes(4))
    made.add(2, "pointer")
    made.struct("task", ("pid", 1, 0), ("mm", 9, 64))
    types = Types(made.write())
    assert types.offset("task", "pid") == 0
    assert types.offset("task", "mm") == 8


def test_members_of_nested_structs_without_a_name_count_and_of_named_ones_do_not(made):
    made.add(INT, "int", bytes(4))
    made.struct("", ("deep", 1, 32))
    made.struct("", ("", 2, 64), ("shallow", 1, 128), kind=UNION)
    made.struct("inner", ("hidden", 1, 0))
    made.struct("outer", ("first", 1, 0), ("", 3, 320), ("own", 4, 640))
    types = Types(made.write())
    assert types.offset("outer", "deep") == (320 + 64 + 32) // 8
    assert types.offset("outer", "shallow") == (320 + 128) // 8
    with pytest.raises(TypesMissing, match=r"outer\.hidden"):
        types.offset("outer", "hidden")


def test_the_width_of_a_bit_field_is_no_part_of_its_offset(made):
    made.add(INT, "int", bytes(4))
    made.struct("flags", ("one", 1, 3 << 24 | 72), bitfields=True)
    assert Types(made.write()).offset("flags", "one") == 9


def test_a_struct_that_is_not_there_is_named(made):
    made.struct("file")
    types = Types(made.write())
    with pytest.raises(TypesMissing, match=r"no inode\.i_ino"):
        types.offset("inode", "i_ino")


def test_a_file_that_holds_no_types_is_refused(made, tmp_path):
    with pytest.raises(TypesMissing, match="byte order"):
        Types(made.write(magic=0x9FEB))
    with pytest.raises(TypesMissing, match="no kernel types at"):
        Types(tmp_path / "absent")
    made.path.write_bytes(b"short")
    with pytest.raises(TypesMissing):
        Types(made.path)


def test_this_kernel_has_everything_that_the_programs_follow():
    offsets = kernel_offsets()
    assert len(set(offsets)) >= 8
    assert offsets.mm_arg_end == offsets.mm_arg_start + 8
