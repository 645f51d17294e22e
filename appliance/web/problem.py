"""Errors of the review API as RFC 9457 problem details.

`Problem` is raised anywhere on the way of a request; `appliance.web.server` answers with it. Each
answer has a reference that stands in the log too. Nothing of the inside (paths, traces) is told.
"""

from __future__ import annotations

import http
import json
import secrets
from typing import TYPE_CHECKING, Any, TypedDict

from aiohttp import web

from capture import plainjson

if TYPE_CHECKING:
    from collections.abc import Mapping

TYPE = "urn:narrows:problem:"
MEDIA = "application/problem+json"

#: Word of the type -> (status, title). The words are the API's promise (docs/api.md).
KINDS = {
    "bad-request": (400, "The request cannot be understood"),
    "unauthenticated": (401, "A token is needed"),
    "forbidden": (403, "The token's role may not do this"),
    "not-found": (404, "There is no such thing"),
    "method-not-allowed": (405, "This path does not know the method"),
    "timeout": (408, "The request did not come in time"),
    "not-running": (409, "The session does not run"),
    "too-large": (413, "The request is too large"),
    "range": (416, "There are no such bytes"),
    "too-many": (429, "Too many requests"),
    "internal": (500, "This should not have happened"),
    "not-recorded": (503, "The read cannot be recorded, so nothing is shown"),
    "unavailable": (503, "This cannot be answered now"),
}


class _Blamed(TypedDict, total=False):
    parameter: str  #: the one to blame


class ProblemObject(_Blamed):
    """An error (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    reference: str


class Problem(Exception):
    """The request ends with this error."""

    def __init__(
        self, kind: str, detail: str, *, parameter: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(detail)
        self.kind, self.parameter = kind, parameter
        self.status, self.title = KINDS[kind]
        self.headers = dict(headers or {})
        self.reference = secrets.token_hex(8)

    def response(self) -> web.Response:
        """Return the answer."""
        told: dict[str, Any] = {
            "type": TYPE + self.kind, "title": self.title, "status": self.status,
            "detail": str(self), "reference": self.reference,
        }  # fmt: skip
        if self.parameter:
            told["parameter"] = self.parameter
        return web.Response(
            status=self.status, body=plainjson.dumps(told).encode(), content_type=MEDIA,
            headers=self.headers,
        )  # fmt: skip


def of_http(wrong: web.HTTPException) -> Problem:
    """Return the problem that aiohttp's own error is."""
    kind = next((word for word, (status, _) in KINDS.items() if status == wrong.status), "")
    if not kind:
        kind = "bad-request" if wrong.status < 500 else "internal"
    kept = {name: wrong.headers[name] for name in ("Allow",) if name in wrong.headers}
    return Problem(kind, http.HTTPStatus(wrong.status).description or KINDS[kind][1], headers=kept)


def from_body(body: bytes) -> Any:
    """Return a request's JSON; Problem when it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as wrong:
        raise Problem("bad-request", "the body is no JSON") from wrong
