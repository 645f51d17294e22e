"""The session object: what `--json` says of a session, everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from capture.moment import rfc3339

if TYPE_CHECKING:
    from capture.index_query import Session


def session_object(session: Session) -> dict[str, Any]:
    """Return the object of a session; times are RFC 3339 in UTC, absent ones null."""
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
