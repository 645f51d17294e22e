import multiprocessing
import os
import random
import signal
import stat
import time

import pytest

from appliance.attribution.replay import WAYS, ReplayCache


@pytest.fixture
def cache(tmp_path):
    made = ReplayCache(tmp_path / "replay", 1000)
    yield made
    made.close()


def test_a_syn_is_new_once(cache):
    assert not cache.seen(7)
    assert cache.seen(7)
    assert not cache.seen(0)
    assert cache.seen(0)


def test_the_cache_holds_at_least_what_was_asked_for_and_is_bounded(cache, tmp_path):
    assert 1000 <= cache.entries < 2000 + WAYS
    size = (tmp_path / "replay").stat().st_size
    numbers = random.Random(1)
    for _ in range(20_000):
        cache.seen(numbers.getrandbits(64))
    assert (tmp_path / "replay").stat().st_size == size
    assert size < cache.entries * 9 + 128


def test_the_oldest_is_forgotten_first(cache):
    buckets = cache.entries // WAYS
    same_bucket = [1 + buckets * n for n in range(WAYS + 1)]
    for mac in same_bucket[:WAYS]:
        assert not cache.seen(mac)
    assert all(cache.seen(mac) for mac in same_bucket[:WAYS])
    assert not cache.seen(same_bucket[WAYS])
    assert not cache.seen(same_bucket[0])
    assert cache.seen(same_bucket[2])


def test_what_one_process_saw_is_known_to_the_next_and_others_cannot_read_it(tmp_path):
    first = ReplayCache(tmp_path / "replay", 1000)
    assert not first.seen(99)
    first.close()
    second = ReplayCache(tmp_path / "replay", 1000)
    assert second.seen(99)
    second.close()
    assert stat.S_IMODE((tmp_path / "replay").stat().st_mode) == 0o600


def test_a_file_of_another_size_is_replaced_and_a_worker_that_has_it_goes_on(tmp_path):
    old = ReplayCache(tmp_path / "replay", 1000)
    assert not old.seen(5)
    new = ReplayCache(tmp_path / "replay", 100_000)
    assert not new.seen(5)
    assert old.seen(5)
    old.close()
    new.close()


def test_rubbish_in_its_place_is_replaced(tmp_path):
    (tmp_path / "replay").write_bytes(b"\xff" * 10_000)
    made = ReplayCache(tmp_path / "replay", 1000)
    assert not made.seen(5)
    made.close()


def _ask_all(path, macs, start, answers):
    cache = ReplayCache(path, 4 * len(macs))
    start.wait()
    answers.put(sum(not cache.seen(mac) for mac in macs))
    cache.close()


def test_of_two_processes_that_see_the_same_syns_at_once_exactly_one_sees_each_first(tmp_path):
    context = multiprocessing.get_context("spawn")
    macs = [random.Random(n).getrandbits(64) for n in range(20_000)]
    start, answers = context.Event(), context.Queue()
    workers = [
        context.Process(target=_ask_all, args=(tmp_path / "replay", macs, start, answers))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    start.set()
    first = [answers.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(30)
        worker.close()
    answers.close()
    answers.join_thread()
    assert sum(first) == len(macs)


def test_a_stopped_worker_that_holds_a_bucket_does_not_stop_the_others(tmp_path):
    cache = ReplayCache(tmp_path / "replay", 10)
    child = os.fork()
    if child == 0:
        other = ReplayCache(tmp_path / "replay", 10)
        other._lock(128)
        (tmp_path / "held").touch()
        signal.pause()
        os._exit(0)
    try:
        while not (tmp_path / "held").exists():
            time.sleep(0.001)
        assert not cache.seen(1)
        assert cache.seen(1)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        cache.close()
