"""Searches the words of sessions, newest sessions first, without collecting all that is found.

`capture.index_query` asks. Theory of operation: the rows of the full text table are numbered by the
time at which their session began (`capture.index_schema.first_text`), so SQLite gives them newest
first as it goes and stops when nobody asks for more. A session whose words came in several
transactions has several rows; when more than one word is asked for, those few sessions are looked
up apart, word by word, and merged in.

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

from capture.index_schema import BOUNDARY, MOST_TEXTS, first_text, text_moment

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator, Sequence

_STREAM = """
SELECT t.id, t.session, c.session IS NOT NULL
FROM search AS f JOIN text AS t ON t.id = f.rowid LEFT JOIN continued AS c ON c.session = t.session
WHERE f.words MATCH ? AND f.rowid >= ? AND f.rowid < ? ORDER BY f.rowid DESC
"""
_SPREAD = """
SELECT t.session FROM search AS f JOIN text AS t ON t.id = f.rowid
JOIN continued AS c ON c.session = t.session WHERE f.words MATCH ?
"""
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
    spread = _spread(db, wanted, since) if len(wanted) > 1 else {}
    several: set[int] = set()

    def streamed() -> Iterator[tuple[int, int]]:
        for identity, row, continued in db.execute(_STREAM, (" AND ".join(wanted), start, end)):
            if row in spread or row in several:
                continue
            if continued:
                several.add(row)
            yield text_moment(identity), row

    apart = sorted(((moment, row) for row, moment in spread.items()), reverse=True)
    both = merge(streamed(), apart, key=itemgetter(0), reverse=True)
    for _, together in groupby(both, key=itemgetter(0)):
        yield list(dict.fromkeys(row for _, row in together))


def _spread(db: sqlite3.Connection, wanted: Sequence[str], since: int) -> dict[int, int]:
    """Return the moments of sessions with several rows in which every expression is found."""
    query = " INTERSECT ".join([_SPREAD] * len(wanted))
    rows = db.execute(
        f"SELECT id, started FROM session WHERE started >= ? AND id IN ({query})",  # noqa: S608 - fixed texts
        (since, *wanted),
    )
    return {row: text_moment(first_text(started)) for row, started in rows}
