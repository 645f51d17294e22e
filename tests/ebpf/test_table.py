"""The owner table: bounded, expiring, and never someone else's owner."""

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpf import events
from ebpf.table import NS, Connected, OwnerTable

CLIENT = socket.inet_pton(socket.AF_INET, "192.0.2.10")
SERVER = socket.inet_pton(socket.AF_INET, "198.51.100.10")
CLIENT6 = socket.inet_pton(socket.AF_INET6, "2001:db8:1::10")
SERVER6 = socket.inet_pton(socket.AF_INET6, "2001:db8:2::10")


def event(source, sport, target, dport, handle):
    return events.Connect(
        handle, 77, 1, 2, 5, 3, 3, 0, 0, b"x", events.mapped(source), events.mapped(target), sport,
        dport, 4,
    ).pack()  # fmt: skip


def key(source, sport, target=SERVER, dport=5432):
    return events.four_tuple(source, sport, target, dport)


def connected(table, port, handle, now_ns=0):
    return table.add_connect(event(CLIENT, port, SERVER, 5432, handle), now_ns)


def test_an_owner_is_found_until_it_expires():
    table = OwnerTable(owner_ns=10)
    table.add_owner(1, {"pid": 7}, 100)
    assert table.by_handle(1) == {"pid": 7}
    assert table.by_handle(1, 109) == {"pid": 7}
    assert table.by_handle(1, 110) is None
    assert table.expire(109) == 0
    assert table.expire(110) == 1
    assert table.by_handle(1) is None


def test_a_later_owner_record_replaces_the_earlier_one_and_lives_longer():
    table = OwnerTable(owner_ns=10)
    table.add_owner(1, {"sha": None}, 0)
    table.add_owner(2, {}, 1)
    table.add_owner(1, {"sha": "x"}, 5)
    assert table.expire(12) == 1
    assert table.by_handle(1) == {"sha": "x"}


def test_the_oldest_owner_goes_when_the_table_is_full():
    table = OwnerTable(owners=3)
    for handle in range(5):
        table.add_owner(handle, {"n": handle}, handle)
    assert [table.by_handle(n) is not None for n in range(5)] == [False, False, True, True, True]
    assert table.evicted_owners == 2


def test_a_connection_is_found_by_its_four_tuple_and_by_nothing_less():
    table = OwnerTable()
    assert connected(table, 40_000, 9) == key(CLIENT, 40_000)
    assert table.take(key(CLIENT, 40_001)) is None
    assert table.take(key(CLIENT, 40_000, SERVER, 5433)) is None
    assert table.take(key(SERVER, 40_000, CLIENT)) is None
    assert table.take(key(CLIENT, 40_000)) == Connected(9, 77, 5)


def test_ipv6_and_mapped_ipv4_addresses_are_found():
    table = OwnerTable()
    table.add_connect(event(CLIENT6, 1, SERVER6, 2, 8), 0)
    assert table.take(key(CLIENT6, 1, SERVER6, 2)) == Connected(8, 77, 5)
    connected(table, 3, 9)
    prefix = bytes(10) + b"\xff\xff"
    assert table.take(key(prefix + CLIENT, 3, prefix + SERVER)) == Connected(9, 77, 5)


def test_what_was_taken_or_forgotten_cannot_name_the_next_user_of_the_port():
    table = OwnerTable()
    connected(table, 40_000, 9)
    assert table.take(key(CLIENT, 40_000)) == Connected(9, 77, 5)
    assert table.take(key(CLIENT, 40_000)) is None
    connected(table, 40_000, 9)
    table.forget(key(CLIENT, 40_000))
    assert table.take(key(CLIENT, 40_000)) is None
    table.forget(key(CLIENT, 40_000))


def test_what_is_no_connect_event_is_refused():
    with pytest.raises(ValueError):
        OwnerTable().add_connect(bytes(111), 0)


def test_a_connection_expires_sooner_than_an_owner():
    table = OwnerTable()
    table.add_owner(9, {}, 0)
    connected(table, 40_000, 9)
    assert table.take(key(CLIENT, 40_000), 15 * NS) is None
    connected(table, 40_000, 9)
    assert table.expire(15 * NS) == 1
    assert table.by_handle(9) == {}


def test_lost_events_let_every_connection_be_forgotten_and_keep_the_owners():
    table = OwnerTable()
    table.add_owner(9, {}, 0)
    connected(table, 40_000, 9)
    table.forget_connects()
    assert table.take(key(CLIENT, 40_000)) is None
    assert table.by_handle(9) == {}


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 40))))
def test_it_stays_bounded_and_answers_like_a_plain_dictionary(steps):
    table = OwnerTable(owners=4, connects=4, owner_ns=50, connect_ns=50)
    last: dict[int, int] = {}
    now = 0
    for port, handle, wait in steps:
        now += wait
        connected(table, port, handle, now)
        table.add_owner(handle, {"handle": handle}, now)
        last[port] = handle
        table.expire(now)
        assert len(table) <= 8
    for port, handle in last.items():
        found = table.take(key(CLIENT, port))
        assert found is None or found.handle == handle
