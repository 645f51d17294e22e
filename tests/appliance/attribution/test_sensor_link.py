import asyncio
import json
import socket
from types import SimpleNamespace

import identity_syns as syns
import pytest
from speaking_sensor import BOOT, SpeakingSensor, owner

from ebpf import events
from ebpf.events import Message


def test_hello_brings_keys_and_covered_clients(bench):
    assert bench.link.keys == [syns.KEY]
    assert [str(net) for net in bench.link.covers] == ["192.0.2.0/24", "2001:db8:1::/64"]


def test_owners_and_connects_reach_the_table(bench):
    bench.sensor.owner(owner())
    bench.sensor.connect(syns.CLIENT6, syns.TARGET6)
    bench.until(lambda: len(bench.table) == 2)
    assert bench.table.by_handle(syns.HANDLE)["exe"] == "/usr/bin/psql"


def test_messages_cut_anywhere_arrive_whole(bench):
    record = events.message(Message.OWNER, json.dumps(owner()).encode())
    for at in range(len(record)):
        bench.sensor.say(record[at : at + 1])
        bench.link.drain()
    bench.until(lambda: bench.table.by_handle(syns.HANDLE) is not None)


def test_a_link_that_finds_no_sensor_gets_one_later(make_bench):
    bench = make_bench(sensor=False)
    assert not bench.link.connected
    bench.start_sensor()
    bench.sensor.owner(owner())
    bench.until(lambda: bench.table.by_handle(syns.HANDLE) is not None)


def test_a_sensor_that_is_there_is_heard_before_the_first_connection(make_bench, tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sensor.sock"))
        listener.listen()
        bench = make_bench(sensor=False)
        greeting = bench.loop.create_task(bench.link.greet(20))
        bench.loop.run_until_complete(asyncio.sleep(0.05))
        assert not greeting.done()
        peer, _ = listener.accept()
        with peer:
            peer.sendall(SpeakingSensor.hello(SimpleNamespace(keys=[], covers=[], boot=BOOT)))
            bench.loop.run_until_complete(greeting)
            assert bench.link.connected


def test_no_sensor_is_not_waited_for(make_bench):
    bench = make_bench(sensor=False)
    bench.loop.run_until_complete(asyncio.wait_for(bench.link.greet(1000), 20))
    assert not bench.link.connected


def test_a_sensor_that_comes_back_adds_its_key_and_the_older_stays_valid(bench):
    bench.sensor.owner(owner())
    bench.until(lambda: bench.table.by_handle(syns.HANDLE) is not None)
    bench.stop_sensor()
    bench.start_sensor(keys=[syns.OTHER_KEY])
    assert bench.link.keys == [syns.OTHER_KEY, syns.KEY]
    assert bench.table.by_handle(syns.HANDLE) is not None
    bench.stop_sensor()
    bench.start_sensor(keys=[bytes([n]) * 16 for n in range(20)])
    assert len(bench.link.keys) == 8


def test_the_keys_of_an_earlier_boot_are_forgotten(bench):
    bench.stop_sensor()
    bench.start_sensor(keys=[syns.OTHER_KEY], boot="another")
    assert bench.link.keys == [syns.OTHER_KEY]


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\xff" * 64,
        events.message(Message.OWNER, b"no json"),
        events.message(Message.OWNER, b"{}"),
        events.message(Message.OWNER, b"[]"),
        events.message(Message.CONNECT, b"short"),
        events.message(Message.UNKNOWN, b"short"),
        events.message(Message.HELLO, b'{"mac_keys": ["00"], "covers": []}'),
        b"\x01\x00\x00\x00\xee",
    ],
)
def test_nonsense_ends_the_connection_and_the_link_comes_back(bench, nonsense):
    bench.sensor.say(nonsense)
    bench.until(lambda: not bench.link.connected)
    bench.until(lambda: bench.link.connected)


def test_lost_events_are_counted_and_make_older_connects_untrusted(bench):
    bench.sensor.connect(syns.CLIENT, syns.TARGET)
    bench.until(lambda: len(bench.table) == 1)
    bench.sensor.lost(connect_ring=2, record_ring=1)
    bench.until(lambda: bench.attributor.lost == 3)
    assert len(bench.table) == 0
    bench.sensor.connect(syns.CLIENT, syns.TARGET)
    bench.sensor.lost(connect_ring=2, record_ring=1)
    bench.sensor.owner(owner())
    bench.until(lambda: bench.table.by_handle(syns.HANDLE) is not None)
    assert len(bench.table) == 2


def test_syns_without_room_for_the_option_are_no_lost_events(bench):
    bench.sensor.connect(syns.CLIENT, syns.TARGET)
    bench.until(lambda: len(bench.table) == 1)
    bench.sensor.lost(connect_ring=0, record_ring=1, options=50)
    bench.until(lambda: bench.attributor.lost == 1)
    assert len(bench.table) == 1


def test_connects_are_forgotten_with_the_sensor_that_told_them_and_owners_are_not(bench):
    """What the next user of a port connects is told by nobody meanwhile."""
    bench.sensor.connect(syns.CLIENT, syns.TARGET)
    bench.sensor.owner(owner())
    bench.until(lambda: len(bench.table) == 2)
    bench.stop_sensor()
    assert bench.table.by_handle(syns.HANDLE) is not None
    assert len(bench.table) == 1


def test_everything_that_arrived_is_taken_in_at_once(bench):
    """More than one read of the socket, while the loop does not run."""
    one = bytes(72) + events.four_tuple(bytes(4), 0, bytes(4), 5432) + bytes(4)
    many = b"".join(
        events.message(Message.CONNECT, one[:104] + port.to_bytes(2, "little") + one[106:])
        for port in range(900)
    )
    assert len(many) > 1 << 16
    bench.sensor.say(many)
    bench.link.drain()
    assert len(bench.table) == 900
