"""Cursors: where the next page of a list begins, as text that a client hands back unchanged.

A cursor names the last thing that was shown, not a number of things, so that pages neither repeat
nor pass over anything while sessions come and go.
"""

from __future__ import annotations

from capture.frames import session_name, session_number
from capture.index_query import EventPlace, Place

_NUMBER = "[0-8]?[0-9]{1,18}"  #: below 2**63
#: What the cursors of each kind of list look like; the functions below are given nothing else.
NUMBER = f"^{_NUMBER}$"
PLACE = rf"^{_NUMBER}\.[0-9a-f][0-9a-hjkmnp-tv-z]{{12}}$"
EVENT = rf"^{_NUMBER}(\.{_NUMBER}){{3}}$"


def of_place(place: Place) -> str:
    """Return the cursor of a session."""
    return f"{place.started}.{session_name(place.session)}"


def place(text: str) -> Place:
    """Return the session of a cursor."""
    started, _, name = text.partition(".")
    return Place(int(started), session_number(name))


def of_event(at: EventPlace) -> str:
    """Return the cursor of an event."""
    return ".".join(map(str, at))


def event(text: str) -> EventPlace:
    """Return the event of a cursor."""
    return EventPlace(*map(int, text.split(".")))
