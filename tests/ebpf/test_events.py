"""The mirrors of the C structs and the framing on the sensor's socket."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ebpf
from ebpf import events

PROGRAMS = Path(ebpf.__file__).parent / "programs"
U64 = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("connect_event", events.CONNECT),
        ("record", events.RECORD),
        ("record_head", events.RECORD_HEAD),
        ("process", events.PROCESS),
        ("ident", events.IDENT),
        ("settings", events.SETTINGS),
    ],
)
def test_each_struct_has_the_size_that_the_c_side_asserts(name, layout):
    header = (PROGRAMS / "sensor.h").read_text()
    asserted = re.search(rf"_Static_assert\(sizeof\(struct {name}\) == (\d+)", header)
    assert asserted is not None
    assert int(asserted[1]) == layout.size


def test_the_counters_have_the_numbers_of_the_c_side():
    header = (PROGRAMS / "sensor.h").read_text()
    found = {name: int(n) for name, n in re.findall(r"LOST_(\w+) = (\d+)", header)}
    assert found == {lost.name: lost.value for lost in events.Lost}
    kinds = {name: int(n) for name, n in re.findall(r"KIND_(\w+) = (\d+)", header)}
    assert kinds == {kind.name: kind.value for kind in events.Kind}


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFF), st.integers(0, 2**35 - 1), st.booleans())
def test_a_handle_can_be_taken_apart_and_joined(host, epoch, number, is_fallback):
    handle = events.Handle(host, epoch, is_fallback, number)
    assert handle.joined < 2**64
    assert events.Handle.split(handle.joined) == handle


@given(st.integers(0, 2**35 - 1), st.integers(0, 2**22 - 1), st.integers(0, 2**13 - 1))
def test_a_fallback_handle_never_equals_a_counted_one(number, pid, generation):
    shared = events.base(0x4242, 3)
    assert events.fallback(shared, pid, generation) != shared | number
    split = events.Handle.split(events.fallback(shared, pid, generation))
    assert (split.host, split.epoch, split.fallback) == (0x4242, 3, True)


def test_handles_of_two_starts_differ():
    assert events.base(1, 1) | 5 != events.base(1, 2) | 5


@given(U64, st.binary(min_size=4, max_size=4), st.integers(0, 65535))
def test_a_connect_event_round_trips(handle, address, port):
    event = events.Connect(
        handle, 1, 2, 3, 4, 5, 6, 7, 8, b"psql".ljust(16, b"\0"),
        events.mapped(address), events.mapped(b"\x01\x02\x03\x04"), port, 5432, 4,
    )  # fmt: skip
    again = events.Connect.parse(event.pack())
    assert again == event
    assert again.saddr == address
    assert again.daddr == b"\x01\x02\x03\x04"


def record(argv, argv_bytes):
    return events.Record(
        1, 2, 3, 4, 5, 6, events.Kind.EXEC, 5, 6, 7, 8, argv_bytes, 0, b"sh".ljust(16, b"\0"),
        b"/bin/sh".ljust(256, b"\0"), argv.ljust(512, b"\0"),
    )  # fmt: skip


def test_a_record_round_trips_in_both_forms():
    made = record(b"sh\0-c\0\xff!\0", 9)
    assert events.Record.parse(made.pack()) == made
    assert made.arguments == ["sh", "-c", "\\xff!"]
    assert not made.cut
    head = events.Record.parse(made.pack()[: events.RECORD_HEAD.size])
    assert (head.handle, head.path, head.arguments, head.cut) == (2, b"", [], False)


def test_empty_arguments_are_kept_and_long_ones_are_said_to_be_cut():
    assert record(b"a\0\0b\0\0", 6).arguments == ["a", "", "b", ""]
    long = record(b"a\0" + b"x" * 510, 600)
    assert long.arguments == ["a", "x" * 510]
    assert long.cut


def test_the_settings_have_a_place_for_every_offset():
    offsets = events.Offsets(*range(1, 11))
    packed = events.Settings(1, 2, 3, 4, 5, 6).pack(offsets)
    assert events.SETTINGS.unpack(packed) == (1, 2, 3, 4, 5, 6, *offsets)


@given(
    st.lists(st.tuples(st.sampled_from(list(events.Message)), st.binary(max_size=40))),
    st.integers(1, 30),
)
def test_messages_survive_any_chunking(messages, step):
    stream = b"".join(events.message(kind, body) for kind, body in messages)
    reader = events.Messages()
    found = []
    for at in range(0, len(stream), step):
        found += reader.feed(stream[at : at + step])
    assert found == messages


@pytest.mark.parametrize("junk", [b"\0\0\0\0\5", b"\xff\xff\xff\xff\5", b"\1\0\0\0\x63"])
def test_what_is_no_message_is_refused(junk):
    with pytest.raises(ValueError):
        events.Messages().feed(junk)


def test_ask_and_unknown_carry_a_handle():
    [(kind, body)] = events.Messages().feed(events.ask(2**63 + 1))
    assert (kind, events.handle_of(body)) == (events.Message.ASK, 2**63 + 1)
    [(kind, body)] = events.Messages().feed(events.unknown(3))
    assert (kind, events.handle_of(body)) == (events.Message.UNKNOWN, 3)
