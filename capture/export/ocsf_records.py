"""The records that are neither an operation nor a session as OCSF events, one line each.

    Gap                     Application Error (6008), with what was not recorded and when
    Flow                    Network Activity (4001): Traffic that is not TCP
    Refused                 Network Activity: Refuse, a session that never began
    Alarm                   Detection Finding (2004)
    Decision, Access        API Activity (6003): who did, or read, what
    Start, Stop, Recovered  Application Lifecycle (6002)

Every one answers the six questions of PCI DSS 10.2.2 (see `capture.export.ocsf`); where no person
or program from outside acted, the actor is Narrows itself, and where from and which object are its
device. Heartbeats are not exported: they are counts, and `narrows evidence log` shows them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from capture.export.ocsf import SCHEMA, line, refused_line
from capture.frames import session_name
from capture.moment import rfc3339
from capture.records import (
    KINDS,
    TYPES,
    Access,
    Alarm,
    Decision,
    Flow,
    Gap,
    Recovered,
    Refused,
    Start,
    Stop,
)
from capture.segment import VERSION

if TYPE_CHECKING:
    from capture.index_query import Event

KNOWN = tuple(
    KINDS[kind]
    for kind in (Gap, Flow, Refused, Alarm, Decision, Access, Start, Stop, Recovered)
)  # fmt: skip
_CLASSES = {
    2004: ("Detection Finding", "Findings"), 4001: ("Network Activity", "Network Activity"),
    6002: ("Application Lifecycle", "Application Activity"),
    6003: ("API Activity", "Application Activity"),
    6008: ("Application Error", "Application Activity"),
}  # fmt: skip
_SEVERITIES = {1: "Informational", 3: "Medium", 4: "High"}
_STATUSES = {0: "Unknown", 1: "Success", 2: "Failure"}
#: Action of a Decision -> activity of API Activity; any other is Other.
_DECISIONS = {
    "token-create": (1, "Create"), "token-revoke": (4, "Delete"), "redirect-apply": (3, "Update"),
    "redirect-undo": (3, "Update"),
}  # fmt: skip
#: Actions of an Access that do more than read.
_DOING = frozenset({"kill", "reindex"})
_PEER = re.compile(r" peer:(\S+)")
_PROTOCOLS = {"icmp": 1, "udp": 17, "ipv6-icmp": 58}
_OURSELVES = {"name": "Narrows", "type_id": 0, "type": "Unknown"}


def record_line(event: Event) -> bytes:
    """Return the line of a record of one of the `KNOWN` kinds."""
    kind = TYPES[event.kind]
    if kind is Refused:
        return refused_line(event)
    made = _MAKERS[kind](event)
    made["unmapped"]["narrows"] |= {"record": kind.__name__, **event.fields}
    return line(made)


def _gap(event: Event) -> dict[str, Any]:
    told = event.fields
    made = _event(event, 6008, (1, "General Error"), severity=4, status=2)
    made["message"] = f"{told['scope']}: {told['reason']}" + (
        f": {told['detail']}" if told["detail"] else ""
    )
    made["status_detail"] = told["reason"]
    return made | _span(told)


def _flow(event: Event) -> dict[str, Any]:
    told = event.fields
    made = _event(event, 4001, (6, "Traffic"))
    del made["device"]
    made |= {
        "src_endpoint": {"ip": told["client"]},
        "dst_endpoint": {"name": "unknown", "port": told["port"]},
        "connection_info": {
            "direction_id": 0, "direction": "Unknown", "protocol_name": told["protocol"],
            "protocol_num": _PROTOCOLS.get(told["protocol"]) or _number(told["protocol"]),
        },
        "traffic": {"bytes": told["bytes"], "packets": told["packets"]},
    }  # fmt: skip
    made["actor"]["user"] = {"name": "unknown", "type_id": 0, "type": "Unknown"}
    return made | _span(told)


def _alarm(event: Event) -> dict[str, Any]:
    kind = event.fields["kind"]
    made = _event(event, 2004, (1, "Create"), severity=4, status=0)
    made["finding_info"] = {"uid": made["metadata"]["uid"], "title": f"{kind} in a session"}
    made["message"] = kind
    if event.session:
        made["resources"] = _resources([session_name(event.session)])
    return made


def _decision(event: Event) -> dict[str, Any]:
    told = event.fields
    activity = _DECISIONS.get(told["action"], (99, told["action"] or "unknown"))
    status = 1 if told["outcome"] == "done" else 2
    made = _done(event, activity, status)
    made["message"] = told["reason"]
    if event.session:
        made["resources"] = _resources([session_name(event.session)])
    return made


def _access(event: Event) -> dict[str, Any]:
    told = event.fields
    activity = (99, told["action"]) if told["action"] in _DOING else (2, "Read")
    made = _done(event, activity, 1 if told["outcome"] == "allowed" else 2)
    made["message"] = told["query"]
    if told["objects"]:
        made["resources"] = _resources(told["objects"])
    return made


def _done(event: Event, activity: tuple[int, str], status: int) -> dict[str, Any]:
    """Return an API Activity of who is named in the record."""
    told = event.fields
    made = _event(event, 6003, activity, status=status)
    peer = _PEER.search(told["actor"])
    made["actor"]["user"] = {"name": told["actor"] or "unknown", "type_id": 0, "type": "Unknown"}
    made["src_endpoint"] = {"ip": peer[1]} if peer else {"name": "Narrows"}
    made["dst_endpoint"] = {"name": "Narrows"}
    made["api"] = {"operation": told["action"] or "unknown", "service": {"name": "Narrows"}}
    made["status_detail"] = told["outcome"]
    return made


def _lifecycle(event: Event) -> dict[str, Any]:
    kind, told = TYPES[event.kind], event.fields
    activity = {Start: (3, "Start"), Stop: (4, "Stop")}.get(kind, (99, "Recovered"))
    made = _event(event, 6002, activity, severity=3 if kind is Recovered else 1)
    role = told.get("role")
    made["app"] = {"name": f"narrows {role}" if role else "narrows"}
    if kind is Stop:
        made["status_detail"] = told["reason"]
    return made


_MAKERS = {
    Gap: _gap, Flow: _flow, Alarm: _alarm, Decision: _decision, Access: _access,
    Start: _lifecycle, Stop: _lifecycle, Recovered: _lifecycle,
}  # fmt: skip


def _event(
    event: Event, class_uid: int, activity: tuple[int, str], *, severity: int = 1, status: int = 1
) -> dict[str, Any]:
    """Return what all classes have."""
    name, category = _CLASSES[class_uid]
    metadata = {
        "version": SCHEMA, "uid": f"{TYPES[event.kind].__name__.lower()}-{event.time_ns}",
        "product": {"name": "Narrows", "vendor_name": "Narrows", "version": VERSION},
        "profiles": ["datetime", "host"],
    }  # fmt: skip
    session = session_name(event.session) if event.session else None
    if session is not None:
        metadata["correlation_uid"] = session
    return {
        "activity_id": activity[0], "activity_name": activity[1],
        "category_uid": class_uid // 1000, "category_name": category,
        "class_uid": class_uid, "class_name": name,
        "type_uid": class_uid * 100 + activity[0], "type_name": f"{name}: {activity[1]}",
        "time": event.time_ns // 1_000_000, "time_dt": rfc3339(event.time_ns),
        "severity_id": severity, "severity": _SEVERITIES[severity],
        "status_id": status, "status": _STATUSES[status],
        "actor": {"user": {"name": "Narrows", "type_id": 3, "type": "System"}},
        "device": dict(_OURSELVES),
        "metadata": metadata,
        "unmapped": {"narrows": {"session": session}},
    }  # fmt: skip


def _resources(names: list[str]) -> list[dict[str, Any]]:
    return [{"uid": name, "type": "session"} for name in names]


def _span(told: dict[str, Any]) -> dict[str, Any]:
    """Return when it began and ended, as far as that is known."""
    names = (("start_time", "since"), ("end_time", "until"))
    return {name: told[key] // 1_000_000 for name, key in names if told[key]}


def _number(protocol: str) -> int:
    return int(protocol) if protocol.isdecimal() else 0
