"""Pairs operations with their results: what was asked, and how it ended.

The command line, the API and the exports read a session's records through it. A session is one
pass; only operations without a result, and a few that wait for one before them, are in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

#: Exchanges that wait for the result of an earlier operation; then they go first.
MOST_WAITING = 1_000

Record = tuple[int, dict[str, Any]]  #: (time, fields), as `capture.reader.Reader.records` gives it


class Exchange(NamedTuple):
    """An operation's fields, and its result's; None when there is no result, or none yet."""

    time_ns: int
    operation: dict[str, Any]
    result: dict[str, Any] | None


def exchanges(records: Iterable[Record]) -> Iterator[Exchange]:
    """Yield every operation once, in their order, as soon as its result is known.

    One whose result does not come while a thousand later ones end is passed by them.
    """
    asked: dict[Any, Record] = {}
    ended: dict[Any, dict[str, Any]] = {}
    for time_ns, fields in records:
        kind, op = fields["record"], fields.get("op")
        if kind == "Operation":
            asked[op] = (time_ns, fields)
        elif kind == "Result" and op in asked:
            ended[op] = fields
            while asked and (first := next(iter(asked))) in ended:
                yield Exchange(*asked.pop(first), ended.pop(first))
            if len(ended) > MOST_WAITING:
                for passing in list(ended):
                    yield Exchange(*asked.pop(passing), ended.pop(passing))
    for op, (time_ns, fields) in asked.items():
        yield Exchange(time_ns, fields, ended.get(op))


def page(records: Iterable[Record], after: int, limit: int) -> tuple[list[Exchange], bool]:
    """Return the first `limit` operations with a number above `after`, and whether there are more.

    Reads no further than their results.
    """
    asked: dict[int, Record] = {}
    ended: dict[int, dict[str, Any]] = {}
    more = False
    for time_ns, fields in records:
        kind, op = fields["record"], fields.get("op", 0)
        if kind == "Operation" and op > after:
            if len(asked) < limit:
                asked[op] = (time_ns, fields)
            else:
                more = True
        elif kind == "Result" and op in asked:
            ended[op] = fields
        if more and len(ended) == len(asked):
            break
    return [Exchange(*record, ended.get(op)) for op, record in asked.items()], more
