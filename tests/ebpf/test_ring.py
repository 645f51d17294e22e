"""The kernel's ring buffer, read with real records from real programs."""

import json
import select
from pathlib import Path

import pytest
from watching import BLOB

from appliance.lab import cgroups
from ebpf import events
from ebpf.events import Record, Settings
from ebpf.loader import Blob, Programs

PAGE = 4096
EACH = (events.RECORD.size + 8 + 7) & ~7  # a record and its header in the ring


class Recorded:
    """The programs with a record ring of one page, attached to a cgroup."""

    def __init__(self, idle):
        tree = json.loads(BLOB.read_text())
        tree["maps"]["record_ring"]["entries"] = PAGE
        self.watched = idle
        path = idle.folder / "page.blob"
        path.write_text(json.dumps(tree))
        self.programs = Programs.load(Blob.read(path))
        level = len(idle.cgroup.relative_to(cgroups.root()).parts)
        settings = Settings(1, 2, events.base(3, 4), idle.cgroup.stat().st_ino, level, 1)
        self.programs.configure(settings, [])
        self.programs.attach(idle.cgroup)
        self.ring = self.programs.ring("record_ring")

    def execute(self, count=1):
        """Run /bin/true and return the process ids."""
        pids = []
        for _ in range(count):
            process = self.watched.spawn(["/bin/true"])
            process.wait()
            pids.append(process.pid)
        return pids

    def drain(self, **limits):
        found = []
        self.ring.drain(lambda event: found.append(Record.parse(event).tgid), **limits)
        return found

    def close(self):
        self.ring.close()
        self.programs.close()


@pytest.fixture
def recorded(idle):
    made = Recorded(idle)
    yield made
    made.close()


def test_records_come_in_order_over_many_rounds_of_the_memory(recorded):
    expected, found = [], []
    for _ in range(20):
        expected += recorded.execute(3)
        found += recorded.drain()
    assert found == expected
    assert recorded.ring.consumed() == recorded.ring.produced() > 10 * PAGE
    assert recorded.programs.lost()["record_ring"] == 0


def test_what_does_not_fit_is_counted_and_what_fits_is_kept(recorded):
    pids = recorded.execute(10)
    fits = PAGE // EACH
    assert recorded.programs.lost()["record_ring"] == 10 - fits
    assert recorded.drain() == pids[:fits]
    assert recorded.drain() == []
    assert recorded.drain() == []
    (pid,) = recorded.execute()
    assert recorded.drain() == [pid]


def test_reading_ends_where_it_is_told_to(recorded):
    first = recorded.execute(2)
    until = recorded.ring.produced()
    later = recorded.execute(2)
    assert recorded.drain(until=until) == first
    assert recorded.drain(most=1) == later[:1]
    assert recorded.drain() == later[1:]


def test_the_record_map_keeps_what_the_ring_lost(recorded):
    pids = recorded.execute(10)
    handles = [events.base(3, 4) | number for number in range(200)]
    kept = {r.tgid for r in map(recorded.programs.record, handles) if r is not None}
    assert set(pids) <= kept


def test_the_descriptor_is_readable_when_there_are_records(recorded):
    poll = select.epoll()
    poll.register(recorded.ring.fd, select.EPOLLIN)
    assert poll.poll(0) == []
    recorded.execute()
    assert poll.poll(10)
    recorded.drain()
    assert poll.poll(0) == []
    poll.close()


def test_closing_frees_the_memory(idle):
    before = Path("/proc/self/maps").read_text().count("bpf-map")
    made = Recorded(idle)
    made.execute()
    assert Path("/proc/self/maps").read_text().count("bpf-map") == before + 2
    made.close()
    assert Path("/proc/self/maps").read_text().count("bpf-map") == before
