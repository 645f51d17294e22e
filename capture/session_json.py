"""A session, its operations and the records beside them as JSON objects.

The command line and the review API show these and nothing else, so that they cannot disagree. The
types are what the API's description is generated from; docs/cli.md explains the keys. Times are
RFC 3339 in UTC, absent ones null.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypedDict

from capture import records
from capture.exchange import exchanges
from capture.frames import session_name
from capture.moment import rfc3339

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from capture.exchange import Exchange, Record
    from capture.index_query import Event, Session


class Counts(TypedDict):
    """How many of each a session has."""

    operations: int
    errors: int
    denied: int
    hidden: int
    gaps: int
    alarms: int


class SessionObject(TypedDict):
    """A session."""

    id: str
    service_account: str | None
    assurance: str
    attributed_by: str | None
    unknown_reason: str | None
    owner: dict[str, Any] | None
    client: str
    target: str
    protocol: str | None
    secrets: Literal["unparsed"] | None
    route: str | None
    worker: int | None
    operations: int
    bytes_up: int
    bytes_down: int
    started: str
    ended: str | None
    state: Literal["running", "closed", "cut"]
    close_reason: str | None
    closed_by: str | None
    counts: Counts


class EventObject(TypedDict):
    """A record that is not about one session's content; `session` is null for a process' own."""

    time: str
    kind: str
    session: str | None
    fields: dict[str, Any]


@dataclass(slots=True)
class ResultObject(records.Result):
    """How an operation ended: the Result record without its operation's number."""

    ABSENT: ClassVar = frozenset({"op"})


@dataclass(slots=True, kw_only=True)
class OperationObject(records.Operation):
    """What was asked: the Operation record, when, and how it ended; `result` is null while that is
    not known.
    """

    time: str
    result: ResultObject | None


#: Records that are not operations: the name of their list in a session's JSON -> the record.
SECTIONS = {
    "facts": "Fact", "gaps": "Gap", "alarms": "Alarm", "hidden": "Hidden", "withheld": "Withheld",
    "decisions": "Decision",
}  # fmt: skip


def session_object(session: Session) -> SessionObject:
    """Return the object of a session."""
    return {
        "id": session.name,
        "service_account": session.account,
        "assurance": session.assurance or "none",
        "attributed_by": session.how,
        "unknown_reason": session.unknown,
        "owner": session.owner,
        "client": session.client,
        "target": session.target,
        "protocol": session.protocol,
        "secrets": "unparsed" if session.secrets == "unparsed" else None,
        "route": session.route,
        "worker": session.worker,
        "operations": session.operations,
        "bytes_up": session.bytes_up,
        "bytes_down": session.bytes_down,
        "started": rfc3339(session.started),
        "ended": None if session.ended is None else rfc3339(session.ended),
        "state": session.state.value,
        "close_reason": session.reason,
        "closed_by": session.ended_by,
        "counts": {
            "operations": session.operations,
            "errors": session.errors,
            "denied": session.denied,
            "hidden": session.hidden,
            "gaps": session.gaps,
            "alarms": session.alarms,
        },
    }


def operation_object(exchange: Exchange) -> dict[str, Any]:
    """Return the object of an operation; see `OperationObject`."""
    answer = None if exchange.result is None else _told(exchange.result, "op")
    told = _told(exchange.operation)
    return {**told, "result": answer, "time": rfc3339(exchange.time_ns)}


def operation_objects(found: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """Yield the object of every operation of a session, from all its records."""
    return map(operation_object, exchanges(found))


def record_objects(found: Iterable[Record], kind: str) -> Iterator[dict[str, Any]]:
    """Yield a session's records of one type: their fields, and their time."""
    for time_ns, fields in found:
        if fields["record"] == kind:
            yield {**_told(fields), "time": rfc3339(time_ns)}


def event_object(event: Event) -> EventObject:
    """Return the object of a record that was found by its kind."""
    return {
        "time": rfc3339(event.time_ns),
        "kind": records.TYPES[event.kind].__name__.lower(),
        "session": session_name(event.session) if event.session else None,
        "fields": event.fields,
    }


def _told(fields: dict[str, Any], *without: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in ("record", *without)}
