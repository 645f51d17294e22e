"""A head, or trailers, of which the end has not come yet.

`appliance.wire.httpinlet` makes one when a head comes in pieces. What is not whole may hold
secrets, which must be hidden as they come, and may be broken already. Each look costs about what
came since the last one, however long the line is that comes: what a client sends byte by byte must
not cost the gate more than it costs the client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from appliance.wire.httphead import MOST_NAME_BYTES, FieldReader, Malformed, check_lines
from appliance.wire.httpsecrets import clip

if TYPE_CHECKING:
    import re

    from appliance.wire.httpsecrets import Span

MOST_HEAD_BYTES = 64 * 1024
#: A parameter's name, with the mark before it, begins within this of its end.
_WINDOW_BYTES = 512


class Unfinished:
    """What was seen of it. Positions count from its first byte, `offset` in the half-stream."""

    __slots__ = (
        "_fields",
        "_first",
        "_goes_on",
        "_line",
        "_line_bytes",
        "_secret",
        "_seen",
        "offset",
    )

    def __init__(self, fields: FieldReader, offset: int, line_bytes: int) -> None:
        """`line_bytes` is the most that a first line may have which is no field; 0 without one."""
        self.offset = offset
        self._fields = fields
        self._line_bytes = line_bytes
        self._first = line_bytes > 0  #: the line that comes is the first one
        self._line = 0  #: where the line that comes begins
        self._seen = 0
        self._secret = ""  #: the secret header whose value comes
        self._goes_on: re.Pattern[bytes] | None = None  #: matches the rest of a secret parameter

    def look(self, buffer: bytes, start: int) -> tuple[list[Span], bytes]:
        """Return (secrets in the buffer, the first line if it became whole in this event).

        It begins at `start`. Spans may begin before what is new. Raises Malformed.
        """
        end = len(buffer) - buffer.endswith(b"\r")
        if end - start > MOST_HEAD_BYTES:
            raise Malformed("a head that is too long", 431)
        check_lines(buffer[start + self._seen : end])
        at = start + self._line
        first = b""
        stop = buffer.rfind(b"\r\n", start + self._seen, end)
        if stop >= 0:
            spans = self._fields.secrets.in_lines(buffer[at:stop])
            first = self._check(buffer[at:stop])
            spans = [(at + begin, at + finish, kind) for begin, finish, kind in spans]
            self._line = self._seen = stop + 2 - start
            self._secret, self._goes_on = "", None
            at = stop + 2
        else:
            spans = []
        spans += self._last_line(buffer[at:end], at, start + self._seen - at)
        self._seen = end - start
        return spans, first

    def _check(self, lines: bytes) -> bytes:
        """Check whole lines; return the first one, if it is no field line."""
        checked = lines.split(b"\r\n")
        first = b""
        if self._first:
            self._first = False
            first = checked.pop(0)
        for line in checked:
            self._fields.check(line)
        return first

    def _last_line(self, line: bytes, at: int, seen: int) -> list[Span]:
        """Return the spans of a line that is not whole, at or after position `seen` of it."""
        secrets = self._fields.secrets
        if self._first and len(line) > self._line_bytes:
            raise Malformed("a first line that is too long", 414)
        if not self._secret:
            if not self._first:
                self._fields.check(line)
            self._secret = secrets.header(line[:MOST_NAME_BYTES])
        found = secrets.in_line(line) if self._secret else self._parameters(line, seen)
        return [(at + begin, at + finish, kind) for begin, finish, kind in found]

    def _parameters(self, line: bytes, seen: int) -> list[Span]:
        """Return the spans of secret parameters; one may have begun long ago."""
        found = []
        if self._goes_on is not None:
            value = self._goes_on.match(line, seen)
            if value is not None:
                found.append((seen, value.end(), "parameter"))
                seen = value.end()
                if seen == len(line):
                    return found
        window = max(0, seen - _WINDOW_BYTES)
        spans, self._goes_on = self._fields.secrets.scan(line[window:])
        for begin, finish, kind in clip(spans, seen - window):
            found.append((window + begin, window + finish, kind))
        return found
