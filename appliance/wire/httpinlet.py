"""What one side of an HTTP/1.1 session sent and what of it was not passed on yet.

`appliance.wire.httprequests` and `appliance.wire.httpresponses` each have one. A buffer begins with
what was kept of earlier events; only bytes of the event at hand can still be hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from appliance.sansio import CLIENT, UPSTREAM, Audit, Effect, Forward, Hide, Relay, Side
from appliance.wire.httpsecrets import clip
from appliance.wire.httpunfinished import Unfinished
from capture.records import Withheld

if TYPE_CHECKING:
    from collections.abc import Sequence

    from appliance.wire.httphead import FieldReader
    from appliance.wire.httpsecrets import Span

#: With less to come of a body, it is received with what follows it: a call costs more than a copy.
LEAST_RELAY_BYTES = 64 * 1024
LEAST_CHUNK_RELAY_BYTES = 16 * 1024
#: The end of a body is not relayed, so that the layer sees when it came.
TAIL_BYTES = 4 * 1024


class Inlet:
    """Buffers one side."""

    __slots__ = ("_fields", "_fresh", "_to", "_unfinished", "at", "end", "kept", "side")

    def __init__(self, side: Side, fields: FieldReader) -> None:
        self.side = side
        self._to = UPSTREAM if side is CLIENT else CLIENT
        self._fields = fields
        self.kept = b""  #: received and not forwarded
        self.at = 0  #: where `kept` begins in the half-stream
        self.end = 0  #: where the bytes that were given so far end
        self._fresh = 0  #: position in the buffer of the first byte that can be hidden
        self._unfinished: Unfinished | None = None

    def take(self, data: bytes | memoryview, offset: int) -> bytes:
        """Return the buffer: what was kept, and `data`, which stands at `offset`."""
        new = data if type(data) is bytes else bytes(data)
        self.end = offset + len(new)
        if self.kept:
            self._fresh = len(self.kept)
            return self.kept + new
        self._fresh = 0
        self.at = offset
        return new

    def again(self) -> bytes:
        """Return the buffer without new bytes: nothing of it can be hidden any more."""
        self._fresh = len(self.kept)
        return self.kept

    def hide(self, spans: Sequence[Span], start: int, out: list[Effect]) -> None:
        """Hide `spans`, which count from position `start` of the buffer, as far as they are new."""
        base = self.at + start
        for begin, end, kind in clip(spans, self._fresh - start):
            out.append(Hide(self.side, base + begin, end - begin, kind))

    def hide_junk(self, buffer: bytes, start: int, out: list[Effect]) -> list[Span]:
        """Hide what looks like a secret from `start` on; return all spans of it, new or not."""
        spans = self._fields.secrets.in_junk(buffer[start:])
        self.hide(spans, start, out)
        return spans

    def unfinished(self, buffer: bytes, start: int, out: list[Effect], *, line_bytes: int) -> bytes:
        """Check and hide what came of a head, or of trailers, from `start` on and is not whole.

        Returns the first line when it became whole in this event; its check is the caller's, as it
        is no field line. A trailer has none: `line_bytes` is then 0, else the most of it. Raises
        Malformed.
        """
        if self._unfinished is None or self._unfinished.offset != self.at + start:
            self._unfinished = Unfinished(self._fields, self.at + start, line_bytes)
        spans, first = self._unfinished.look(buffer, start)
        self.hide(spans, 0, out)
        return first

    def release(self, buffer: bytes, upto: int, out: list[Effect]) -> None:
        """Forward the buffer up to `upto` and keep the rest."""
        if upto == len(buffer):
            if buffer:
                out.append(Forward(self._to, buffer))
            self.kept = b""
            self._unfinished = None
        else:
            if upto:
                out.append(Forward(self._to, buffer[:upto]))
                self.at += upto
            self.kept = buffer[upto:]

    def relay(self, left: int, out: list[Effect]) -> None:
        """Let what is still to come of a body pass, but for its end, when it is worth it."""
        if left >= LEAST_RELAY_BYTES:
            out.append(Relay(self.side, left - TAIL_BYTES))

    def relay_chunk(self, left: int, out: list[Effect]) -> None:
        """Let the rest of a chunk pass when it is worth it."""
        if left >= LEAST_CHUNK_RELAY_BYTES:
            out.append(Relay(self.side, left))

    def withhold(self, why: str, out: list[Effect]) -> None:
        """Write down what was received and will not be forwarded."""
        if self.kept:
            withheld = Withheld(self.side.value, self.at, len(self.kept), why)
            out.append(Audit(withheld))
            self.kept = b""

    def discard(self, buffer: bytes, out: list[Effect]) -> None:
        """Hide what looks like a secret in bytes that came too late, and withhold them."""
        self.hide_junk(buffer, 0, out)
        self.kept = buffer
        self.withhold("the session is ending", out)

    def give_up(self) -> bytes:
        """Return what was kept and keep nothing."""
        kept, self.kept = self.kept, b""
        return kept
