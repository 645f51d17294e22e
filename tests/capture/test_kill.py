"""kill -9: everything that a writer published is in the evidence, whenever and wherever it died."""

from __future__ import annotations

import os
import random
import shutil
import time

import pytest
from written_evidence import Counter, frame, place, writers

from capture.records import Stop

KILLS = 60


@pytest.fixture
def where():
    with place() as found:
        yield found


@pytest.fixture
def started(where):
    with writers(where) as found:
        yield found


@pytest.fixture
def counters(where):
    return lambda number: Counter(where.store.run / f"counter-{number}")


def check(where, incarnation, seed, published):
    """Every published frame is there byte for byte, once, in order; at most one more is."""
    frames = where.frames(incarnation)[1:]  # the first is the Start record
    assert published <= len(frames) <= published + 1
    for number, found in enumerate(frames):
        session, payload = frame(seed, number)
        assert (found.session, found.offset, found.payload) == (session, number, payload)
    assert where.incarnations()[incarnation] == sorted(where.incarnations()[incarnation])
    return len(frames)


def clear(where):
    """Forget finished evidence, so that a long test stays short."""
    for path in where.store.segments.iterdir():
        path.unlink()


def test_every_frame_that_was_published_survives_a_kill_at_any_moment(where, started, counters):
    dice = random.Random(11)
    total = 0
    for seed in range(KILLS):
        counter = counters(0)
        pid = started.start(f"write {counter.path} {seed}")
        counter.wait(1)
        time.sleep(dice.random() * 0.06)
        started.kill(pid)
        published = counter.value
        incarnation = max(where.incarnations())
        where.recover()
        total += check(where, incarnation, seed, published)
        recovered = [r for r in where.records("Recovered") if r["incarnation"] == incarnation]
        assert len(recovered) == 1
        assert recovered[0]["power_loss"] is False
        assert set(recovered[0]["segments"]) == set(where.incarnations()[incarnation])
        assert os.listdir(where.store.open) == os.listdir(where.store.hot) == []
        clear(where)
    assert total > 20 * KILLS


def test_all_writers_killed_at_once_are_recovered_by_one(where, started, counters):
    dice = random.Random(12)
    for _ in range(5):
        pids = {}
        for seed in range(3):
            counter = counters(seed)
            pids[started.start(f"write {counter.path} {seed}")] = counter
        for counter in pids.values():
            counter.wait(1)
        time.sleep(dice.random() * 0.05)
        for pid in pids:
            os.kill(pid, 9)
        for pid in pids:
            started.kill(pid)
        where.recover()
        left = {counter.path.name[-1]: counter.value for counter in pids.values()}
        for incarnation in sorted(where.incarnations())[:3]:
            payload = where.frames(incarnation)[1].payload
            seed = next(s for s in range(3) if frame(s, 0)[1] == payload)
            check(where, incarnation, seed, left[str(seed)])
        assert len(where.records("Recovered")) == 3
        clear(where)


def test_a_recovery_that_is_killed_is_only_repeated(where, started, counters):
    dice = random.Random(13)
    interrupted = 0
    for seed in range(12):
        counter = counters(0)
        pid = started.start(f"write {counter.path} {seed}")
        counter.wait(200)
        started.kill(pid)
        incarnation = max(where.incarnations())
        for _ in range(4):
            recovering = started.start("recover")
            time.sleep(dice.random() * 0.012)
            started.kill(recovering)
            interrupted += bool(os.listdir(where.store.open))
        where.recover()
        check(where, incarnation, seed, counter.value)
        said = [r for r in where.records("Recovered") if r["incarnation"] == incarnation]
        assert said
        assert os.listdir(where.store.open) == os.listdir(where.store.hot) == []
        assert not list(where.store.segments.glob("*.pre"))
        clear(where)
    assert interrupted > 5


def test_many_starts_at_once_recover_a_dead_writer_once(where, started, counters):
    for seed in range(4):
        counter = counters(0)
        pid = started.start(f"write {counter.path} {seed}")
        counter.wait(300)
        started.kill(pid)
        incarnation = max(where.incarnations())
        pids = [started.start("recover") for _ in range(5)]
        until = time.monotonic() + 20
        while os.listdir(where.store.open):
            assert time.monotonic() < until
            time.sleep(0.005)
        for pid in pids:
            started.kill(pid)
        where.recover()
        check(where, incarnation, seed, counter.value)
        said = [r for r in where.records("Recovered") if r["incarnation"] == incarnation]
        assert len(said) == 1
        clear(where)


def test_a_living_writer_is_left_alone(where):
    writer = where.writer()
    writer.append(1, 1, b"alive", 1)
    where.recover()
    writer.append(1, 1, b"still alive", 2)
    writer.close()
    assert where.records("Recovered") == []
    assert [f.payload for f in where.frames(writer.incarnation)[1:3]] == [b"alive", b"still alive"]


def test_after_power_loss_what_was_durable_is_there_and_the_loss_is_said(where):
    writer = where.writer()
    writer.append(1, 1, b"durable" * 100, 1)
    writer.wait_durable()
    writer._life.leave()  # the machine is gone: its locks and its memory, not its disk
    shutil.rmtree(where.store.hot)
    where.store.hot.mkdir()
    where.recover()
    assert where.frames(writer.incarnation)[1].payload == b"durable" * 100
    (said,) = where.records("Recovered")
    assert (said["incarnation"], said["power_loss"]) == (writer.incarnation, True)
    where.recover()
    assert len(where.records("Recovered")) == 1


def test_a_kill_between_the_last_segment_and_the_end_is_no_power_loss(where):
    writer = where.writer()
    writer.append(1, 1, b"x", 1)
    writer.record(0, Stop("stop"), 1)
    assert writer._committer.stop()
    writer._life.leave()  # it dies before it removes what says that it lives
    shutil.rmtree(where.store.hot)
    where.store.hot.mkdir()
    where.recover()
    assert where.records("Recovered") == []
    assert os.listdir(where.store.open) == []


def test_memory_that_is_damaged_is_said_and_the_rest_is_kept(where, started, counters):
    counter = counters(0)
    pid = started.start(f"write {counter.path} 5")
    counter.wait(100)
    started.kill(pid)
    incarnation = max(where.incarnations())
    hot = where.store.hot / f"{incarnation:08x}"
    newest = max(hot.iterdir(), key=lambda path: int.from_bytes(path.read_bytes()[24:32], "little"))
    with newest.open("r+b") as chunk:
        chunk.write(b"NOTMINE!")
    where.recover()
    frames = where.frames(incarnation)[1:]
    for number, found in enumerate(frames):
        assert found.payload == frame(5, number)[1]


def test_a_number_is_never_given_twice_even_when_the_counter_is_lost(where):
    writer = where.writer()
    writer.append(1, 1, bytes(600_000), 1)
    writer.close()
    (where.store.evidence / "generation").unlink()
    newest = where.store.generations()[-1]
    again = where.writer()
    assert again.incarnation > newest
    again.close()
