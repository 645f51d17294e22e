"""What happened besides sessions, over HTTP: gaps, alarms, refusals, decisions; and who read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from appliance.web import cursors
from appliance.web.parameters import In
from appliance.web.routes import Page, Route
from appliance.web.tokens import Right
from capture import index_query, records
from capture.index_query import EventPlace  # noqa: TC001 - parameters and answers are described at run time
from capture.session_json import EventObject, event_object

if TYPE_CHECKING:
    from appliance.web.reading import Opened
    from appliance.web.review import Review
    from appliance.web.routes import Asked

_EVENTS = (records.Gap, records.Alarm, records.Refused, records.Decision)
_AUDIT = (records.Access, records.Start, records.Stop, records.Recovered)
_LIMIT = In("query", "at most so many", least=1, most=1000)
_CURSOR = In("query", "`next` of the page before", pattern=cursors.EVENT, parse=cursors.event)


@dataclass(frozen=True, slots=True)
class Events:
    """Which events."""

    kind: Annotated[
        Literal["gap", "alarm", "refused", "decision"] | None, In("query", "only these")
    ] = None
    limit: Annotated[int, _LIMIT] = 100
    cursor: Annotated[EventPlace | None, _CURSOR] = None


@dataclass(frozen=True, slots=True)
class Audit:
    """Which records of the machine."""

    kind: Annotated[
        Literal["access", "start", "stop", "recovered"] | None, In("query", "only these")
    ] = None
    limit: Annotated[int, _LIMIT] = 100
    cursor: Annotated[EventPlace | None, _CURSOR] = None


async def list_events(review: Review, asked: Asked, given: Events) -> Page[EventObject]:
    """List gaps, alarms, refused connections and decisions, the newest first."""
    del asked
    return await _list(review, given, _EVENTS)


async def list_audit(review: Review, asked: Asked, given: Audit) -> Page[EventObject]:
    """List who read what, and which processes began, ended or were completed, the newest first."""
    del asked
    return await _list(review, given, _AUDIT)


async def _list(
    review: Review, given: Events | Audit, types: tuple[type, ...]
) -> Page[EventObject]:
    named = [kind for kind in types if given.kind in (None, kind.__name__.lower())]
    kinds = [records.KINDS[kind] for kind in named]

    def question(opened: Opened) -> Page[EventObject]:
        found = index_query.newest_events(opened.index, kinds, given.cursor, given.limit + 1)
        shown = found[: given.limit]
        last = cursors.of_event(shown[-1][0]) if len(found) > given.limit else None
        return {"items": [event_object(event) for _, event in shown], "next": last}

    return await review.reading.ask(question)


ROUTES = (
    Route("GET", "/events", Right.METADATA, "list", list_events),
    Route("GET", "/audit", Right.AUDIT, "list", list_audit),
)
