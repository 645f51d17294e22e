"""Cursors: where the next page of a list begins, as text that a client hands back unchanged.

A cursor names the last thing that was shown, not a number of things, so that pages neither repeat
nor pass over anything while sessions come and go.
"""

from __future__ import annotations

from capture.frames import session_name, session_number
from capture.index_query import EventPlace, Place

MOST = 120


def of_place(place: Place) -> str:
    """Return the cursor of a session."""
    return f"{place.started}.{session_name(place.session)}"


def place(text: str) -> Place:
    """Return the session of a cursor; ValueError when it is none."""
    started, _, name = text.partition(".")
    return Place(_number(started), session_number(name))


def of_event(at: EventPlace) -> str:
    """Return the cursor of an event."""
    return ".".join(map(str, at))


def event(text: str) -> EventPlace:
    """Return the event of a cursor; ValueError when it is none."""
    parts = text.split(".")
    if len(parts) != 4:
        raise ValueError("it is no cursor of this list")
    return EventPlace(*map(_number, parts))


def count(text: str) -> int:
    """Return the number of a cursor that is one; ValueError when it is none."""
    return _number(text)


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) < 1 << 63):
        raise ValueError("it is no cursor of this list")
    return int(text)
