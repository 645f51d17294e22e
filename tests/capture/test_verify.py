"""The verifier on honest evidence: valid while it is written, and true about what is not there."""

import json
import random
import shutil
import subprocess
import sys
import time

import pytest
from sealed_evidence import (
    close_session,
    evidence,
    one_of_each,
    open_session,
    say,
    whole_session,
)

from capture.frames import session_name
from capture.ledger import load_signer
from capture.tail import SegmentReader
from capture.verify import Level, verify


@pytest.fixture
def place():
    with evidence() as found:
        yield found


def run(place, *words):
    return subprocess.run(
        [sys.executable, "-m", "capture.verify", str(place.state), *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def sealed_sessions(place, count=3):
    writer = place.writer()
    sessions = [whole_session(writer) for _ in range(count)]
    writer.close()
    place.sealed()
    return sessions


def test_nothing_signed_yet_is_incomplete(place):
    load_signer(place.store)
    report = place.verify()
    assert report.exit_code == 2
    assert report.findings[0].reason == "nothing was signed yet"


def test_everything_sealed_is_valid_and_counted(place):
    writer = place.writer()
    one_of_each(writer)
    open_session(writer)
    for _ in range(30):
        whole_session(writer, 1000, 20_000)
    writer.close()
    place.sealed()
    report = place.verify()
    assert report.ok
    assert report.exit_code == 0
    assert report.opened
    assert report.gaps == 1
    assert report.sessions == {"opened": 32, "closed": 31, "cut": 1, "open": 0}
    assert report.segments == len(place.store.generations())
    assert not report.pending
    assert report.leaves == len(place.leaves())


def test_a_running_session_is_open_and_what_is_not_sealed_is_pending(place):
    writer = place.writer()
    session = open_session(writer)
    writer.wait_durable()
    place.sealed()
    say(writer, session, 100, 100)
    writer.wait_durable()
    report = place.verify()
    assert report.ok
    assert report.sessions["open"] == 1
    (pending,) = report.pending
    assert pending.commits >= 1
    close_session(writer, session, 100, 100)
    writer.close()
    place.sealed()
    assert not place.verify().pending


@pytest.mark.parametrize("with_key", [True, False])
def test_there_is_no_false_alarm_while_everything_is_written(place, with_key):
    chance = random.Random(1)
    with place.process("write", "20"), place.process("write", "31"), place.process("seal", "0.02"):
        if not with_key:
            aside = place.state / "appliance.key"
            aside.rename(aside.with_suffix(".aside"))
        time.sleep(0.5)
        for _ in range(8):
            report = place.verify()
            assert report.exit_code == 0, report.text()
            assert report.opened == with_key
            time.sleep(chance.uniform(0, 0.1))
        if not with_key:
            aside.with_suffix(".aside").rename(aside)
    assert report.commits > 20


def test_without_the_appliance_key_only_content_is_not_compared(place):
    sealed_sessions(place)
    (place.state / "appliance.key").rename(place.state.parent / f"{place.state.name}.key")
    report = place.verify()
    assert report.ok
    assert not report.opened
    assert any("content was not opened" in note for note in report.notes)
    with_key = place.verify(key=place.state.parent / f"{place.state.name}.key")
    assert with_key.ok
    assert with_key.opened


def test_a_copy_can_be_checked_anywhere(place):
    sealed_sessions(place)
    copy = place.copy()
    shutil.rmtree(place.state)
    assert copy.verify().ok
    place.state.mkdir()


def test_a_segment_and_a_session_can_be_checked_alone(place):
    writer = place.writer()
    sessions = [whole_session(writer, 1000, 20_000) for _ in range(40)]
    writer.close()
    place.sealed()
    generations = place.store.generations()
    assert len(generations) > 2
    one = place.verify(f"{generations[1]:08x}")
    assert one.ok
    assert one.segments == 1
    assert one.opened
    other = place.verify(session_name(sessions[-1]))
    assert other.ok
    assert 1 <= other.segments < len(generations)


def test_a_session_that_was_cut_can_be_checked_alone(place):
    with place.process("write", "10") as child:
        for _ in range(4):
            child.stdout.readline()
    place.writer("gate-1").close()
    place.sealed()
    cut = [json.loads(leaf) for leaf in place.leaves()]
    cut = [leaf for leaf in cut if leaf["type"] == "session_close" and leaf["reason"] == "cut"]
    report = place.verify(cut[0]["session"])
    assert report.ok, report.findings


def test_a_session_or_segment_that_the_log_does_not_know_is_incomplete(place):
    sealed_sessions(place)
    for what in ("0000000000007", "00000077"):
        report = place.verify(what)
        assert report.exit_code == 2
        assert "does not know" in report.findings[0].reason


def test_another_word_than_a_segment_or_session_is_refused(place):
    with pytest.raises(ValueError, match="neither"):
        verify(place.state, "everything")


def test_power_loss_is_incomplete_and_named(place):
    with place.process("write", "10") as child:
        for _ in range(6):
            child.stdout.readline()
        place.sealed()
    dead = place.store.generations()[-1]
    shutil.rmtree(place.store.hot)  # the memory of that boot is gone
    place.store.hot.mkdir(mode=0o700)
    place.writer("gate-1").close()
    place.sealed()
    report = place.verify()
    assert report.exit_code == 2, report.text()
    assert {finding.level for finding in report.findings} == {Level.INCOMPLETE}
    assert any("power was lost" in finding.reason for finding in report.findings)
    assert all(finding.segment > dead for finding in report.findings)
    assert report.sessions["open"] == 0


def test_power_loss_that_took_the_end_of_a_segment_is_incomplete_and_named(place):
    writer = place.writer()
    session = open_session(writer)
    for _ in range(5):
        say(writer, session, 100, 3000)
        writer.wait_durable()
    place.sealed()
    sealed = place.store.generations()[-1]
    size = place.store.segment(sealed).stat().st_size
    for _ in range(5):
        say(writer, session, 100, 3000)
        writer.wait_durable()
    lost = place.copy()  # of the disk as power loss leaves it: what was not sealed never got there
    report = place.verify()
    (pending,) = report.pending
    with lost.store.segment(sealed).open("r+b") as file:
        file.truncate(pending.offset)
        file.truncate(size)
    writer.close()
    shutil.rmtree(place.store.hot)
    lost.store.hot.mkdir(mode=0o700)
    lost.writer("gate-1").close()
    lost.sealed()
    after = lost.verify()
    assert after.exit_code == 2, after.text()
    assert any("power was lost" in finding.reason for finding in after.findings)
    assert after.sessions["cut"] == 1


def test_what_a_dead_seal_left_unsealed_for_long_is_named(place):
    writer = place.writer()
    whole_session(writer)
    writer.wait_durable()
    place.sealed()
    whole_session(writer)
    writer.wait_durable()
    report = place.verify()
    assert report.ok
    (pending,) = report.pending
    later = place.copy()
    set_time(later, pending, 300)
    found = later.verify()
    assert found.exit_code == 2
    assert "was not sealed for 300 s" in found.text()
    writer.close()


def test_reads_while_the_appliance_is_stopped_are_pending_and_nothing_worse(place):
    sealed_sessions(place)
    place.writer("cli").close()
    (pending,) = place.verify().pending
    set_time(place, pending, 300)
    report = place.verify()
    assert report.ok, report.text()
    assert report.pending


def set_time(place, pending, seconds):
    """Move the time of a pending commit; its tag is not checked without the key."""
    (place.state / "appliance.key").unlink()
    path = place.store.segment(pending.segment)
    with path.open("r+b") as file:
        file.seek(pending.offset + 32)
        moment = int.from_bytes(file.read(8), "little") + seconds * 1_000_000_000
        file.seek(pending.offset + 32)
        file.write(moment.to_bytes(8, "little"))


def test_a_commit_that_its_writer_did_not_live_to_finish_is_not_taken_for_evidence(place):
    with place.process("write", "10") as child:
        for _ in range(6):
            child.stdout.readline()
    newest = place.store.segment(place.store.generations()[-1])
    with SegmentReader(newest) as reader:
        last = list(reader.commits())[-1]
    with newest.open("r+b") as file:
        file.seek(last.offset + 100)
        file.write(bytes(last.total_bytes - 100))
    place.writer("gate-1").close()
    place.sealed()
    report = place.verify()
    assert report.ok, report.text()
    assert not report.pending


def test_a_kept_checkpoint_is_compared(place):
    writer = place.writer()
    whole_session(writer)
    writer.wait_durable()
    place.sealed()
    kept = place.state.parent / f"{place.state.name}.kept"
    shutil.copy(place.store.ledger / "checkpoint", kept)
    for _ in range(300):
        whole_session(writer, 10, 10)
    writer.close()
    place.sealed()
    assert place.verify(kept=[kept]).ok


def test_the_command_line_says_what_the_report_says(place):
    sessions = sealed_sessions(place)
    done = run(place)
    assert done.returncode == 0
    assert done.stdout.startswith("valid: all")
    fields = json.loads(run(place, "--json", session_name(sessions[0])).stdout)
    assert fields["ok"]
    assert fields["exit"] == 0
    assert fields["leaves"] == len(place.leaves())
    vkey = (place.state / "ledger.pub").read_text().strip()
    assert "note" not in run(place, "--ledger-key", vkey).stdout
    assert run(place, "--ledger-key", str(place.state / "ledger.pub")).returncode == 0
    (place.store.segments / f"{place.store.generations()[0]:08x}.seg").unlink()
    done = run(place)
    assert done.returncode == 1
    assert "is missing" in done.stdout


@pytest.mark.parametrize(
    "words", [("nonsense",), ("--nonsense",), ("--ledger-key", "/does/not/exist")]
)
def test_a_wrong_command_line_is_no_verdict(place, words):
    sealed_sessions(place)
    done = run(place, *words)
    assert done.returncode == 64
    assert done.stderr
    assert "Traceback" not in done.stderr


def test_the_verifier_changes_nothing(place):
    sealed_sessions(place)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in place.state.rglob("*")}
    place.verify()
    run(place)
    after = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in place.state.rglob("*")}
    assert before == after
