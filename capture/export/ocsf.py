"""The ndjson export: OCSF 1.8.0 events, one JSON object a line (https://schema.ocsf.io/1.8.0).

Each operation is a Datastore Activity (6005) with the statement as `query_info.query_string`; each
session is a Network Activity (4001), after its operations. Every event answers the six questions
of PCI DSS 10.2.2:

    who           actor.user.name, "unknown" with the reason in unmapped.narrows.unknown_reason
    what          type_uid, activity_name
    when          time (ms) and time_dt (ns)
    outcome       status_id, status
    where from    src_endpoint
    which object  dst_endpoint, and database and table

What OCSF has no place for is in `unmapped.narrows`, which also names session and operation. Lines
are ASCII: whatever a peer sent, they are safe to show.
"""

from __future__ import annotations

import shlex
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from capture import plainjson
from capture.exchange import exchanges
from capture.frames import session_number
from capture.index_query import Session, State, endpoint
from capture.moment import rfc3339
from capture.segment import VERSION

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from capture.exchange import Exchange, Record
    from capture.index_query import Event
    from capture.reader import Reader

SCHEMA = "1.8.0"
DATASTORE, NETWORK = 6005, 4001
#: Records of one kind (gaps, alarms...) that a session's event names; their number is always told.
MOST_NAMED = 100

#: First word of a verb -> activity of Datastore Activity.
_ACTIVITIES = {
    "SELECT": (4, "Query"), "SHOW": (4, "Query"), "EXPLAIN": (4, "Query"), "FETCH": (4, "Query"),
    "INSERT": (5, "Write"), "COPY": (5, "Write"), "MERGE": (5, "Write"),
    "UPDATE": (2, "Update"), "ALTER": (2, "Update"), "GRANT": (2, "Update"),
    "REVOKE": (2, "Update"), "DELETE": (7, "Delete"), "TRUNCATE": (7, "Delete"),
    "DROP": (7, "Delete"), "CREATE": (6, "Create"), "UNKNOWN": (0, "Unknown"),
}  # fmt: skip
#: Reason of a SessionClose -> activity of Network Activity; any other is a Close.
_CLOSES = {
    "reset": (3, "Reset"), "refused": (5, "Refuse"), "timeout": (4, "Fail"),
    "unreachable": (4, "Fail"), "descriptors": (4, "Fail"),
}  # fmt: skip
_OUTCOMES = {
    "ok": (1, "Success", ""),
    "error": (2, "Failure", ""),
    "skipped": (2, "Failure", "skipped after an error"),
    "cut": (0, "Unknown", "the connection ended before the result"),
}
_TOLD = {
    "Gap": "gaps", "Alarm": "alarms", "Hidden": "hidden", "Withheld": "withheld",
    "Decision": "decisions", "Fact": "facts", "Tls": "tls",
}  # fmt: skip
#: Facts that every session has and nobody asks for.
_UNTOLD = frozenset({"parameter", "backend-key"})


def export(reader: Reader, session: Session) -> Iterator[bytes]:
    """Yield the lines of one session, each with its newline."""
    told = _Told()
    for exchange in exchanges(told.watching(reader.records(session.number))):
        yield line(operation_event(session, exchange, told.startup))
    yield line(session_event(session, told))


def refused_line(refused: Event) -> bytes:
    """Return the line of a connection that was not let through: a session that never began."""
    told = refused.fields
    never = Session(
        number=session_number(told["reference"]), started=refused.time_ns, ended=refused.time_ns,
        state=State.CLOSED, client=endpoint(told["client"], told["client_port"]),
        target=endpoint(told["target"], told["target_port"]), route=None, worker=None,
        account=told.get("account"), assurance=told.get("assurance", "none"),
        how=told.get("how", "none"), unknown=told.get("unknown", "refused"),
        owner=told.get("owner"), protocol=None,
        bytes_up=0, bytes_down=0, operations=0, denied=0, errors=0, hidden=0, gaps=0, alarms=0,
        reason="refused", ended_by="gate",
    )  # fmt: skip
    return line(session_event(never, _Told()) | {"status_detail": told["reason"]})


def line(event: dict[str, Any]) -> bytes:
    """Return an event as one line of ASCII JSON."""
    return plainjson.dumps(event).encode() + b"\n"


class _Told:
    """What a session's records said besides operations; bounded."""

    def __init__(self) -> None:
        self.startup: dict[str, str] = {}  #: what the client said of itself
        self.lists: dict[str, list[dict[str, Any]]] = {name: [] for name in _TOLD.values()}

    def watching(self, records: Iterable[Record]) -> Iterator[Record]:
        """Pass records on, keeping what the session's event names."""
        for time_ns, fields in records:
            if fields["record"] in _TOLD:
                self._keep(time_ns, fields)
            yield time_ns, fields

    def _keep(self, time_ns: int, fields: dict[str, Any]) -> None:
        if fields["record"] == "Fact":
            if fields["kind"] == "startup":
                parameters = fields["fields"].get("parameters")
                named = parameters if isinstance(parameters, dict) else {}
                self.startup = {k: v for k, v in named.items() if isinstance(v, str)}
            if fields["kind"] in _UNTOLD:
                return
        kept = self.lists[_TOLD[fields["record"]]]
        if len(kept) < MOST_NAMED:
            named = {name: value for name, value in fields.items() if name != "record"}
            kept.append({"time": rfc3339(time_ns), **named})


def operation_event(
    session: Session, exchange: Exchange, startup: dict[str, str]
) -> dict[str, Any]:
    """Return the event of one operation; `startup` is what the client said of itself."""
    operation, result = exchange.operation, exchange.result or {}
    verb = operation["verb"] or "unknown"
    activity = _ACTIVITIES.get(verb.split(" ")[0].upper(), (99, verb))
    denied = operation["verdict"] == "denied"
    status = _OUTCOMES.get(result.get("status", ""), (0, "Unknown", "no result is recorded"))
    uid = f"{session.name}/{operation['op']}"
    event = _base(session, DATASTORE, activity, exchange.time_ns, uid)
    event |= {
        "severity_id": 3 if denied else 2 if status[0] == 2 else 1,
        "severity": "Medium" if denied else "Low" if status[0] == 2 else "Informational",
        "status_id": 2 if denied else status[0],
        "status": "Failure" if denied else status[1],
        "action_id": 2 if denied else 1,
        "action": "Denied" if denied else "Allowed",
        "disposition_id": 2 if denied else 1,
        "disposition": "Blocked" if denied else "Allowed",
        "database": _database(session, startup),
        "query_info": {
            "uid": uid, "query_string": operation["text"], "bytes": operation["length"],
        },
    }  # fmt: skip
    event["metadata"]["sequence"] = operation["op"]
    if result:
        event["duration"] = result["duration_ns"] // 1_000_000
    event |= _present(
        status_code=result.get("sqlstate"), status_detail=result.get("message") or status[2]
    )
    if operation["tables"]:
        event["table"] = {"name": operation["tables"][0]}
    event["unmapped"]["narrows"] |= _details(operation, result, startup)
    return event


def session_event(session: Session, told: _Told) -> dict[str, Any]:
    """Return the event of a session: how it ended, or that it is open."""
    if session.state is State.RUNNING:
        activity, status = (1, "Open"), (0, "Unknown", "the session is running")
    elif session.state is State.CUT:
        activity, status = (99, "Cut"), (2, "Failure", "the gate's process ended")
    else:
        activity = _CLOSES.get(session.reason or "", (2, "Close"))
        outcome = (1, "Success") if session.reason == "fin" else (2, "Failure")
        status = (*outcome, f"{session.reason} by {session.ended_by}")
    time_ns = session.started if session.ended is None else session.ended
    event = _base(session, NETWORK, activity, time_ns, session.name)
    event |= {
        "severity_id": 3 if session.alarms or session.gaps else 1,
        "severity": "Medium" if session.alarms or session.gaps else "Informational",
        "status_id": status[0], "status": status[1], "status_detail": status[2],
        "app_name": session.protocol or "unknown",
        "start_time": session.started // 1_000_000,
        "connection_info": {
            "uid": session.name, "direction_id": 0, "direction": "Unknown",
            "protocol_name": "tcp", "protocol_num": 6,
        },
        "traffic": {
            "bytes_out": session.bytes_up, "bytes_in": session.bytes_down,
            "bytes": session.bytes_up + session.bytes_down,
        },
    }  # fmt: skip
    if session.ended is not None:
        event["end_time"] = session.ended // 1_000_000
        event["duration"] = max(session.ended - session.started, 0) // 1_000_000
    event["unmapped"]["narrows"] |= {
        "state": session.state.value, "route": session.route, "owner": session.owner,
        "secrets": session.secrets,
        "operations": session.operations, "errors": session.errors, "denied": session.denied,
        "counts": {"gaps": session.gaps, "alarms": session.alarms, "hidden": session.hidden},
        **told.lists,
    }  # fmt: skip
    return event


def _base(
    session: Session, class_uid: int, activity: tuple[int, str], time_ns: int, uid: str
) -> dict[str, Any]:
    """Return what both classes have: who, what, when, where from and where to."""
    store = class_uid == DATASTORE
    name = "Datastore Activity" if store else "Network Activity"
    return {
        "activity_id": activity[0], "activity_name": activity[1],
        "category_uid": class_uid // 1000,
        "category_name": "Application Activity" if store else "Network Activity",
        "class_uid": class_uid, "class_name": name,
        "type_uid": class_uid * 100 + activity[0], "type_name": f"{name}: {activity[1]}",
        "time": time_ns // 1_000_000, "time_dt": rfc3339(time_ns),
        "actor": _actor(session),
        "src_endpoint": _endpoint(session.client),
        "dst_endpoint": _endpoint(session.target),
        "metadata": {
            "version": SCHEMA, "uid": uid, "correlation_uid": session.name,
            "product": {"name": "Narrows", "vendor_name": "Narrows", "version": VERSION},
            "profiles": ["datetime", "security_control" if store else "host"],
        },
        "unmapped": {
            "narrows": {
                "session": session.name, "assurance": session.assurance,
                "attributed_by": session.how, "unknown_reason": session.unknown,
            }
        },
    }  # fmt: skip


def _actor(session: Session) -> dict[str, Any]:
    known = session.account is not None
    actor: dict[str, Any] = {
        "user": {
            "name": session.account if known else "unknown",
            "type_id": 4 if known else 0, "type": "Service" if known else "Unknown",
        },
        "session": {"uid": session.name},
    }  # fmt: skip
    owner = session.owner or {}
    if type(owner.get("pid")) is int:  # True is no process
        actor["process"] = _process(owner)
    return actor


def _process(owner: dict[str, Any]) -> dict[str, Any]:
    process: dict[str, Any] = {"pid": owner["pid"]}
    path = owner.get("exe")
    if isinstance(path, str) and path:
        name = PurePath(path).name or path
        process |= {"name": name, "path": path}
        process["file"] = {"name": name, "path": path, "type_id": 1, "type": "Regular File"}
        digest = owner.get("exe_sha256")
        if isinstance(digest, str) and digest:
            process["file"]["hashes"] = [
                {"algorithm_id": 3, "algorithm": "SHA-256", "value": digest}
            ]
    argv = owner.get("argv")
    if isinstance(argv, list) and argv:
        process["cmd_line"] = shlex.join(map(str, argv))
    if type(owner.get("uid")) is int:
        process["user"] = {"uid": str(owner["uid"])}
    return process


def _endpoint(endpoint: str) -> dict[str, Any]:
    host, colon, port = endpoint.rpartition(":")
    if not colon:
        return {"name": "unknown"}
    return {"ip": host.strip("[]"), "port": int(port)}


def _database(session: Session, startup: dict[str, str]) -> dict[str, Any]:
    """Return the object: the database that the client named, on the server that it meant."""
    name = startup.get("database") or startup.get("user")
    relational = session.protocol == "postgresql"
    uid = f"{session.protocol or 'unknown'}://{session.target or 'unknown'}"
    return {
        "uid": f"{uid}/{name}" if name else uid,
        "type_id": 1 if relational else 0,
        "type": "Relational" if relational else "Unknown",
        **_present(name=name),
    }


def _details(
    operation: dict[str, Any], result: dict[str, Any], startup: dict[str, str]
) -> dict[str, Any]:
    names = ("op", "verb", "kind", "name", "binds", "tables", "fingerprint", "truncated", "offset")
    details = {name: operation[name] for name in names}
    details |= _present(database_user=startup.get("user"))
    if result:
        details["result"] = {
            name: result[name] for name in ("status", "tag", "rows", "bytes", "tx")
        }
    return details


def _present(**values: str | None) -> dict[str, str]:
    return {name: value for name, value in values.items() if value}
