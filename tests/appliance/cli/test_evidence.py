import fcntl
import json
import os
import shutil

import pytest

from capture.frames import session_name
from capture.records import Decision, Flow, Gap, Heartbeat, Refused
from capture.seal import Seal


@pytest.fixture
def sealed(narrows):
    """Two closed sessions, sealed."""
    with narrows.evidence.writer() as gate:
        sessions = [gate.open(), gate.open()]
        gate.record(sessions[0], Decision("uid:0(root)", "kill", "tests", "done"))
        for session in sessions:
            gate.up(session, b"hello")
            gate.close(session)
        gate.record(0, Gap("route", "bypass", bytes_up=10, packets=2, detail="everything"))
        gate.record(0, Refused("192.0.2.10", 4, "203.0.113.1", 22, "management", "x" * 13))
        gate.record(0, Flow("192.0.2.10", "udp", 53, 3, 99, 1, 2))
        gate.record(0, Heartbeat(0, 2, 2, 0, 1, 2, 0, 0))
    seal(narrows)
    return [session_name(session) for session in sessions]


def seal(narrows):
    made = Seal(narrows.evidence.store, narrows.evidence.keys)
    while made.step():
        pass
    made.close()


# -- verify


def test_sound_evidence_verifies(narrows, sealed):
    answer = narrows("evidence", "verify", "--json")
    assert answer.code == 0
    report = answer.json()
    assert report["ok"] is True
    assert report["leaves"] > 0
    assert report["checkpoint"]
    assert narrows("evidence", "verify", "all").out.startswith("valid: all\n")


def test_a_session_and_a_segment_can_be_verified_alone(narrows, sealed):
    generation = narrows.evidence.store.generations()[0]
    for what in (sealed[0], sealed[0].upper(), f"{generation:08x}"):
        answer = narrows("evidence", "verify", what, "--json")
        assert answer.code == 0, answer.out
        assert answer.json()["what"] == what.lower()
    assert narrows("evidence", "verify", "nonsense").code == 3
    assert narrows("evidence", "verify", sealed[0][:4]).code == 2


def test_an_older_copy_of_everything_is_found_by_a_checkpoint_that_was_kept(
    narrows, sealed, tmp_path
):
    state, older, kept = narrows.evidence.store.state, tmp_path / "older", tmp_path / "kept"
    shutil.copytree(state, older)
    with narrows.evidence.writer() as gate:
        gate.close(gate.open())
    seal(narrows)
    shutil.copy(state / "evidence" / "ledger" / "checkpoint", kept)
    words = ("evidence", "verify", "--checkpoint", str(kept))
    assert narrows(*words).code == 0
    shutil.rmtree(state)
    shutil.copytree(older, state)
    assert narrows("evidence", "verify").code == 0, "nothing in it contradicts itself"
    answer = narrows(*words)
    assert answer.code == 1
    assert "rolled back" in answer.out


def test_a_kept_file_that_cannot_be_read_is_a_wrong_word(narrows, sealed, tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff")
    for option in ("--checkpoint", "--ledger-key"):
        for name in ("bytes", "none"):
            answer = narrows("evidence", "verify", option, str(tmp_path / name))
            assert answer.code == 2
            assert answer.err.count("\n") == 1


def test_evidence_that_was_changed_is_exit_code_1(narrows, sealed):
    path = narrows.evidence.store.segment(narrows.evidence.store.generations()[0])
    with path.open("r+b") as file:
        file.seek(4096 + 100)
        byte = file.read(1)
        file.seek(4096 + 100)
        file.write(bytes([byte[0] ^ 1]))
    answer = narrows("evidence", "verify", "--json")
    assert answer.code == 1
    assert answer.json()["ok"] is False
    assert narrows("evidence", "verify").out.startswith("INVALID: all\n")


def test_evidence_that_was_never_signed_is_exit_code_2(narrows, sealed):
    for path in sorted(narrows.evidence.store.ledger.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert narrows("evidence", "verify").code == 1  # the seal's state knows of a log
    (narrows.evidence.store.evidence / "seal.state").unlink()
    assert narrows("evidence", "verify").code == 2


def test_a_key_that_the_auditor_brings_is_used(narrows, sealed, tmp_path):
    vkey = (narrows.evidence.store.state / "ledger.pub").read_text().strip()
    kept = tmp_path / "kept.pub"
    kept.write_text(vkey + "\n")
    assert narrows("evidence", "verify", "--ledger-key", vkey).code == 0
    assert narrows("evidence", "verify", "--ledger-key", str(kept)).code == 0
    (narrows.evidence.store.state / "ledger.pub").unlink()
    assert narrows("evidence", "verify", "--ledger-key", str(kept)).code == 0
    answer = narrows("evidence", "verify", "--ledger-key", str(tmp_path / "none"))
    assert (answer.code, answer.out) == (2, "")


# -- reindex


def test_after_reindex_the_answers_are_the_same(narrows, sealed):
    with narrows.evidence.writer("gate-1") as gate:
        running = gate.open("backup")
        gate.select(running, 1, "select 1 from orders")
        gate.commit()
        before = [
            narrows("sessions", "list", "--json").out,
            narrows("sessions", "list", "--json", "-q", "orders").out,
            narrows("sessions", "show", sealed[0]).out,
        ]
        narrows.evidence.store.index.write_bytes(b"rubbish" * 5000)
        answer = narrows("evidence", "reindex")
        assert (answer.code, answer.err) == (0, "3 sessions are in the index\n")
        assert before == [
            narrows("sessions", "list", "--json").out,
            narrows("sessions", "list", "--json", "-q", "orders").out,
            narrows("sessions", "show", sealed[0]).out,
        ]


def test_reindex_does_not_disturb_a_seal_that_runs(narrows, sealed):
    running = Seal(narrows.evidence.store, narrows.evidence.keys)
    with narrows.evidence.writer("gate-1") as gate:
        for _ in range(3):
            session = gate.open()
            gate.close(session)
            gate.commit()
            while running.step():
                pass
            assert narrows("evidence", "reindex").code == 0
        while running.step():
            pass
        assert len(narrows("sessions", "list", "--json").json()) == 5
    running.close()
    assert narrows("evidence", "verify").code == 0


def test_two_at_once_cannot_reindex(narrows, sealed):
    narrows("evidence", "reindex")
    lock = os.open(narrows.evidence.store.evidence / "reindex.lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    answer = narrows("evidence", "reindex")
    os.close(lock)
    assert answer.code == 1
    assert answer.err == (
        "narrows: another process makes the index anew (the old index is as it was)\n"
    )


# -- log


def test_the_log_tells_what_happened_besides_sessions(narrows, sealed):
    narrows("sessions", "show", sealed[1])
    answer = narrows("evidence", "log", "--json")
    assert answer.code == 0
    entries = [json.loads(line) for line in answer.out.splitlines()]
    assert [entry["time"] for entry in entries] == sorted(entry["time"] for entry in entries)
    by_kind = {entry["kind"]: entry for entry in entries}
    assert by_kind["gap"]["fields"]["reason"] == "bypass"
    assert by_kind["refused"]["fields"]["reason"] == "management"
    assert (by_kind["flow"]["session"], by_kind["flow"]["fields"]["packets"]) == (None, 3)
    assert "heartbeat" not in by_kind, "there would be nothing else to see"
    assert by_kind["decision"]["session"] == sealed[0]
    assert by_kind["decision"]["fields"]["action"] == "kill"
    shown = [entry for entry in entries if entry["fields"].get("objects") == [sealed[1]]]
    assert [entry["fields"]["action"] for entry in shown] == ["show"]
    starts = [entry for entry in entries if entry["kind"] == "start"]
    assert [entry["fields"]["role"] for entry in starts] == ["gate"], "reads are told once"


def test_the_log_can_be_narrowed_to_one_kind(narrows, sealed):
    out = narrows("evidence", "log", "--kind", "gap").out
    [line] = out.splitlines()
    assert line.endswith(
        "gap        -              scope=route reason=bypass bytes_up=10 packets=2"
        " detail=everything"
    )
    starts = narrows("evidence", "log", "--kind", "start").out.splitlines()
    assert len(starts) == 3, "also those of reads"
    [beat] = narrows("evidence", "log", "--kind", "heartbeat").out.splitlines()
    assert "kernel_accepted=2" in beat


# -- law 8


def test_reads_of_the_evidence_command_are_recorded_and_refused_too(narrows, sealed):
    narrows("evidence", "verify")
    narrows("evidence", "reindex")
    narrows("evidence", "log")
    narrows("evidence", "verify", "nonsense")
    assert [(action, outcome) for action, _, outcome in narrows.reads()] == [
        ("verify", "allowed"), ("reindex", "allowed"), ("list", "allowed"), ("verify", "not-found"),
    ]  # fmt: skip
    segments = narrows.evidence.store.segments
    segments.rename(segments.with_name("aside"))
    segments.write_bytes(b"")
    for verb in ("verify", "reindex", "log"):
        answer = narrows("evidence", verb)
        assert (answer.code, answer.out) == (4, "")


# -- seal


def test_seal_rewrites_what_is_finished_and_all_reads_as_before(narrows, sealed, tmp_path):
    before = told(narrows, sealed[0], tmp_path / "before")
    assert narrows("evidence", "seal").code == 0
    assert narrows.evidence.store.sealed_generations()
    assert not set(narrows.evidence.store.sealed_generations()) & set(
        narrows.evidence.store.generations()
    )
    assert narrows("evidence", "reindex").code == 0
    assert told(narrows, sealed[0], tmp_path / "after") == before
    assert narrows("evidence", "verify").code == 0


def told(narrows, session, folder):
    """Return what the commands say of a session, and the bytes that they export."""
    folder.mkdir()
    out = [
        narrows("sessions", "list", "--json").out,
        narrows("sessions", "show", session, "--json").out,
        narrows("sessions", "show", session, "--bytes").out,
    ]
    exported = narrows("sessions", "export", session, "--format", "raw", "--output", str(folder))
    assert exported.code == 0, exported.err
    return out, {path.name: path.read_bytes() for path in folder.iterdir()}


def test_seal_leaves_the_work_to_the_seal_that_runs(narrows):
    seal = Seal(narrows.evidence.store, narrows.evidence.keys)
    answer = narrows("evidence", "seal")
    seal.close()
    assert answer.code == 0
    assert "runs" in answer.err
