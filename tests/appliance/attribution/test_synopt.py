import struct

import identity_syns as syns
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.attribution import synopt

ADDRESSES = {4: (syns.CLIENT, syns.TARGET), 6: (syns.CLIENT6, syns.TARGET6)}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("mac_bytes", [8, 4])
def test_an_option_that_the_sensor_wrote_is_verified(version, mac_bytes):
    source, target = ADDRESSES[version]
    option = synopt.find(syns.with_identity(source, target, isn=0xDEADBEEF, mac_bytes=mac_bytes))
    assert option is not None
    assert option.handle == syns.HANDLE
    assert len(option.mac) == mac_bytes
    assert synopt.verified(option, [syns.OTHER_KEY, syns.KEY]) is not None
    assert synopt.verified(option, [syns.OTHER_KEY]) is None
    assert synopt.verified(option, []) is None


def test_the_short_form_stands_for_the_same_syn_as_the_long_one():
    long = synopt.verified(synopt.find(syns.with_identity()), [syns.KEY])
    short = synopt.verified(synopt.find(syns.with_identity(mac_bytes=4)), [syns.KEY])
    assert long == short
    assert long.to_bytes(8, "little") == syns.siphash24(
        syns.KEY, synopt.find(syns.with_identity()).message
    ).to_bytes(8, "little")


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(
    "change", ["handle", "isn", "source port", "target port", "source", "target"]
)
def test_an_option_moved_to_another_syn_is_not_verified(version, change):
    source, target = ADDRESSES[version]
    handle, isn = syns.HANDLE, 77
    option = syns.identity(syns.KEY, handle, source, target, isn)
    match change:
        case "handle":
            option = option[:4] + struct.pack("<Q", handle + 1) + option[12:]
        case "isn":
            isn += 1
        case "source port":
            source = (source[0], source[1] + 1)
        case "target port":
            target = (target[0], target[1] + 1)
        case "source":
            source = (source[0][:-1] + "1", source[1])
        case "target":
            target = (target[0][:-1] + "1", target[1])
    found = synopt.find(syns.saved(source, target, isn, option))
    assert found is not None
    assert synopt.verified(found, [syns.KEY]) is None


def test_an_option_of_another_length_is_seen_and_never_verified():
    body = syns.identity()[2:]
    for size in (0, 2, 6, 10, 12):
        option = bytes([253, 4 + size]) + body[: 2 + size]
        if len(option) in {16, 20}:
            continue
        found = synopt.find(syns.saved(options=option))
        assert found is not None, size
        assert synopt.verified(found, [syns.KEY]) is None


def test_an_experiment_of_somebody_else_is_not_ours():
    assert synopt.find(syns.saved(options=bytes([253, 6]) + b"XY12")) is None
    assert synopt.find(syns.saved(options=bytes([254, 6]) + b"NH12")) is None
    assert synopt.find(syns.saved()) is None
    assert synopt.find(b"") is None


def test_our_mark_inside_another_option_is_not_taken_for_ours():
    inner = bytes([34, 22]) + syns.identity()
    assert synopt.find(syns.saved(options=inner)) is None


def test_ip_options_and_extension_headers_are_stepped_over():
    with_ip_options = syns.with_identity(ip_options=bytes([148, 4, 0, 0]))
    assert synopt.verified(synopt.find(with_ip_options), [syns.KEY]) is not None
    hop_by_hop = bytes([0, 60, 0, 1, 4, 0, 0, 0, 0])  # then destination options, 16 bytes
    destination = bytes([6, 1]) + bytes([1, 12]) + bytes(12)
    chained = syns.with_identity(
        syns.CLIENT6, syns.TARGET6, extensions=hop_by_hop[:1] + hop_by_hop[1:] + destination
    )
    assert synopt.verified(synopt.find(chained), [syns.KEY]) is not None


@given(st.binary(max_size=300))
@settings(max_examples=500, deadline=None)
def test_no_bytes_make_it_raise(data):
    found = synopt.find(data)
    assert found is None or synopt.verified(found, [syns.KEY]) is None


@given(
    st.sampled_from([4, 6]),
    st.lists(st.tuples(st.integers(0, 139), st.integers(0, 255)), max_size=6),
    st.integers(0, 120),
)
@settings(max_examples=500, deadline=None)
def test_a_damaged_syn_never_raises_and_never_verifies_as_another(version, damage, cut):
    source, target = ADDRESSES[version]
    whole = syns.with_identity(source, target)
    broken = bytearray(whole)
    for at, value in damage:
        if at < len(broken):
            broken[at] = value
    broken = bytes(broken[: len(broken) - cut]) if cut > 60 else bytes(broken)
    found = synopt.find(broken)
    if found is not None and synopt.verified(found, [syns.KEY]) is not None:
        assert found.handle == syns.HANDLE
        assert found.message == synopt.find(whole).message
