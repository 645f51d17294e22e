import multiprocessing
import os
import random
import signal
import sqlite3
import string
from collections import Counter, defaultdict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from review_evidence import OWNER, Evidence

from capture import index as index_module
from capture import index_query as query
from capture.follow import BEGINNING, Follower
from capture.frames import FIRST_RECORD, Kind, incarnation_of
from capture.index import Index, Indexer, IndexUnusable, discard
from capture.index_fill import Busy, _alone, fill, rebuild
from capture.index_query import Filter, State
from capture.index_search import NoWords
from capture.records import (
    KINDS,
    Alarm,
    Attributed,
    Gap,
    Hidden,
    Operation,
    Recovered,
    Result,
    SessionClose,
    SessionOpen,
    Stop,
)
from capture.settings import WriterSettings

SMALL_SEGMENTS = WriterSettings(
    chunk_bytes=64 << 10, chunk_count=3, segment_bytes=256 << 10, commit_s=0.0, reserve_bytes=0
)
TABLES = ("session", "extent", "event", "ended", "owner")


@pytest.fixture
def evidence(tmp_path):
    return Evidence(tmp_path)


def content(index):
    """Everything that the index says, in an order that does not depend on how it was filled."""
    found = {}
    for table in TABLES:
        rows = index.db.execute(f"SELECT * FROM {table}").fetchall()
        found[table] = sorted(rows, key=repr)
    for word in ("select", "orders", "psql", "broken", "5432", "opaque", "nothing"):
        found[word] = [session.number for session in query.sessions(index, Filter(word))]
    return found


def busy_day(gate, seed, sessions=40):
    """Sessions that interleave, with all that may happen to them; some stay open."""
    chance = random.Random(seed)
    living = [gate.open(chance.choice(["ci", "backup", None])) for _ in range(6)]
    asked = Counter()
    for _ in range(sessions * 12):
        session = chance.choice(living)
        what = chance.random()
        if what < 0.5:
            asked[session] += 1
            gate.select(session, asked[session], f"select {chance.randrange(99)} from orders")
        elif what < 0.6:
            asked[session] += 1
            error = Result(asked[session], "error", sqlstate="42P01", message="broken table")
            gate.ask(session, asked[session], "selct 1", error, verdict="denied")
        elif what < 0.7:
            gate.down(session, b"x" * chance.randrange(1, 20_000))
        elif what < 0.75:
            gate.record(session, Hidden("client", 0, 4, "password", "00"))
        elif what < 0.8:
            gate.record(session, Gap("session", "parser", count=1, detail="lost"))
            gate.record(session, Alarm("forged", {"why": "mac"}))
        else:
            gate.close(session, asked[session])
            living.remove(session)
            living.append(gate.open(chance.choice(["ci", "backup", None])))
    gate.commit()


def by_oracle(evidence):
    """Sessions as a plain walk over all frames finds them."""
    found = defaultdict(Counter)
    facts = {}
    for _, session, kind, _, offset, body in evidence.frames():
        if not session:
            continue
        counts, told = found[session], facts.setdefault(session, [])
        if kind == Kind.UP:
            counts["up"] = max(counts["up"], offset + len(body))
        elif kind == Kind.DOWN:
            counts["down"] = max(counts["down"], offset + len(body))
        elif kind >= FIRST_RECORD:
            told.append(kind)
    for session, told in facts.items():
        found[session]["operations"] = told.count(KINDS[Operation])
        found[session]["hidden"] = told.count(KINDS[Hidden])
        found[session]["gaps"] = told.count(KINDS[Gap])
        found[session]["alarms"] = told.count(KINDS[Alarm])
        found[session]["closed"] = told.count(KINDS[SessionClose])
    return found


def test_the_index_says_of_every_session_what_a_walk_over_all_frames_says(evidence):
    with (
        evidence.writer("gate-0", SMALL_SEGMENTS) as first,
        evidence.writer("gate-1", SMALL_SEGMENTS) as second,
    ):
        busy_day(first, 1)
        busy_day(second, 2)
        with evidence.index() as index:
            found = {session.number: session for session in query.sessions(index, Filter())}
    assert len(evidence.store.generations()) > 4
    wanted = by_oracle(evidence)
    assert found.keys() == wanted.keys()
    for number, counts in wanted.items():
        session = found[number]
        assert session.state is (State.CLOSED if counts["closed"] else State.RUNNING)
        assert (session.bytes_up, session.bytes_down) == (counts["up"], counts["down"])
        assert session.operations == counts["operations"]
        assert (session.hidden, session.gaps, session.alarms) == (
            counts["hidden"], counts["gaps"], counts["alarms"],
        )  # fmt: skip
        opened, attributed = (fields for _, fields in evidence.told(number)[:2])
        assert session.client == f"{opened['client']}:{opened['client_port']}"
        assert session.account == attributed["account"]
        assert session.unknown == attributed["reason"]
        assert session.owner == attributed["owner"]
        results = [fields for kind, fields in evidence.told(number) if kind == "Result"]
        assert session.errors == sum(fields["status"] == "error" for fields in results)
        assert session.denied == session.errors


def test_extents_lead_to_every_commit_that_holds_frames_of_a_session(evidence):
    with evidence.writer(settings=SMALL_SEGMENTS) as gate:
        busy_day(gate, 3)
        with evidence.index() as index:
            for number in by_oracle(evidence):
                extents = list(query.extents(index, number))
                places = {
                    generation for generation, session, *_ in evidence.frames() if session == number
                }
                assert {extent.generation for extent in extents} == places
                assert sum(extent.up_bytes for extent in extents) == sum(
                    len(body)
                    for _, session, kind, _, _, body in evidence.frames()
                    if session == number and kind == Kind.UP
                )


@pytest.mark.parametrize("every", [1, 2, 7])
def test_how_commits_are_grouped_into_transactions_changes_nothing(evidence, tmp_path, every):
    with evidence.writer(settings=SMALL_SEGMENTS) as gate:
        busy_day(gate, 4)
    with evidence.index() as index:
        wanted = content(index)
    with Index.open(tmp_path / "other.sqlite") as other:
        indexer = Indexer(other)
        follower = Follower(evidence.store, evidence.keys, indexer.cursor)
        taken = 0
        while found := follower.step(1):
            for followed in found:
                indexer.take(followed)
                taken += 1
                if taken % every == 0:
                    indexer.flush()
        indexer.flush()
        follower.close()
        assert content(other) == wanted


def test_two_indexers_at_once_count_every_commit_once(evidence):
    with evidence.writer(settings=SMALL_SEGMENTS) as gate:
        busy_day(gate, 5)
    with evidence.index() as index:
        wanted = content(index)
    evidence.store.index.unlink()
    with Index.open(evidence.store.index) as one, Index.open(evidence.store.index) as two:
        indexers = [Indexer(one), Indexer(two)]
        followers = [Follower(evidence.store, evidence.keys, each.cursor) for each in indexers]
        chance = random.Random(5)
        for _ in range(400):
            turn = chance.randrange(2)
            for followed in followers[turn].step(30_000):
                indexers[turn].take(followed)
            if chance.random() < 0.5:
                indexers[turn].flush()
        for indexer, follower in zip(indexers, followers, strict=True):
            indexer.flush()
            follower.close()
            assert not indexer.failed
            assert not indexer.behind
        assert content(one) == wanted


def test_a_batch_that_could_not_be_written_is_written_later_and_counted_once(evidence, monkeypatch):
    with evidence.writer(settings=SMALL_SEGMENTS) as gate:
        busy_day(gate, 6)
    with evidence.index() as index:
        wanted = content(index)
    evidence.store.index.unlink()
    monkeypatch.setattr(index_module, "BUSY_S", 0.0)
    with Index.open(evidence.store.index) as index, Index.open(evidence.store.index) as other:
        indexer = Indexer(index)
        follower = Follower(evidence.store, evidence.keys, indexer.cursor)
        other.db.execute("BEGIN IMMEDIATE")
        while found := follower.step(50_000):
            for followed in found:
                indexer.take(followed)
            indexer.flush()
            assert "locked" in indexer.failed
        other.db.execute("ROLLBACK")
        indexer.flush()
        follower.close()
        assert not indexer.failed
        assert content(index) == wanted


def test_a_transaction_that_fails_half_way_is_repeated_and_counted_once(evidence):
    with evidence.writer(settings=SMALL_SEGMENTS) as gate:
        busy_day(gate, 15)
    with evidence.index() as index:
        wanted = content(index)
    evidence.store.index.unlink()
    with Index.open(evidence.store.index) as index:
        indexer = Indexer(index)
        follower = Follower(evidence.store, evidence.keys, indexer.cursor)
        while found := follower.step():
            for followed in found:
                indexer.take(followed)
        follower.close()
        (pages,) = index.db.execute("PRAGMA page_count").fetchone()
        index.db.execute(f"PRAGMA max_page_count = {pages + 10}")
        indexer.flush()
        assert "full" in indexer.failed
        assert not content(index)["session"]
        index.db.execute("PRAGMA max_page_count = 1000000")
        indexer.flush()
        assert not indexer.failed
        assert content(index) == wanted


def test_a_batch_that_grew_too_long_is_dropped_and_read_again(evidence, monkeypatch):
    with evidence.writer(settings=SMALL_SEGMENTS) as gate:
        busy_day(gate, 7)
    with evidence.index() as index:
        wanted = content(index)
    evidence.store.index.unlink()
    monkeypatch.setattr(index_module, "BUSY_S", 0.0)
    monkeypatch.setattr(index_module, "MOST_ROWS", 30)
    with Index.open(evidence.store.index) as index, Index.open(evidence.store.index) as other:
        indexer = Indexer(index)
        follower = Follower(evidence.store, evidence.keys, indexer.cursor)
        other.db.execute("BEGIN IMMEDIATE")
        while found := follower.step(50_000):
            for followed in found:
                indexer.take(followed)
            indexer.flush()
        other.db.execute("ROLLBACK")
        indexer.flush()
        follower.close()
        assert indexer.behind
        fill(index, evidence.store, evidence.keys)
        assert content(index) == wanted


def test_a_running_session_is_listed_and_its_bytes_grow(evidence):
    with evidence.writer() as gate:
        session = gate.open()
        gate.up(session, b"a" * 100)
        gate.commit()
        with evidence.index() as index:
            [before] = query.sessions(index, Filter(state=State.RUNNING))
            gate.down(session, b"b" * 9000)
            gate.commit()
            fill(index, evidence.store, evidence.keys)
            [after] = query.sessions(index, Filter())
            assert (before.bytes_up, before.bytes_down) == (100, 0)
            assert (after.bytes_up, after.bytes_down) == (100, 9000)
            assert after.state is State.RUNNING
            assert after.ended is None


def _killed(path, ready):
    gate_evidence = Evidence(path)
    with gate_evidence.writer(settings=SMALL_SEGMENTS) as gate:
        gate.close(gate.open())
        session = gate.open("backup")
        gate.up(session, b"half a request")
        gate.commit()
        gate.up(session, b", the rest")  # only in memory when the process dies
        ready.set()
        signal.pause()


def kill_a_gate(evidence, path):
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    process = spawn.Process(target=_killed, args=(path, ready))
    process.start()
    assert ready.wait(30)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_a_session_of_a_killed_process_is_cut_at_the_time_of_the_recovery(evidence, tmp_path):
    kill_a_gate(evidence, tmp_path)
    with evidence.index() as index:
        states = {session.state for session in query.sessions(index, Filter())}
        assert states == {State.CLOSED, State.RUNNING}
    with evidence.writer("gate-1"), evidence.index() as index:
        [cut] = query.sessions(index, Filter(state=State.CUT))
        [closed] = query.sessions(index, Filter(state=State.CLOSED))
        [recovered] = query.events(index, KINDS[Recovered])
    assert not list(query.sessions(index_again(evidence), Filter(state=State.RUNNING)))
    assert cut.bytes_up == len(b"half a request, the rest")
    assert cut.ended == recovered.time_ns
    assert recovered.fields["incarnation"] == incarnation_of(cut.number)
    assert closed.reason == "fin"


def test_a_session_that_its_process_left_open_at_a_stop_is_cut_then(evidence):
    with evidence.writer() as gate:
        gate.open()
    with evidence.index() as index:
        [cut] = query.sessions(index, Filter(state=State.CUT))
        [stop] = query.events(index, KINDS[Stop])
    assert cut.ended == stop.time_ns


@pytest.mark.parametrize("backwards", [False, True])
def test_an_incarnation_that_was_recovered_twice_ended_the_first_time(
    evidence, tmp_path, backwards
):
    with evidence.writer("gate-0") as gate:
        session = gate.open()
        gate.commit()
        with evidence.writer("gate-1") as one, evidence.writer("gate-2") as two:
            again = Recovered(incarnation_of(session), (), 0, 0)
            one.writer.record(0, again, 5_000)
            two.writer.record(0, again, 9_000)
        follower = Follower(evidence.store, evidence.keys)
        found = sorted(follower.step(), key=lambda f: f.incarnation, reverse=backwards)
        follower.close()
        with Index.open(tmp_path / "index.sqlite") as index:
            indexer = Indexer(index)
            for followed in found:
                indexer.take(followed)
            indexer.flush()
            assert query.session(index, session).ended == 5_000


def index_again(evidence):
    return Index.open(evidence.store.index, readonly=True)


def test_the_order_of_streams_does_not_matter_for_a_cut_session(evidence, tmp_path):
    kill_a_gate(evidence, tmp_path)
    with evidence.writer("gate-1"):
        pass
    with evidence.index() as index:
        wanted = content(index)
    everything = []
    follower = Follower(evidence.store, evidence.keys)
    while found := follower.step():
        everything += found
    follower.close()
    for backwards in (False, True):
        with Index.open(tmp_path / f"{backwards}.sqlite") as index:
            indexer = Indexer(index)
            for followed in sorted(
                everything, key=lambda f: f.incarnation, reverse=backwards
            ):  # a stable sort: the order inside a stream stays
                indexer.take(followed)
                indexer.flush()
            assert content(index) == wanted


def test_a_rebuilt_index_gives_the_same_answers(evidence):
    with evidence.writer(settings=SMALL_SEGMENTS) as gate:
        busy_day(gate, 8)
        with evidence.index() as index:
            wanted = content(index)
            count = len(wanted["session"])
            assert rebuild(evidence.store, evidence.keys) == count
            assert content(index) == wanted, "through a connection that was open meanwhile"
        with evidence.index() as index:
            assert content(index) == wanted
    assert [path.name for path in evidence.store.evidence.glob("index.*")] == ["index.sqlite"]


def test_an_indexer_goes_on_in_an_index_that_was_rebuilt_under_it(evidence):
    with evidence.writer(settings=SMALL_SEGMENTS) as gate, evidence.index() as index:
        busy_day(gate, 9, sessions=5)
        indexer = Indexer(index)
        follower = Follower(evidence.store, evidence.keys, indexer.cursor)
        for _ in range(4):
            for followed in follower.step():
                indexer.take(followed)
            indexer.flush()
            rebuild(evidence.store, evidence.keys)
            busy_day(gate, 10, sessions=5)
        for followed in follower.step():
            indexer.take(followed)
        indexer.flush()
        follower.close()
        assert not indexer.failed
        assert not indexer.behind
        grown = content(index)
        rebuild(evidence.store, evidence.keys)
        assert content(index) == grown


def test_an_indexer_leaves_out_what_does_not_continue_the_index_and_goes_on_when_it_does(
    evidence, monkeypatch
):
    """The index becomes an older one under it, as at the end of a rebuild."""
    monkeypatch.setattr(index_module, "LOOK_S", 0.0)
    with evidence.writer(settings=SMALL_SEGMENTS) as gate, evidence.index() as index:
        indexer = Indexer(index)
        follower = Follower(evidence.store, evidence.keys, indexer.cursor)

        def pass_on():
            gate.close(gate.open())
            gate.commit()
            while found := follower.step():
                for followed in found:
                    indexer.take(followed)
                indexer.flush()

        pass_on()
        older = sqlite3.connect(":memory:")
        index.db.backup(older)
        pass_on()
        older.backup(index.db)
        older.close()
        pass_on()
        assert indexer.behind
        assert len(content(index)["session"]) == 1, "a hole in the index would stay for good"
        pass_on()
        fill(index, evidence.store, evidence.keys)
        assert len(content(index)["session"]) == 4
        pass_on()
        assert len(content(index)["session"]) == 5
        follower.close()


def test_only_one_process_rebuilds_at_a_time(evidence):
    with evidence.writer():
        pass
    with _alone(evidence.store), pytest.raises(Busy):
        rebuild(evidence.store, evidence.keys)
    assert rebuild(evidence.store, evidence.keys) == 0


@pytest.mark.parametrize("damage", ["header", "middle", "empty", "gone"])
def test_a_damaged_index_is_made_anew(evidence, damage):
    with evidence.writer(settings=SMALL_SEGMENTS) as gate:
        busy_day(gate, 11, sessions=10)
    with evidence.index() as index:
        wanted = content(index)
        index.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    path = evidence.store.index
    whole = path.read_bytes()
    broken = {
        "header": b"no database" + whole[11:],
        "middle": whole[:4096] + b"\xa5" * (len(whole) - 4096),
        "empty": b"",
        "gone": None,
    }[damage]
    path.unlink() if broken is None else path.write_bytes(broken)
    rebuild(evidence.store, evidence.keys)
    with evidence.index() as index:
        assert content(index) == wanted


def test_an_index_that_turns_out_to_be_damaged_is_filled_anew(evidence):
    with evidence.writer(settings=SMALL_SEGMENTS) as gate:
        busy_day(gate, 16, sessions=10)
        with evidence.index() as index:
            index.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            wanted = content(index)
        path = evidence.store.index
        whole = path.read_bytes()
        damaged = whole[:4096] + b"\xa5" * (len(whole) - 4096)
        path.write_bytes(damaged)
        with evidence.index() as index:
            assert content(index) == wanted
            index.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        path.write_bytes(damaged)
        with Index.open(path) as index:
            assert Indexer(index).cursor(evidence.store.generations()[0]) == BEGINNING
        path.write_bytes(damaged)
        busy_day(gate, 17, sessions=10)
        rebuild(evidence.store, evidence.keys)
        with evidence.index() as index:
            assert len(content(index)["session"]) > len(wanted["session"])


def test_an_open_indexer_follows_an_index_that_was_thrown_away(evidence):
    with evidence.writer(settings=SMALL_SEGMENTS) as gate, evidence.index() as index:
        indexer = Indexer(index)
        follower = Follower(evidence.store, evidence.keys, indexer.cursor)
        discard(evidence.store.index)
        rebuild(evidence.store, evidence.keys)
        busy_day(gate, 12, sessions=5)
        for followed in follower.step():
            indexer.take(followed)
        indexer.flush()
        follower.close()
        assert not indexer.failed
        with index_again(evidence) as other:
            assert len(content(other)["session"]) > 5
            assert content(index) == content(other)


def test_an_index_of_another_version_is_filled_anew(evidence):
    with evidence.writer(settings=SMALL_SEGMENTS) as gate:
        busy_day(gate, 13, sessions=5)
    with evidence.index() as index:
        wanted = content(index)
        index.db.execute("PRAGMA user_version = 999")
    with pytest.raises(IndexUnusable, match="version 999"):
        Index.open(evidence.store.index, readonly=True)
    with evidence.index() as index:
        assert content(index) == wanted


def test_an_index_that_is_not_there_is_not_made_by_a_reader(tmp_path):
    with pytest.raises(IndexUnusable):
        Index.open(tmp_path / "index.sqlite", readonly=True)
    assert not list(tmp_path.iterdir())


def test_the_index_can_be_read_by_its_owner_only(evidence):
    with evidence.writer(), evidence.index():
        for path in evidence.store.evidence.glob("index.sqlite*"):
            assert path.stat().st_mode & 0o077 == 0


def test_statements_are_not_kept_in_the_index(evidence):
    with evidence.writer() as gate:
        session = gate.open()
        gate.select(session, 1, "select 'very-secret-literal' from orders")
        gate.close(session, 1)
        gate.commit()
        with evidence.index() as index:
            index.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            assert [s.number for s in query.sessions(index, Filter("very-secret-literal"))]
    assert b"very-secret-literal" not in evidence.store.index.read_bytes()


# -- search


def search(evidence, words):
    with evidence.index() as index:
        return [session.number for session in query.sessions(index, Filter(words))]


def test_a_search_finds_what_was_asked_answered_and_known(evidence):
    with evidence.writer() as gate:
        plain = gate.open("backup", owner={**OWNER, "exe": "/opt/tool", "argv": ["t", "--deep"]})
        gate.select(plain, 1, "SELECT card_number FROM shop.cards WHERE id = $1", binds=("4711",))
        gate.close(plain, 1)
        wrong = gate.open(target="2001:db8::1")
        gate.ask(
            wrong, 1, "select * from orderz",
            Result(1, "error", sqlstate="42P01", message='relation "orderz" does not exist'),
        )  # fmt: skip
        gate.close(wrong, 1)
    for words in (
        "card_number", "CARD_number", "shop.cards", "card", "4711", "/opt/tool", "--deep",
        "backup", "card_number shop", '"from shop"', "numb*", '"card num"*', "opaque backup",
    ):  # fmt: skip
        assert search(evidence, words) == [plain], words
    for words in ("orderz", "42P01", '"does not exist"', "2001:db8::1"):
        assert search(evidence, words) == [wrong], words
    for words in ("numb", '"cards from"', "card_number orderz", '"number orders"'):
        assert search(evidence, words) == [], words
    assert search(evidence, "5432") == [wrong, plain]


def test_a_phrase_does_not_run_over_from_one_statement_into_the_next(evidence):
    with evidence.writer() as gate:
        session = gate.open()
        gate.select(session, 1, "select alpha")
        gate.select(session, 2, "beta gamma")
        gate.commit()
        assert search(evidence, '"beta gamma"') == [session]
        assert search(evidence, '"alpha beta"') == []
        assert search(evidence, '"alpha \ue000 beta"') == []
        assert search(evidence, "alpha beta") == [session]


def test_words_that_came_in_different_commits_are_found_together(evidence):
    with evidence.writer() as gate:
        session = gate.open()
        gate.select(session, 1, "select alpha")
        gate.commit()
        assert search(evidence, "alpha") == [session]
        gate.select(session, 2, "select omega")
        gate.commit()
        assert search(evidence, "alpha omega") == [session]


HOSTILE = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("\"'*()^-+:{}\0\ue000\u202e\x1b\n"),
    max_size=40,
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(HOSTILE, min_size=1, max_size=12), asked=HOSTILE)
def test_no_text_breaks_the_search(tmp_path_factory, texts, asked):
    evidence = Evidence(tmp_path_factory.mktemp("hostile"))
    with evidence.writer() as gate:
        session = gate.open()
        for op, text in enumerate(texts, 1):
            gate.record(session, Operation(op, "unknown", text, 0, len(text)))
        gate.commit()
        with evidence.index() as index:
            for text in (asked, *texts, "\0", '"', '""', "*", '"*"*'):
                try:
                    list(query.sessions(index, Filter(text))) if text else None
                except NoWords:
                    assert not any(c.isalnum() for c in text.replace("\0", "\n"))
            for word in {w for text in texts for w in split(text)}:
                assert [s.number for s in query.sessions(index, Filter(word))] == [session]


def split(text):
    """Runs of plain letters and digits: words by anybody's definition."""
    plain = string.ascii_letters + string.digits
    word, words, after = "", [], " "
    for letter in text + " ":
        if letter in plain:
            word += letter
            continue
        # next to other letters the tokenizer, rightly, sees one longer word
        if word and not (after.isalnum() or letter.isalnum() or ord(letter) > 127):
            words.append(word)
        word, after = "", letter if ord(letter) <= 127 else "x"
    return words


# -- names and filters


def test_a_unique_beginning_of_an_id_is_enough(evidence):
    with evidence.writer() as gate:
        first, second = gate.open(), gate.open()
        gate.commit()
        with evidence.index() as index:
            name = query.session(index, first).name
            assert query.named(index, name) == [first]
            assert query.named(index, name[:-1]) == [first, second]
            assert query.named(index, name[:-1].upper()) == [first, second]
            assert query.named(index, name + "0") == []
            assert query.named(index, "") == []
            assert query.named(index, "zz") == []
            assert query.named(index, "u'; --") == []


def test_ids_in_the_upper_half_of_64_bits_are_found(tmp_path):
    with Index.open(tmp_path / "index.sqlite") as index:
        high = 0xFFFFFE << 40 | 7
        index.db.execute(
            "INSERT INTO session (id, started, bytes_up, bytes_down, operations, denied, errors,"
            " hidden, gaps, alarms) VALUES (?, 1, 0, 0, 0, 0, 0, 0, 0, 0)",
            (high - (1 << 64),),
        )
        index.db.execute("INSERT INTO ended VALUES (?, 9)", (0xFFFFFE,))
        [found] = query.sessions(index, Filter())
        assert found.number == high
        assert found.state is State.CUT
        assert query.named(index, found.name[:3]) == [high]
        assert query.session(index, high) == found


def test_filters_choose_and_newest_come_first(evidence):
    with evidence.writer() as gate:
        numbers = [gate.open(account) for account in ("a", "b", None, "a")]
        gate.close(numbers[0])
        gate.commit()
        with evidence.index() as index:

            def chosen(**filters):
                return [s.number for s in query.sessions(index, Filter(**filters))]

            assert chosen() == numbers[::-1]
            assert chosen(limit=2) == numbers[:1:-1]
            assert chosen(account="a") == [numbers[3], numbers[0]]
            assert chosen(account="a", state=State.CLOSED) == [numbers[0]]
            assert chosen(unattributed=True) == [numbers[2]]
            assert chosen(state=State.RUNNING) == numbers[:0:-1]
            assert chosen(state=State.CUT) == []
            since = query.session(index, numbers[2]).started
            assert chosen(since=since) == [numbers[3], numbers[2]]


def test_a_record_that_is_not_understood_does_not_stop_the_index(evidence):
    with evidence.writer() as gate:
        session = gate.open()
        gate.writer.append(KINDS[Operation], session, b'{"op": 1}', 1)
        gate.writer.append(KINDS[Attributed], session, b"\xff\xfe", 1)
        gate.writer.append(KINDS[SessionOpen], session, b"[]", 1)
        gate.writer.append(250, session, b"from the future", 1)
        gate.close(session)
        gate.commit()
        with evidence.index() as index:
            [found] = query.sessions(index, Filter())
            assert found.state is State.CLOSED
            assert found.account == "ci-deployer"


def test_listings_use_an_index_of_the_table_and_sort_nothing(evidence):
    with evidence.writer(), evidence.index() as index:
        for filters in (
            Filter(),
            Filter(account="x"),
            Filter(since=1),
            Filter(state=State.RUNNING),
        ):
            plans = []
            index.db.set_trace_callback(plans.append)
            list(query.sessions(index, filters))
            index.db.set_trace_callback(None)
            rows = index.db.execute(f"EXPLAIN QUERY PLAN {plans[0]}").fetchall()
            plan = " ".join(row[3] for row in rows)
            assert "USE TEMP B-TREE" not in plan
            assert "SCAN s USING INDEX" in plan or "SEARCH s USING INDEX" in plan


def test_rows_of_the_schema_are_what_sqlite_keeps(evidence):
    with evidence.writer(), evidence.index() as index:
        assert index.db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        with pytest.raises(sqlite3.OperationalError):
            index_again(evidence).db.execute("DELETE FROM session")


def _indexes_slowly(path, ready):
    evidence = Evidence(path)
    index = Index.open(evidence.store.index)
    indexer = Indexer(index)
    follower = Follower(evidence.store, evidence.keys, indexer.cursor)
    ready.set()
    while True:
        for followed in follower.step(1):
            indexer.take(followed)
            indexer.flush()


def test_an_indexer_that_is_killed_at_any_moment_leaves_an_index_that_is_right(evidence, tmp_path):
    with evidence.writer(settings=SMALL_SEGMENTS) as gate:
        busy_day(gate, 14, sessions=120)
    with evidence.index() as index:
        wanted = content(index)
    evidence.store.index.unlink()
    spawn = multiprocessing.get_context("spawn")
    chance = random.Random(14)
    for _ in range(5):
        ready = spawn.Event()
        process = spawn.Process(target=_indexes_slowly, args=(tmp_path, ready))
        process.start()
        assert ready.wait(60)
        process.join(chance.random() * 0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    with evidence.index() as index:
        assert content(index) == wanted
        assert index.db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
