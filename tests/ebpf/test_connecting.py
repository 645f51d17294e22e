"""What is told again: who still connects, the newest of the same ends, and nothing after a loss."""

import struct

import pytest

from ebpf import events
from ebpf.connecting import LONGEST_NS, LOOKS, MOST_LOOKS, Connecting


def event(port, cookie, ts=0):
    return events.Connect(
        7, 77, 1, cookie, ts, 3, 3, 0, 0, b"x", bytes(16), bytes(16), port, 5432, 4
    ).pack()


class Kernel:
    """Which sockets still connect; counts how often it was asked."""

    def __init__(self, *cookies):
        self.cookies = set(cookies)
        self.asked = 0

    def __call__(self, cookie):
        self.asked += 1
        return struct.unpack("=Q", cookie)[0] in self.cookies


def test_only_sockets_that_still_connect_are_told_and_the_others_are_forgotten():
    kernel = Kernel(1, 3)
    kept = Connecting(kernel)
    for number in (1, 2, 3):
        kept.add(event(number, cookie=number))
    assert kept.waiting(0) == [event(1, 1), event(3, 3)]
    assert len(kept) == 2
    kernel.cookies.remove(1)
    assert kept.waiting(0) == [event(3, 3)]


def test_of_the_same_ends_only_the_newest_is_told():
    """The first gave up, and the kernel still has its socket in the map."""
    kept = Connecting(Kernel(1, 2))
    kept.add(event(4000, cookie=1))
    kept.add(event(4000, cookie=2))
    assert kept.waiting(0) == [event(4000, 2)]


def test_the_newest_of_the_same_ends_hides_the_older_even_when_it_is_connected():
    kept = Connecting(Kernel(1))
    kept.add(event(4000, cookie=1))
    kept.add(event(4000, cookie=2))
    assert kept.waiting(0) == []


def test_nobody_is_told_for_longer_than_a_client_tries():
    kept = Connecting(Kernel(1))
    kept.add(event(1, cookie=1, ts=1000))
    assert kept.waiting(999 + LONGEST_NS)
    assert kept.waiting(1000 + LONGEST_NS) == []


def test_nothing_is_told_after_a_loss():
    kept = Connecting(Kernel(1))
    kept.add(event(1, cookie=1))
    kept.forget()
    assert kept.waiting(0) == []


def test_there_is_room_for_so_many_and_who_still_connects_stays():
    kernel = Kernel(*range(800))
    kept = Connecting(kernel, most=2000)
    for number in range(20_000):
        kept.add(event(number, cookie=number))
        assert len(kept) <= 2000
    assert kernel.asked < 2 * 18_000
    assert {events.Connect.parse(body).cookie for body in kept.waiting(0)} == set(range(800))


def test_when_all_still_connect_the_memory_stays_bounded_and_the_new_one_is_kept():
    kernel = Kernel(*range(10_000))
    kept = Connecting(kernel, most=100)
    for number in range(10_000):
        kept.add(event(number, cookie=number))
    assert kernel.asked <= MOST_LOOKS + LOOKS * 9900
    assert len(kept) == 100
    assert event(9999, 9999) in kept.waiting(0)


def test_what_is_no_event_is_refused():
    with pytest.raises(ValueError, match="connect event of 3 bytes"):
        Connecting(Kernel()).add(b"abc")
