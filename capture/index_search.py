"""Searches the words of sessions, newest sessions first, without collecting all that is found.

`capture.index_query` asks. Theory of operation: the rows of the full text table are numbered by the
time at which their session began (`capture.index_schema.first_text`), so SQLite gives them newest
first as it goes and stops when nobody asks for more. A session whose words came in several
transactions has several rows, all of one millisecond. So each word is followed by itself, back in
time, and where all of them meet in one millisecond (nearly always in one session) its sessions are
looked at. The rarest word sets the pace: the others leap over what lies between. Only sessions with
more rows than a millisecond has numbers for (`overflowing`) are looked up apart.

Words of a search stand in double quotes when they belong together, and end in "*" when they are a
beginning; every one must be in the session. Letters and digits count, in either case and without
accents; anything else only separates, so that `card_number` finds the column of that name.
"""

from __future__ import annotations

import re
from heapq import merge
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

from capture.index_schema import (
    BOUNDARY,
    MOST_TEXTS,
    first_text,
    moment_end,
    moment_start,
    text_moment,
)

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator, Sequence

_ROWS = """
SELECT rowid FROM search WHERE words MATCH ? AND rowid >= ? AND rowid < ? ORDER BY rowid DESC
"""
_SESSIONS = "SELECT DISTINCT session FROM text WHERE id >= ? AND id < ?"
_WITH = """
SELECT DISTINCT t.session FROM search AS f CROSS JOIN text AS t ON t.id = f.rowid
WHERE f.words MATCH ? AND f.rowid >= ? AND f.rowid < ?
"""
_OVERFLOWING = """
SELECT s.id, s.started, o.last FROM overflowing AS o CROSS JOIN session AS s ON s.id = o.session
"""
_STEPS = 256  #: rows that are passed over one by one before a leap; a leap costs about as much
_NO_END = (1 << 63) - 1  #: no row has this id


class NoWords(ValueError):
    """There is no letter or digit to search for."""


def expressions(words: str) -> list[str]:
    """Return the FTS5 expressions for the words of a search; NoWords when there are none."""
    found = []
    for phrase, rest, word in re.findall(r'"([^"]*)"(\*?)|([^\s"]+)', words):
        text = (phrase or word.rstrip("*")).replace(BOUNDARY, " ").replace("\0", " ")
        if any(map(str.isalnum, text)):
            begins = rest or word.endswith("*")
            found.append(f'"{text}"' + (" *" if begins else ""))
    if not found:
        raise NoWords("there is no letter or digit to search for")
    return found


def newest(
    db: sqlite3.Connection, wanted: Sequence[str], since: int = 0, until: int | None = None
) -> Iterator[list[int]]:
    """Yield the stored ids of sessions in which every expression is found: those that began in the
    same millisecond together, each session once, none that began in a millisecond before `since`
    or after that of `until`.
    """
    start = min(first_text(since), _NO_END)
    end = _NO_END if until is None else min(first_text(until) + MOST_TEXTS, _NO_END)
    large = _overflowing(db, wanted)
    met = (
        (moment, row)
        for moment in _meetings(db, wanted, start, end)
        for row in _sessions(db, wanted, moment)
        if row not in large
    )
    apart = sorted(
        (
            (moment, row)
            for row, moment in large.items()
            if text_moment(start) <= moment <= text_moment(end - 1)
        ),
        reverse=True,
    )
    both = merge(met, apart, key=itemgetter(0), reverse=True)
    for _, together in groupby(both, key=itemgetter(0)):
        yield [row for _, row in together]


class _Word:
    """The rows in which one expression is found, back in time; `moment` is that of the row where
    it stands, -1 at the end.
    """

    def __init__(
        self, db: sqlite3.Connection, number: int, expression: str, start: int, end: int
    ) -> None:
        # a text of its own for each word: SQLite keeps one prepared statement for each text
        self._query = f"{_ROWS}-- {number}"
        self._db, self._expression, self._start = db, expression, start
        self._look(end)

    def _look(self, end: int) -> None:
        self._rows = self._db.execute(self._query, (self._expression, self._start, end))
        self._step()

    def _step(self) -> None:
        found = self._rows.fetchone()
        self.moment = -1 if found is None else text_moment(found[0])

    def back_to(self, moment: int) -> None:
        """Go back to a row of this moment or an earlier one."""
        for _ in range(_STEPS):
            if self.moment <= moment:
                return
            self._step()
        if self.moment > moment:
            self._look(moment_end(moment))


def _meetings(db: sqlite3.Connection, wanted: Sequence[str], start: int, end: int) -> Iterator[int]:
    """Yield the moments in which every expression is found, the newest first."""
    words = [_Word(db, number, text, start, end) for number, text in enumerate(wanted)]
    moment = words[0].moment
    while moment >= 0:
        for word in words:
            word.back_to(moment)
            if word.moment < moment:  # nothing of the others is needed down to there
                moment = word.moment
                words.remove(word)
                words.insert(0, word)  # the rarest comes to stand first, and is asked first
                break
        else:
            yield moment
            words[0].back_to(moment - 1)
            moment = words[0].moment


def _sessions(db: sqlite3.Connection, wanted: Sequence[str], moment: int) -> list[int]:
    """Return the sessions of a moment in which every expression is found."""
    place = (moment_start(moment), moment_end(moment))
    there = [row for (row,) in db.execute(_SESSIONS, place)]
    if len(there) == 1:
        return there
    has_all = _with_all(db, wanted, *place)
    return [row for row in there if row in has_all]


def _with_all(
    db: sqlite3.Connection, wanted: Sequence[str], first: int, end: int
) -> frozenset[int]:
    """Return the sessions that have each expression in a row from `first` to before `end`."""
    found = [
        frozenset(row for (row,) in db.execute(_WITH, (expression, first, end)))
        for expression in wanted
    ]
    return frozenset.intersection(*found)


def _overflowing(db: sqlite3.Connection, wanted: Sequence[str]) -> dict[int, int]:
    """Return the moment of every session that has rows in several; -1 where an expression is
    missing.
    """
    found = {}
    for row, started, last in db.execute(_OVERFLOWING).fetchall():
        first = first_text(started)
        has_all = row in _with_all(db, wanted, first, last + 1)
        found[row] = text_moment(first) if has_all else -1
    return found
