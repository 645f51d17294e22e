import ctypes
import json
import multiprocessing
import os
import subprocess
import sys

import pytest
from review_evidence import Evidence
from test_index import kill_a_gate

from capture import index_query as query
from capture.access import MOST_OBJECTS, AccessLog, actor
from capture.errors import EvidenceError
from capture.index_query import Filter, State
from capture.records import KINDS, Access

CLONE_NEWNS = 0x00020000


@pytest.fixture
def evidence(tmp_path):
    return Evidence(tmp_path)


def accesses(evidence):
    with evidence.index() as index:
        return [event.fields for event in query.events(index, KINDS[Access])]


def test_a_read_is_durable_before_record_returns(evidence):
    with AccessLog(evidence.store, evidence.keys) as log:
        log.record("list", "sessions list -q cards")
        on_disk = [json.loads(body) for *_, kind, _, _, body in told(evidence) if kind == 29]
    [fields] = on_disk
    assert fields["action"] == "list"
    assert fields["query"] == "sessions list -q cards"
    assert fields["outcome"] == "allowed"
    assert fields["actor"].startswith("uid:0(root)")


def told(evidence):
    return list(evidence.frames())


def test_reads_are_recorded_while_a_gate_writes_and_by_several_at_once(evidence):
    with evidence.writer() as gate:
        session = gate.open()
        with (
            AccessLog(evidence.store, evidence.keys) as one,
            AccessLog(evidence.store, evidence.keys) as two,
        ):
            one.record("show", "a", ["x"])
            two.record("show", "b", ["y"])
        gate.close(session)
        gate.commit()
        assert sorted(fields["query"] for fields in accesses(evidence)) == ["a", "b"]


def test_a_read_recovers_what_a_killed_gate_left(evidence, tmp_path):
    kill_a_gate(evidence, tmp_path)
    with AccessLog(evidence.store, evidence.keys) as log, evidence.index() as index:
        log.record("list", "")
        assert [s.bytes_up for s in query.sessions(index, Filter(state=State.CUT))] == [24]


def test_many_objects_become_several_records(evidence):
    names = [f"{number:013d}" for number in range(2 * MOST_OBJECTS + 1)]
    with AccessLog(evidence.store, evidence.keys) as log:
        log.record("export", "--all", names)
    found = accesses(evidence)
    assert [name for fields in found for name in fields["objects"]] == names
    assert len(found) == 3


def test_who_reads_is_told_by_uid_login_uid_and_sudo(tmp_path, monkeypatch):
    login = tmp_path / "loginuid"
    login.write_text("1")
    monkeypatch.setenv("SUDO_UID", "4242")
    monkeypatch.setenv("SUDO_USER", "alice")
    assert actor(login) == "uid:0(root) login:1(daemon) sudo:4242(alice)"
    login.write_text(str(0xFFFFFFFF))
    monkeypatch.delenv("SUDO_UID")
    monkeypatch.delenv("SUDO_USER")
    assert actor(login) == "uid:0(root)"
    assert actor(tmp_path / "none") == "uid:0(root)"
    monkeypatch.setenv("SUDO_USER", "\udcff")
    assert actor(login) == "uid:0(root) sudo:(\\xff)", "any bytes are recordable"


def _full_disk(path, answers):
    """In a mount namespace of its own: a small disk that is filled to the last byte."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(CLONE_NEWNS) == 0
    # fails in a change root, where "/" is no mount: then nothing spreads from here either
    subprocess.run(["mount", "--make-rprivate", "/"], check=False, stderr=subprocess.DEVNULL)
    state = path / "state"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", state], check=True)
    evidence = Evidence(path)
    with AccessLog(evidence.store, evidence.keys) as log:
        log.record("list", "before")
    with (evidence.store.state / "filler").open("wb", buffering=0) as filler:
        while True:
            try:
                filler.write(bytes(4096))
            except OSError:
                break
    reads, refused = 0, ""
    while not refused:
        try:
            with AccessLog(evidence.store, evidence.keys) as log:
                log.record("list", f"full {reads}")
            reads += 1
        except EvidenceError as wrong:
            refused = str(wrong)
    left = sorted(path.name for path in evidence.store.hot.iterdir())
    (evidence.store.state / "filler").unlink()
    with AccessLog(evidence.store, evidence.keys) as log:
        log.record("list", "after")
    told_last = [f["query"] for f in accesses(evidence)]
    subprocess.run(["umount", "--lazy", state], check=True)
    answers.put((reads, refused, left, told_last))


@pytest.mark.system
def test_on_a_full_disk_reads_use_the_space_held_back_and_are_then_refused(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    process = spawn.Process(target=_full_disk, args=(tmp_path, answers))
    process.start()
    reads, refused, left, queries = answers.get(timeout=60)
    process.join()
    assert reads >= 1
    assert "No space left" in refused
    assert left == []
    assert queries == ["before", *[f"full {number}" for number in range(reads)], "after"]


def test_a_person_without_a_name_is_a_number():
    # Imported first: others may not be able to read the folder that this runs in.
    code = "import os; from capture.access import actor; os.setuid(54321); print(actor('/none'))"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("SUDO")},
    )  # fmt: skip
    assert answer.stdout == "uid:54321\n"
