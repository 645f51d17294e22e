"""The disk of the state directory is full: the API answers from space held back for readers, then
not at all, and again when there is space.
"""

import ctypes
import multiprocessing
import subprocess
import time

import pytest
from served_api import Api

CLONE_NEWNS = 0x00020000


def fill_up(path):
    with path.open("wb", buffering=0) as filler:
        size = 1 << 20
        while size:
            try:
                filler.write(bytes(size))
            except OSError:
                size //= 2


def on_a_full_disk(path, answers):
    """In a mount namespace of its own, with the state directory on a small disk."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(CLONE_NEWNS) == 0
    # fails in a change root, where "/" is no mount: then nothing spreads from here either
    subprocess.run(["mount", "--make-rprivate", "/"], check=False, stderr=subprocess.DEVNULL)
    state = path / "state"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "none", state], check=True)
    told = {}

    def ask(api, what):
        answer = api.get("/sessions")
        told[what] = (answer.status, answer.json(), answer.headers.get("Narrows-Index"))

    with Api(path) as api, api.evidence.writer() as gate:
        gate.close(gate.open())
        gate.commit()
        ask(api, "before")
        gate.close(gate.open("backup"))
        gate.commit()
        fill_up(state / "filler")
        time.sleep(0.3)  # an answer may be as old as 0.2 s
        ask(api, "full")
        told["many"] = [api.get("/sessions").status for _ in range(1200)]
        (api.evidence.store.evidence / "reserve.readers").unlink(missing_ok=True)
        fill_up(state / "filler too")
        told["used up"] = []
        for _ in range(1500):  # what is left of the segment in use
            answer = api.get("/sessions")
            told["used up"].append(answer.status)
            if answer.status != 200:
                told["refusal"] = answer.problem()
                break
        time.sleep(1.1)  # it may be a second old
        told["health"] = api.ok("/health", None)
        for filler in state.glob("filler*"):
            filler.unlink()
        until = time.monotonic() + 20
        while api.get("/sessions").status != 200 and time.monotonic() < until:
            time.sleep(0.1)
        ask(api, "after")
        while told["after"][2] is not None and time.monotonic() < until:
            time.sleep(0.1)
            ask(api, "after")
        told["reads"] = len(api.reads())
    subprocess.run(["umount", "--lazy", state], check=True)
    answers.put(told)


@pytest.mark.system
def test_the_api_answers_on_a_full_disk_as_long_as_reads_can_be_recorded(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    process = spawn.Process(target=on_a_full_disk, args=(tmp_path, answers))
    process.start()
    try:
        told = answers.get(timeout=110)
    finally:
        process.kill()
        process.join()
    assert told["before"][0] == 200
    status, page, stale = told["full"]
    assert status == 200
    assert len(page["items"]) == 2 or stale == "stale"
    assert set(told["many"]) == {200}
    assert told["used up"][-1] == 503
    assert told["refusal"] == "not-recorded"
    assert (told["health"]["status"], told["health"]["recording"]) == ("degraded", False)
    status, page, stale = told["after"]
    assert (status, len(page["items"]), stale) == (200, 2, None)
    assert told["reads"] >= 1 + 1 + 1200 + len(told["used up"]) - 1
