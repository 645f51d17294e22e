"""Sessions over HTTP: the list, one of them, what was asked and answered in it, and ending it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

from appliance import live
from appliance.web import cursors
from appliance.web.parameters import SESSION, In, time_ns
from appliance.web.problem import Problem
from appliance.web.routes import Page, Route
from appliance.web.tokens import Right
from capture import exchange, index_query
from capture.frames import session_number
from capture.index_query import Filter, Place, State
from capture.index_search import expressions
from capture.session_json import (
    SECTIONS,
    OperationObject,
    SessionObject,
    operation_object,
    record_objects,
    session_object,
)

if TYPE_CHECKING:
    from appliance.web.reading import Opened
    from appliance.web.review import Review
    from appliance.web.routes import Asked

Kind = Literal["facts", "gaps", "alarms", "hidden", "withheld", "decisions"]
_ID = In("path", "id of the session", pattern=SESSION)
_CURSOR = "`next` of the page before"


def _words(text: str) -> str:
    expressions(text)
    return text


@dataclass(frozen=True, slots=True)
class Which:
    """Which sessions."""

    q: Annotated[
        str | None,
        In("query", "words that are in the session, all of them; needs the role reviewer",
           longest=500, parse=_words, told=r"[\p{L}\p{N}]"),
    ] = None  # fmt: skip
    account: Annotated[str | None, In("query", "of this service account", longest=128)] = None
    unknown: Annotated[bool, In("query", "without a service account")] = False
    state: Annotated[State | None, In("query", "what became of it")] = None
    protocol: Annotated[str | None, In("query", "of this protocol", longest=32)] = None
    target: Annotated[
        str | None,
        In("query", "to this address, or address:port, IPv6 in brackets", longest=64),
    ] = None
    since: Annotated[
        int | None,
        In("query", "started then or later", longest=40, parse=time_ns, form="date-time"),
    ] = None
    until: Annotated[
        int | None, In("query", "started before", longest=40, parse=time_ns, form="date-time")
    ] = None
    limit: Annotated[int, In("query", "at most so many", least=1, most=1000)] = 100
    cursor: Annotated[
        Place | None, In("query", _CURSOR, pattern=cursors.PLACE, parse=cursors.place)
    ] = None

    @property
    def needs(self) -> Right:
        """Return the right: who may not read content may not find out what is in it either."""
        return Right.METADATA if self.q is None else Right.PAYLOAD

    @property
    def action(self) -> str:
        """Return what the evidence calls it."""
        return "list" if self.q is None else "search"


@dataclass(frozen=True, slots=True)
class One:
    """One session."""

    session: Annotated[str, _ID]


@dataclass(frozen=True, slots=True)
class Operations:
    """Operations of a session."""

    session: Annotated[str, _ID]
    limit: Annotated[int, In("query", "at most so many", least=1, most=200)] = 100
    cursor: Annotated[int, In("query", _CURSOR, pattern=cursors.NUMBER, parse=int)] = 0


@dataclass(frozen=True, slots=True)
class Records:
    """Records of a session that are not operations."""

    session: Annotated[str, _ID]
    kind: Annotated[Kind, In("query", "which records")]
    limit: Annotated[int, In("query", "at most so many", least=1, most=1000)] = 100
    cursor: Annotated[int, In("query", _CURSOR, pattern=cursors.NUMBER, parse=int)] = 0


@dataclass(frozen=True, slots=True)
class Kill:
    """A session to end, and why."""

    session: Annotated[str, _ID]
    reason: Annotated[
        str, In("body", "why, for the record", longest=1000, pattern=r"[\s\S]*\S[\s\S]*")
    ]


class Killed(TypedDict):
    """A session that was ended."""

    id: str
    killed: Literal["yes"]


async def list_sessions(review: Review, asked: Asked, given: Which) -> Page[SessionObject]:
    """List sessions, the newest first."""
    del asked
    chosen = Filter(
        words=given.q or "", account=given.account, unattributed=given.unknown, since=given.since,
        until=given.until, state=given.state, limit=given.limit + 1, protocol=given.protocol,
        target=given.target, after=given.cursor,
    )  # fmt: skip

    def question(opened: Opened) -> Page[SessionObject]:
        """Read the evidence."""
        found = list(index_query.sessions(opened.index, chosen))
        shown, last = found[: given.limit], None
        if len(found) > given.limit:
            last = cursors.of_place(Place(shown[-1].started, shown[-1].number))
        return {"items": [session_object(session) for session in shown], "next": last}

    return await review.reading.ask(question)


async def get_session(review: Review, asked: Asked, given: One) -> SessionObject:
    """Return one session."""
    del asked
    return await review.reading.ask(lambda opened: session_object(opened.session(given.session)))


async def list_operations(review: Review, asked: Asked, given: Operations) -> dict[str, Any]:
    """List what was asked in a session and how it ended, in its order."""
    del asked

    def question(opened: Opened) -> dict[str, Any]:
        """Read the evidence."""
        number = opened.session(given.session).number
        found, more = exchange.page(opened.reader.records(number), given.cursor, given.limit)
        last = str(found[-1].operation["op"]) if more else None
        return {"items": [operation_object(each) for each in found], "next": last}

    return await review.reading.ask(question)


async def list_records(review: Review, asked: Asked, given: Records) -> Page[dict[str, Any]]:
    """List a session's records of one kind, in its order; docs/evidence-format.md has their fields
    (besides them each has a `time`).
    """
    del asked
    end = given.cursor + given.limit

    def question(opened: Opened) -> Page[dict[str, Any]]:
        """Read the evidence."""
        records = opened.reader.records(opened.session(given.session).number)
        found = record_objects(records, SECTIONS[given.kind])
        items = list(islice(found, given.cursor, end + 1))
        more = len(items) > given.limit
        return {"items": items[: given.limit], "next": str(end) if more else None}

    return await review.reading.ask(question)


async def kill_session(review: Review, asked: Asked, given: Kill) -> Killed:
    """End a running session; the gate records who did it and why, as a Decision."""
    done = await asyncio.to_thread(
        live.kill, review.run, session_number(given.session), given.reason, asked.actor
    )
    if not done:
        raise Problem("not-running", f"session {given.session} does not run")
    return {"id": given.session, "killed": "yes"}


ROUTES = (
    Route("GET", "/sessions", Right.METADATA, "list", list_sessions),
    Route("GET", "/sessions/{session}", Right.METADATA, "show", get_session),
    Route(
        "GET", "/sessions/{session}/operations", Right.PAYLOAD, "show", list_operations,
        answer=Page[OperationObject],
    ),
    Route("GET", "/sessions/{session}/records", Right.PAYLOAD, "show", list_records),
    Route(
        "POST", "/sessions/{session}/kill", Right.KILL, "kill", kill_session, may=("not-running",)
    ),
)  # fmt: skip
