"""The seal: everything on disk gets into the ledger once, whatever dies when."""

import json
import random
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

from capture.errors import EvidenceError
from capture.frames import session_name
from capture.index import Index


@pytest.fixture
def place():
    with evidence() as found:
        yield found


def leaves(place, kind=None):
    found = [json.loads(leaf) for leaf in place.leaves()]
    return [leaf for leaf in found if kind in (None, leaf["type"])]


def assert_valid(report):
    assert report.exit_code == 0, report.text()


def test_a_closed_session_has_its_counts_in_the_ledger(place):
    writer = place.writer()
    session = open_session(writer)
    at = say(writer, session, 300, 70_000)
    at = say(writer, session, 1, 2, at)
    close_session(writer, session, 301, 70_002, 2)
    writer.close()
    place.sealed()
    (closed,) = leaves(place, "session_close")
    assert closed["session"] == session_name(session)
    assert closed["bytes"] == closed["declared"][:2] == [301, 70_002]
    assert closed["operations"] == closed["declared"][2] == 2
    assert closed["reason"] == "fin"
    assert closed["commits"] > 1
    assert_valid(place.verify())


def test_every_kind_of_record_that_has_a_leaf_gets_it(place):
    writer = place.writer()
    one_of_each(writer)
    writer.close()
    place.sealed()
    kinds = [leaf["type"] for leaf in leaves(place)]
    assert kinds[0] == "genesis"
    for kind in ("start", "stop", "config", "segment", "session_open", "session_close", "decision",
                 "access", "gap", "heartbeat", "seal_heartbeat"):  # fmt: skip
        assert kind in kinds
    assert_valid(place.verify())


def test_no_leaf_holds_a_word_of_a_record(place):
    writer = place.writer()
    one_of_each(writer)
    session = open_session(writer)
    writer.close()
    place.sealed()
    text = b"\n".join(place.leaves())
    for secret in (b"192.0.2.10", b"backup", b"uid:0", b"sessions list", b"select"):
        assert secret not in text
    assert session_name(session).encode() in text


def test_a_reason_that_is_no_plain_word_stays_out_of_the_ledger(place):
    from capture.records import SessionClose

    writer = place.writer()
    session = open_session(writer)
    writer.record(session, SessionClose("password: hunter2", "client", 0, 0, 0, 0), 1)
    writer.close()
    place.sealed()
    (closed,) = leaves(place, "session_close")
    assert closed["reason"] == "other"
    assert_valid(place.verify())


def test_a_running_session_is_sealed_before_it_ends(place):
    writer = place.writer()
    session = open_session(writer)
    writer.wait_durable()
    seal = place.seal()
    deadline = time.monotonic() + 20
    while not leaves(place, "session_open") and time.monotonic() < deadline:
        seal.step()
    assert [leaf["session"] for leaf in leaves(place, "session_open")] == [session_name(session)]
    assert_valid(place.verify())
    writer.close()
    seal.close()


def test_an_idle_seal_signs_heartbeats_and_nothing_else(place):
    place.writer().close()
    place.sealed()
    before = len(place.leaves())
    seal = place.seal(0.02)
    deadline = time.monotonic() + 20
    while len(place.leaves()) < before + 5 and time.monotonic() < deadline:
        assert not seal.step()
        time.sleep(0.005)
    added = [leaf["type"] for leaf in leaves(place)[before:]]
    assert added == ["start", *["seal_heartbeat"] * (len(added) - 1)]
    seal.close()


def test_a_second_seal_does_not_start(place):
    seal = place.seal()
    with pytest.raises(EvidenceError, match="another seal"):
        place.seal()
    seal.close()
    place.seal().close()


def test_sessions_of_a_killed_writer_are_cut_when_it_was_recovered(place):
    with place.process("write", "10") as child:
        for _ in range(5):
            child.stdout.readline()
    place.writer("gate-1").close()
    place.sealed()
    cut = [leaf for leaf in leaves(place, "session_close") if leaf["reason"] == "cut"]
    assert cut
    assert {leaf["by"] for leaf in cut} == {"recovery"}
    (recovered,) = leaves(place, "recovered")
    assert not recovered["power_loss"]
    opened = {leaf["session"] for leaf in leaves(place, "session_open")}
    assert opened == {leaf["session"] for leaf in leaves(place, "session_close")}
    assert_valid(place.verify())


def test_sessions_that_a_writer_left_open_when_it_stopped_are_cut(place):
    writer = place.writer()
    session = open_session(writer)
    whole_session(writer)
    writer.close()
    place.sealed()
    (cut,) = [leaf for leaf in leaves(place, "session_close") if leaf["reason"] == "cut"]
    assert (cut["session"], cut["by"]) == (session_name(session), "stop")
    assert_valid(place.verify())


def test_the_same_session_has_the_same_leaves_however_often_the_seal_was_restarted(place):
    writer = place.writer()
    session = open_session(writer)
    at = (0, 0)
    for number in range(6):
        at = say(writer, session, 100, 30_000, at)
        writer.wait_durable()
        if number % 2:
            place.sealed()
    close_session(writer, session, *at, 6)
    writer.close()
    other = place.copy()
    for path in [*other.store.ledger.rglob("*"), other.store.evidence / "seal.state"]:
        if path.is_file():
            path.unlink()
    place.sealed()
    other.sealed()
    assert leaves(place, "session_close") == leaves(other, "session_close")
    assert leaves(place, "session_open") == leaves(other, "session_open")
    assert_valid(place.verify())
    assert_valid(other.verify())


def test_a_lost_state_file_costs_nothing_but_time(place):
    writer = place.writer()
    running = open_session(writer)
    whole_session(writer)
    writer.wait_durable()
    place.sealed()
    (place.store.evidence / "seal.state").unlink()
    say(writer, running, 10, 10)
    close_session(writer, running, 10, 10)
    writer.close()
    place.sealed()
    assert len(leaves(place, "session_open")) == len(leaves(place, "session_close")) == 2
    assert_valid(place.verify())


def test_a_ledger_that_was_rolled_back_is_not_continued(place):
    writer = place.writer()
    whole_session(writer)
    writer.wait_durable()
    place.sealed()
    old = place.copy()
    whole_session(writer)
    writer.close()
    place.sealed()
    (place.store.evidence / "seal.state").replace(old.store.evidence / "seal.state")
    with pytest.raises(EvidenceError, match="rolled back"):
        old.seal()


def test_a_ledger_without_its_checkpoint_is_not_begun_anew(place):
    writer = place.writer()
    for _ in range(3):
        whole_session(writer)
    writer.close()
    place.sealed()
    (place.store.ledger / "checkpoint").unlink()
    (place.store.evidence / "seal.state").unlink()
    with pytest.raises(EvidenceError, match="no checkpoint"):
        place.seal()


def test_a_disk_that_refuses_leaves_delays_them_and_loses_none(place):
    writer = place.writer()
    seal = place.seal(0.01)
    seal.step()
    tiles = place.store.ledger / "tile"
    hidden = tiles.with_name("hidden")
    tiles.rename(hidden)
    tiles.write_text("no directory")  # every append fails with ENOTDIR
    whole_session(writer)
    writer.wait_durable()
    before = place.store.ledger.joinpath("checkpoint").read_bytes()
    for _ in range(5):
        seal.step()
        time.sleep(0.01)
    assert place.store.ledger.joinpath("checkpoint").read_bytes() == before
    tiles.unlink()
    hidden.rename(tiles)
    writer.close()
    while seal.step():
        pass
    seal.close()
    assert len(leaves(place, "session_close")) == 1
    assert_valid(place.verify())


def indexed(place):
    with Index.open(place.store.index, readonly=True) as index:
        return index.db.execute("SELECT count(*) FROM session").fetchone()[0]


def test_the_index_grows_with_the_ledger(place):
    writer = place.writer()
    seal = place.seal()
    for number in range(1, 4):
        whole_session(writer)
        writer.wait_durable()
        seal.step()
        assert indexed(place) == number
    writer.close()
    seal.close()


def test_an_index_that_is_made_anew_while_the_seal_runs_is_filled_again(place):
    writer = place.writer()
    seal = place.seal()
    for _ in range(5):
        whole_session(writer)
    writer.wait_durable()
    seal.step()
    place.store.index.unlink()
    whole_session(writer)
    writer.wait_durable()
    for _ in range(4):
        seal.step()
    assert indexed(place) == 6
    writer.close()
    while seal.step():
        pass
    seal.close()
    assert len(leaves(place, "session_open")) == 6
    assert_valid(place.verify())


def test_an_index_that_cannot_be_opened_holds_nothing_up(place):
    writer = place.writer()
    whole_session(writer)
    place.store.index.mkdir()  # no file can be there
    seal = place.seal()
    seal.step()
    whole_session(writer)
    writer.close()
    while seal.step():
        pass
    seal.close()
    assert len(leaves(place, "session_close")) == 2
    place.store.index.rmdir()
    place.sealed()
    assert indexed(place) == 2
    assert_valid(place.verify())


def test_a_seal_that_is_behind_names_what_it_has_not_read(place):
    from capture.follow import Follower
    from capture.sealer import Sealer

    writer = place.writer()
    for _ in range(40):
        whole_session(writer, 1000, 30_000)
    writer.wait_durable()
    sealer = Sealer(place.store)
    follower = Follower(place.store, place.keys, sealer.cursor, digests=True)
    for followed in follower.step(1):
        sealer.take(followed)
    sealer.flush(follower.unread())
    hot = leaves(place, "hot")
    assert hot
    assert hot[0]["commits"] > 0
    report = place.verify()
    assert report.pending
    assert_valid(report)
    writer.close()
    follower.close()
    place.sealed()
    assert_valid(place.verify())


def test_ten_thousand_open_sessions_are_kept_in_little_memory(place):
    import tracemalloc

    from capture.follow import Follower
    from capture.sealer import Sealer

    writer = place.writer()
    sealer = Sealer(place.store)
    follower = Follower(place.store, place.keys, sealer.cursor, digests=True)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(10_000):
        open_session(writer)
        if writer.position % 64 == 0:
            for followed in follower.step():
                sealer.take(followed)
    writer.wait_durable()
    while found := follower.step():
        for followed in found:
            sealer.take(followed)
    del found, followed
    sealer.flush()
    size = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert size < 12 << 20
    writer.close()
    follower.close()


@pytest.mark.parametrize("seed", range(2))
def test_a_seal_killed_at_any_moment_seals_everything_once(place, seed):
    chance = random.Random(seed)
    with place.process("write", "20"), place.process("write", "31"):
        for _ in range(8):
            with place.process("seal", "0.02"):
                time.sleep(chance.uniform(0.0, 0.25))
            assert_valid(place.verify())
    place.writer("gate-9").close()
    place.sealed()
    report = place.verify()
    assert_valid(report)
    assert report.opened
    assert not report.pending
    assert report.sessions["open"] == 0
    assert report.sessions["opened"] > 10


def test_everything_killed_at_once_again_and_again_stays_one_valid_history(place):
    chance = random.Random(7)
    for number in range(5):
        with (
            place.process("write", f"{number}0") as first,
            place.process("write", f"{number}1"),
            place.process("seal", "0.02"),
        ):
            first.stdout.readline()
            time.sleep(chance.uniform(0.0, 0.3))
        assert_valid(place.verify())
    place.writer("gate-9").close()
    place.sealed()
    report = place.verify()
    assert_valid(report)
    assert report.sessions["open"] == 0
    assert report.sessions["cut"] >= 5
    recovered = {leaf["incarnation"] for leaf in leaves(place, "recovered")}
    assert len(recovered) == 10
