import itertools
import random

import pytest
from review_evidence import Evidence

from capture import index_query as query
from capture import index_rows
from capture.index_query import Filter, State
from capture.index_schema import first_text
from capture.index_search import NoWords, expressions
from capture.records import Operation

WORDS = ["alpha", "beta", "gamma", "delta", "common"]


@pytest.fixture
def evidence(tmp_path):
    return Evidence(tmp_path)


def speeches(gate, chance, sessions=25, said=90):
    """Sessions that say words in several commits; returns {session: (account, words)}."""
    told = {}
    living = []
    for number in range(sessions):
        account = chance.choice(["one", "two"])
        session = gate.open(account)
        told[session] = (account, set())
        living.append(session)
        if number % 5 == 0:
            gate.commit()
    for turn in range(said):
        session = chance.choice(living)
        words = [*chance.sample(WORDS[:4], chance.randrange(1, 3)), "common"]
        chance.shuffle(words)
        gate.record(session, Operation(1, "SELECT", " ".join(words), 0, 1))
        told[session][1].update(words)
        if chance.random() < 0.1:
            gate.close(session)
            living.remove(session)
        if turn % 7 == 0:
            gate.commit()
    gate.commit()
    return told


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_search_finds_the_same_as_looking_at_every_session(evidence, seed):
    chance = random.Random(seed)
    with evidence.writer() as gate:
        told = {}
        with evidence.index():  # makes the index, so that what follows comes in several pieces
            for _ in range(3):
                told |= speeches(gate, chance)
                with evidence.index() as index:
                    everything = list(query.sessions(index, Filter()))
        with evidence.index() as index:
            for count in (1, 2, 3):
                for asked in itertools.combinations(WORDS, count):
                    check(index, everything, told, asked, chance)


def check(index, everything, told, asked, chance):
    middle = everything[len(everything) // 2].started
    for filters in (
        {}, {"account": "one"}, {"since": middle}, {"limit": 3}, {"state": State.CLOSED},
        {"state": State.RUNNING}, {"oldest_first": True}, {"until": middle},
        {"account": "two", "since": middle},
    ):  # fmt: skip
        shuffled = list(asked)
        chance.shuffle(shuffled)
        found = query.sessions(index, Filter(" ".join(shuffled), **filters))
        wanted = [
            session.number
            for session in everything[:: -1 if "oldest_first" in filters else 1]
            if told[session.number][1].issuperset(asked)
            and session.account == filters.get("account", session.account)
            and filters.get("since", 0) <= session.started < filters.get("until", 1 << 63)
            and session.state == filters.get("state", session.state)
        ]
        limit = filters.get("limit", len(wanted))
        assert [session.number for session in found] == wanted[:limit], (asked, filters)


def test_lists_longer_than_a_page_are_whole_and_in_order(evidence, monkeypatch):
    monkeypatch.setattr(query, "PAGE", 7)
    with evidence.writer() as gate:
        numbers = [gate.open("one") for _ in range(50)]
        gate.commit()
        with evidence.index() as index:
            same = index.db.execute("SELECT max(started) FROM session").fetchone()[0]
            index.db.execute("UPDATE session SET started = ? WHERE id % 3 = 0", (same,))
            for filters in ({}, {"account": "one"}, {"state": State.RUNNING}):
                newest = [s.number for s in query.sessions(index, Filter(**filters))]
                oldest = query.sessions(index, Filter(**filters, oldest_first=True))
                assert [s.number for s in oldest] == newest[::-1]
                assert sorted(newest) == numbers
                for limit in (1, 6, 7, 8, 20):
                    some = query.sessions(index, Filter(**filters, limit=limit))
                    assert [s.number for s in some] == newest[:limit]


def test_a_session_with_words_in_many_pieces_is_found_once(evidence):
    with evidence.writer() as gate:
        long, short = gate.open(), gate.open()
        gate.select(short, 1, "select common")
        for op in range(1, 30):
            gate.select(long, op, f"select common{' rare' if op == 20 else ''}")
            gate.commit()
            with evidence.index():
                pass
        with evidence.index() as index:

            def found(words):
                return [session.number for session in query.sessions(index, Filter(words))]

            assert found("common") == [short, long]
            assert found("common rare") == [long]
            assert found("rare ci-deployer") == [long]
            assert [s.number for s in query.sessions(index, Filter("rare", account="ci-deployer"))]


def test_more_texts_than_a_millisecond_has_numbers_for_go_on_in_the_next(evidence, monkeypatch):
    monkeypatch.setattr(index_rows, "MOST_TEXTS", 4)
    with evidence.writer() as gate:
        session = gate.open()
        for op in range(1, 15):
            gate.select(session, op, f"select word{op}")
            gate.commit()
            with evidence.index():
                pass
        with evidence.index() as index:
            for op in range(1, 15):
                found = query.sessions(index, Filter(f"word{op} select"))
                assert [each.number for each in found] == [session]


def test_a_session_whose_texts_went_on_in_the_next_millisecond_is_found_once(evidence, monkeypatch):
    moments = itertools.count()
    monkeypatch.setattr(
        index_rows, "first_text", lambda started: first_text(started + next(moments) * 10**6)
    )
    with evidence.writer() as gate:
        session = gate.open()
        for op in range(1, 6):
            gate.select(session, op, f"select common word{op}")
            gate.commit()
            with evidence.index():
                pass
        with evidence.index() as index:
            assert index.db.execute("SELECT count(*) FROM overflowing").fetchone() == (1,)
            for words in ("common", "word1 word5", "word4 word2 common", "word3 ci-deployer"):
                for state in (None, State.RUNNING):
                    found = query.sessions(index, Filter(words, state=state))
                    assert [each.number for each in found] == [session], (words, state)
            assert not list(query.sessions(index, Filter("word1 word6")))


def test_a_search_reads_no_more_than_is_asked_for(evidence):
    with evidence.writer() as gate:
        for _ in range(300):
            gate.close(gate.open())
        gate.commit()
        with evidence.index() as index:
            looked = []
            index.db.set_trace_callback(looked.append)
            assert len(list(query.sessions(index, Filter("psql", limit=3)))) == 3
            index.db.set_trace_callback(None)
            assert len(looked) < 100, "one question, and one for each session of the same moment"
            first = index.db.execute("SELECT min(started) FROM session").fetchone()[0]
            looked.clear()
            index.db.set_trace_callback(looked.append)
            before = Filter("psql ci-deployer", until=first + 1, limit=3)
            assert len(list(query.sessions(index, before))) == 1
            index.db.set_trace_callback(None)
            assert len(looked) < 100, "it begins where the time asked for ends"


def test_an_index_question_that_is_given_up_leaves_the_index_usable(evidence):
    with evidence.writer() as gate:
        gate.close(gate.open())
        gate.commit()
        with evidence.index() as index:
            found = query.sessions(index, Filter("psql"))
            next(found)
            found.close()
            assert len(list(query.sessions(index, Filter()))) == 1


@pytest.mark.parametrize("words", ["", " ", '"', "-- ; *", '""', "'\u202e"])
def test_a_search_without_letters_or_digits_is_an_error(words):
    with pytest.raises(NoWords):
        expressions(words)


def test_words_become_expressions():
    assert expressions('"card num"* a* "x y" b"c') == [
        '"card num" *',
        '"a" *',
        '"x y"',
        '"b"',
        '"c"',
    ]
