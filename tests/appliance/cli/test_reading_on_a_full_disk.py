"""The disk of the state directory is full: reading still works, from space held back for it."""

import ctypes
import json
import multiprocessing
import subprocess
import sys

import pytest
from review_evidence import Evidence

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
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", state], check=True)
    config = path / "narrows.toml"
    config.write_text(f'[paths]\nstate = "{state}"\nrun = "{path}/run"\n')
    evidence = Evidence(path)

    def narrows(*words):
        argv = [sys.executable, "-m", "appliance", *words, "--config", str(config)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    with evidence.writer() as gate:
        first = gate.open()
        gate.close(first)
        gate.commit()
        told = [narrows("sessions", "list", "--json")]
        second = gate.open("backup")
        gate.select(second, 1, "select 1 from orders")
        gate.commit()
        fill_up(state / "filler")
        told += [narrows("sessions", "list", "--json"), narrows("sessions", "list", "-q", "orders")]
        (evidence.store.evidence / "reserve.readers").unlink()  # as if many had read
        fill_up(state / "filler too")
        told.append(narrows("sessions", "list"))
        for filler in state.glob("filler*"):
            filler.unlink()
        told.append(narrows("sessions", "list", "--json"))
    subprocess.run(["umount", "--lazy", state], check=True)
    answers.put(told)


@pytest.mark.system
def test_reading_works_as_long_as_it_can_be_recorded_and_then_not_at_all(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    process = spawn.Process(target=on_a_full_disk, args=(tmp_path, answers))
    process.start()
    try:
        before, full, searched, refused, after = answers.get(timeout=60)
    finally:
        process.kill()
        process.join()
    assert before[0] == 0
    assert (full[0], len(json.loads(full[1]))) == (0, 2), full
    assert searched[0] == 0
    assert "backup" in searched[1]
    assert refused[:2] == (4, "")
    assert refused[2].startswith("narrows: the read cannot be recorded: ")
    assert (after[0], len(json.loads(after[1]))) == (0, 2)
