"""The first line of an HTTP/1.1 message, and what a record says of a request.

`appliance.wire.httprequests` and `appliance.wire.httpresponses` give whole lines without their
CRLF. What a line means is kept for the next one that is the same, unless it holds a secret.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from appliance.wire.httphead import Malformed
from appliance.wire.httpsecrets import may_hold_parameters, redact

if TYPE_CHECKING:
    from appliance.wire.httpsecrets import Secrets, Span

MOST_LINE_BYTES = 32 * 1024
MOST_FINGERPRINT_CHARS = 512
_MOST_LINES = 1_024
_MOST_KEPT_BYTES = 256

_REQUEST = re.compile(
    rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]{1,64}) ([^\x00-\x20\x7f]+) HTTP/([0-9])\.([0-9])"
)
_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: ([\t\x20-\x7e\x80-\xff]*))?")
_ABSOLUTE = re.compile(r"https?://(?:[^/?#]*@)?([^/?#@]*)([^?#]*)", re.IGNORECASE)
_AUTHORITY = re.compile(r"(?:[^/?#]*@)?([^/?#@]+:[0-9]+)")
_UUID = r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
#: Segments of a path that name one thing of many, other than numbers: UUIDs, digests, random names.
_VARIABLE = re.compile(rf"({_UUID})|([0-9a-fA-F]{{8,}})|[\w\-]{{20,}}")
_DIGIT = re.compile(r"[0-9]")


class RequestLine(NamedTuple):
    """A request line, read."""

    verb: str  #: the method
    minor: int  #: HTTP/1.minor
    text: str  #: the line as a person reads it, without secrets
    path: str  #: without query, without secrets; "*" or "" where there is none
    template: str  #: the path with what varies replaced
    host: str  #: from an absolute or authority form, lower case; "" otherwise
    spans: list[Span]


class StatusLine(NamedTuple):
    """A status line, read."""

    status: int
    minor: int
    tag: str  #: "200 OK"


_Line = TypeVar("_Line", RequestLine, StatusLine)


class LineReader:
    """Reads request lines and status lines. One per process and configuration."""

    __slots__ = ("_requests", "_secrets", "_statuses")

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets
        self._requests: dict[bytes, RequestLine] = {}
        self._statuses: dict[bytes, StatusLine] = {}

    def request(self, line: bytes) -> RequestLine:
        """Return what a request line says. Raises Malformed."""
        found = self._requests.get(line)
        if found is None:
            found = self._read_request(line)
            if not found.spans:
                _keep(self._requests, line, found)
        return found

    def _read_request(self, line: bytes) -> RequestLine:
        if len(line) > MOST_LINE_BYTES:
            raise Malformed("a request line that is too long", 414)
        match = _REQUEST.fullmatch(line)
        if match is None:
            raise Malformed("no request line")
        method, target, major, minor = match.groups()
        if major != b"1" or minor not in (b"0", b"1"):
            raise Malformed("a version that is neither HTTP/1.0 nor HTTP/1.1", 505)
        spans = self._secrets.in_text(line) if may_hold_parameters(line) else []
        at = match.start(2)
        if method == b"CONNECT" and b"@" in target:
            spans = [(at, at + target.rindex(b"@"), "userinfo")]
        if spans:
            target = redact(target, [(start - at, end - at, kind) for start, end, kind in spans])
        shown = target.decode("utf-8", "backslashreplace")
        verb = method.decode()
        host, path = _where(verb, shown)
        text = f"{verb} {shown} HTTP/1.{minor.decode()}"
        return RequestLine(verb, int(minor), text, path, template(path), host, spans)

    def status(self, line: bytes) -> StatusLine:
        """Return what a status line says. Raises Malformed."""
        found = self._statuses.get(line)
        if found is None:
            match = _STATUS.fullmatch(line)
            if match is None:
                raise Malformed("no status line")
            minor, status, reason = match.groups()
            tag = (status + b" " + (reason or b"")).decode("utf-8", "backslashreplace")
            found = StatusLine(int(status), int(minor), tag.strip()[:256])
            _keep(self._statuses, line, found)
        return found


def template(path: str) -> str:
    """Return `path` with its variable segments replaced: "/users/{n}/files/{uuid}"."""
    if _DIGIT.search(path) is None:
        return path[:MOST_FINGERPRINT_CHARS]
    parts = path.split("/")
    for number, part in enumerate(parts):
        if part.isdecimal():
            parts[number] = "{n}"
        elif len(part) >= 8 and _DIGIT.search(part) is not None:
            found = _VARIABLE.fullmatch(part)
            if found is not None:
                parts[number] = "{uuid}" if found[1] else "{hex}" if found[2] else "{id}"
    return "/".join(parts)[:MOST_FINGERPRINT_CHARS]


def _where(verb: str, target: str) -> tuple[str, str]:
    """Return (host, path) of a target. Raises Malformed when it has no form that is known."""
    if verb == "CONNECT":
        authority = _AUTHORITY.fullmatch(target)
        if authority is None:
            raise Malformed("CONNECT to what is no host and port")
        return authority[1].lower(), ""
    if target[0] == "/":
        return "", target.partition("?")[0].partition("#")[0]
    if target == "*" and verb == "OPTIONS":
        return "", target
    absolute = _ABSOLUTE.match(target)
    if absolute is None or not absolute[1]:
        raise Malformed("a target that is no path and no http URL")
    return absolute[1].lower(), absolute[2] or "/"


def _keep(lines: dict[bytes, _Line], line: bytes, found: _Line) -> None:
    """Remember a short line; when there are many, forget them first."""
    if len(line) <= _MOST_KEPT_BYTES:
        if len(lines) >= _MOST_LINES:
            lines.clear()
        lines[line] = found
