import os

import pytest

from appliance.live import AlreadyRuns, alone
from capture.seal import Seal

CODE = 69


def refused(answer, part):
    assert (answer.code, answer.out) == (CODE, "")
    assert part in answer.err
    assert len(answer.err.splitlines()) == 1


def test_a_second_gate_worker_of_one_number_does_not_start(narrows):
    store = narrows.evidence.store
    with alone(store.run, 0):
        refused(narrows("serve", "gate", "--worker", "0"), "gate worker 0 runs already")
        with alone(store.run, 1):
            pass
    with alone(store.run, 0):
        pass


def test_a_gate_workers_number_is_free_when_its_process_is_dead(tmp_path):
    started, told = os.pipe()
    child = os.fork()
    if not child:
        with alone(tmp_path, 0):
            os.write(told, b"x")
            os.kill(os.getpid(), 9)
    os.read(started, 1)
    os.waitpid(child, 0)
    with alone(tmp_path, 0), pytest.raises(AlreadyRuns), alone(tmp_path, 0):
        pass
    for fd in (started, told):
        os.close(fd)


def test_a_second_seal_does_not_start(narrows):
    seal = Seal(narrows.evidence.store, narrows.evidence.keys)
    try:
        refused(narrows("serve", "seal"), "another seal runs")
    finally:
        seal.close()


def test_a_process_whose_keys_others_may_read_does_not_start(narrows):
    os.chmod(narrows.evidence.store.state / "appliance.key", 0o644)
    for process in ("gate", "seal"):
        refused(narrows("serve", process), "may be read by others")


@pytest.mark.parametrize("number", ["-1", "x", "1000"])
def test_a_workers_number_is_a_small_one(narrows, number):
    assert narrows("serve", "gate", "--worker", number).code == 2


@pytest.mark.parametrize("process", ["gate", "review"])
def test_captured_bytes_are_not_kept_on_a_disk(narrows, process):
    answer = narrows("serve", process)
    assert (answer.code, answer.out) == (78, "")
    assert "paths.run" in answer.err
    assert "tmpfs" in answer.err
    assert not list(narrows.evidence.store.hot.iterdir())
