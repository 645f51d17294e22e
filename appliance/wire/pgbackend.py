"""The server's half of a PostgreSQL session after start-up: bytes in, results out.

`appliance.protocols.postgresql` feeds it every byte that the server sent; they are on their way to
the client already. Result rows and CopyData are counted by their length fields and never looked
into; of other messages at most `MOST_BODY_BYTES` are kept until they are whole.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Any

from appliance.sansio import UPSTREAM, ProtocolError
from appliance.wire import pgmessages
from appliance.wire.framing import HEADER_BYTES, hop
from appliance.wire.pgencoding import codec
from appliance.wire.pgmessages import Malformed
from appliance.wire.pgnames import Copied, Portal, Running, Statement
from appliance.wire.pgpipeline import SYNC, Pipeline, Step, told
from appliance.wire.pgtypes import text_of

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_BODY_BYTES = 64 * 1024

_SMALL_BYTES = 8 * 1024
_MOST_TAG_BYTES = 1024
_MOST_PAYLOAD_BYTES = 4 * 1024
_SYNC, _QUERY, _EXECUTE = Step.SYNC, Step.QUERY, Step.EXECUTE
_BIND, _DESCRIBE = Step.BIND, Step.DESCRIBE
_DATA_ROW = ord("D")
_COPY_DATA = ord("d")
_HEADER = Struct("!BI").unpack_from


class Backend:
    """Decodes what the server sends."""

    __slots__ = ("_broken", "_kept", "_mark", "_needed", "_pipeline", "_rows", "_seen", "_skip")

    def __init__(self, pipeline: Pipeline, offset: int) -> None:
        """`offset` is where in the server's half-stream start-up ended."""
        self._pipeline = pipeline
        self._kept: bytearray | None = None  #: the beginning of a message
        self._needed = 0  #: length of `_kept` that makes it decodable
        self._skip = 0  #: bytes of the message at hand that are still to come and not looked at
        self._seen = offset  #: how far the half-stream came
        self._mark = offset  #: where the last result ended
        self._rows = 0  #: DataRows since then
        self._broken = False  #: the server's half-stream cannot be read any more

    @property
    def inside(self) -> bool:
        """Say whether the client has received a part of a message."""
        return self._skip > 0 or self._kept is not None or self._broken

    def feed(self, data: memoryview | bytes, offset: int) -> None:
        """Decode bytes that stand at `offset` of the server's half-stream. Raises ProtocolError."""
        self._seen = offset + len(data)
        if self._skip:
            if self._skip >= len(data):
                self._skip -= len(data)
                return
            data, offset, self._skip = data[self._skip :], offset + self._skip, 0
        buffer: bytes | memoryview
        if self._kept is None:
            buffer = bytes(data) if len(data) <= _SMALL_BYTES else data
        else:
            offset -= len(self._kept)
            self._kept += data
            if len(self._kept) < self._needed:
                return
            buffer, self._kept = bytes(self._kept), None
        try:
            done = self._walk(buffer, offset)
        except Malformed as wrong:
            self._broken = True
            raise ProtocolError(UPSTREAM, str(wrong)) from wrong
        if done < len(buffer):
            self._kept = bytearray(buffer[done:])
            self._needed -= done

    def _walk(self, buffer: bytes | memoryview, offset: int) -> int:
        """Decode whole messages; return where the first one stands that is not decoded."""
        unpack, handlers = _HEADER, HANDLERS
        position, end = 0, len(buffer)
        last = end - HEADER_BYTES
        while position <= last:
            kind, length = unpack(buffer, position)
            after = position + 1 + length
            if kind == _DATA_ROW and length >= 4:
                if after <= last and buffer[after] == _DATA_ROW:
                    after, count = hop(buffer, position, end, kind)
                    self._rows += count
                else:
                    self._rows += 1
            elif kind == _COPY_DATA and length >= 4:
                after, count = hop(buffer, position, end, kind)
                self._copied(count, after - position - count * HEADER_BYTES)
            else:
                handler = handlers.get(kind)
                if handler is None or length < 4:
                    raise Malformed(f"no message has type {kind} and length {length}")
                body_end = after
                if length > MOST_BODY_BYTES:
                    body_end = position + HEADER_BYTES + MOST_BODY_BYTES
                if body_end > end:
                    self._needed = body_end
                    return position
                body = buffer[position + HEADER_BYTES : body_end]
                handler(self, body if type(body) is bytes else bytes(body), offset + after)
            if after > end:
                self._skip = after - end
                return end
            position = after
        self._needed = position + HEADER_BYTES
        return position

    def finish(self) -> None:
        """The server sends no more, or nobody listens: what runs is cut."""
        running = self._running()
        if running is not None and running is not self._pipeline.pending:
            self._measure(running, self._seen)
            running.ended = 0
        self._pipeline.cut()

    # -- results

    def _running(self) -> Running | None:
        """Return the operation that the server answers now."""
        if self._pipeline.steps:
            step, thing = self._pipeline.steps[0]
            if step is _EXECUTE:
                return thing  # type: ignore[no-any-return]  # what Step.EXECUTE stands beside
            if step is _QUERY:
                return thing[0] if thing else self._pipeline.pending
        return None

    def _measure(self, running: Running, after: int) -> None:
        """Give an operation what came since the last result."""
        running.rows += self._rows
        running.bytes += after - self._mark
        running.ended = self._pipeline.now
        self._rows, self._mark = 0, after

    def _completed(self, tag: str, after: int) -> None:
        """The server is done with an operation."""
        pipeline = self._pipeline
        steps = pipeline.steps
        step, thing = steps[0] if steps else SYNC
        if step is _EXECUTE:
            del steps[0]
            running: Running = thing
            wait = bool(steps) and steps[0][0] is _SYNC
        elif step is _QUERY and thing:
            running = thing[0]
            del thing[0]
            wait = not thing
        elif step is _QUERY and pipeline.pending is not None:
            running = pipeline.pending  # more results than statements: they are the last one's
            tag = f"{running.tag}; {tag}"[:_MOST_TAG_BYTES]
            wait = True
        else:
            pipeline.mismatch("result")
            return
        running.tag = tag
        self._measure(running, after)
        if running.names:
            pipeline.names.confirm_all(running.names)
        if wait:
            pipeline.wait(running)
        else:
            pipeline.end(running, "ok")

    def _command_complete(self, body: bytes, after: int) -> None:
        self._completed(pgmessages.tag(body[:_MOST_TAG_BYTES]), after)

    def _empty_query(self, _body: bytes, after: int) -> None:
        self._completed("", after)

    def _function_result(self, _body: bytes, after: int) -> None:
        self._completed("", after)

    def _portal_suspended(self, _body: bytes, after: int) -> None:
        running = self._running()
        if running is not None:
            running.detail = {"suspended": True}
        self._completed("", after)

    def _ready(self, body: bytes, after: int) -> None:
        if len(body) != 1:
            raise Malformed("ReadyForQuery is one letter")
        self._pipeline.ready(chr(body[0]))
        self._rows, self._mark = 0, after

    def _error(self, body: bytes, after: int) -> None:
        pipeline = self._pipeline
        pipeline.fail(pgmessages.error_fields(body))
        if pipeline.pending is not None:
            self._measure(pipeline.pending, after)

    def _row_description(self, body: bytes, _after: int) -> None:
        columns = pgmessages.columns(body)
        steps = self._pipeline.steps
        if steps and steps[0][0] is _DESCRIBE:
            described = self._answered(_DESCRIBE, "RowDescription")
            if described is not None:
                described.columns = columns
            return
        running = self._running()
        if running is not None:
            running.columns = columns

    def _no_data(self, _body: bytes, _after: int) -> None:
        self._answered(Step.DESCRIBE, "NoData")

    def _parameter_description(self, body: bytes, _after: int) -> None:
        steps = self._pipeline.steps
        if steps and steps[0][0] is Step.DESCRIBE and isinstance(steps[0][1], Statement):
            steps[0][1].oids = pgmessages.parameter_types(body)

    def _answered(self, step: Step, name: str) -> Any:
        """Take the step at hand off; None when it is another one, or its question is held back."""
        steps = self._pipeline.steps
        if steps and steps[0][0] is step:
            thing = steps[0][1]
            if thing is None or not thing.silent:
                del steps[0]
                return thing
        self._pipeline.mismatch(name)
        return None

    def _parse_complete(self, _body: bytes, after: int) -> None:
        statement = self._answered(Step.PARSE, "ParseComplete")
        if isinstance(statement, Statement):
            self._pipeline.names.confirm(statement)
            running = statement.running
            if running is not None:
                self._measure(running, after)
                if self._pipeline.steps and self._pipeline.steps[0][0] is _SYNC:
                    self._pipeline.wait(running)
                else:
                    self._pipeline.end(running, "ok")

    def _bind_complete(self, _body: bytes, _after: int) -> None:
        portal = self._answered(_BIND, "BindComplete")
        if (
            isinstance(portal, Portal)
            and portal.running is not None
            and self._pipeline.names.portals.get(portal.key) is not portal
        ):
            self._pipeline.release(portal)  # there was no room to remember it

    def _close_complete(self, _body: bytes, _after: int) -> None:
        statement = self._answered(Step.CLOSE, "CloseComplete")
        if isinstance(statement, Statement):
            self._pipeline.names.confirm(statement)

    # -- copying

    def _copy_in(self, _body: bytes, _after: int) -> None:
        self._copying("in")

    def _copy_out(self, _body: bytes, _after: int) -> None:
        self._copying("out")

    def _copy_both(self, _body: bytes, _after: int) -> None:
        self._copying("both")

    def _copying(self, direction: str) -> None:
        running = self._running()
        if running is None:
            self._pipeline.mismatch("COPY")
            return
        running.copied = Copied(direction)
        if direction != "out":
            self._pipeline.swallow(running)

    def _copied(self, count: int, size: int) -> None:
        running = self._running()
        if running is not None and running.copied is not None:
            running.copied.down_messages += count
            running.copied.down_bytes += size

    def _copy_done(self, _body: bytes, _after: int) -> None:
        pass  # CommandComplete follows

    # -- what may come at any time

    def _parameter_status(self, body: bytes, _after: int) -> None:
        name, value = pgmessages.strings(body, 0, 2)
        self.parameter(name, value)
        self._pipeline.fact("parameter", {name: value})

    def parameter(self, name: str, value: str) -> None:
        """Note what changes how texts are read."""
        names = self._pipeline.names
        if name == "client_encoding":
            names.encoding = codec(value)
        elif name == "standard_conforming_strings":
            names.standard_strings = value == "on"

    def _notice(self, body: bytes, _after: int) -> None:
        fields = pgmessages.error_fields(body)
        running = self._running()
        found = {"sqlstate": fields.get("C", ""), "message": fields.get("M", ""), **told(fields)}
        if running is not None:
            found["op"] = running.number
        self._pipeline.fact("notice", found)

    def _notification(self, body: bytes, _after: int) -> None:
        pid = int.from_bytes(body[:4], "big")
        channel, position = pgmessages.cstring(body, 4)
        payload = body[position:].rstrip(b"\0")
        fields = {
            "pid": pid,
            "channel": text_of(channel),
            "payload": text_of(payload[:_MOST_PAYLOAD_BYTES]),
        }
        self._pipeline.fact("notification", fields)

    @classmethod
    def handlers(cls) -> dict[int, Callable[[Backend, bytes, int], None]]:
        """Return the handlers by the message's type."""
        return {
            ord("C"): cls._command_complete,
            ord("Z"): cls._ready,
            ord("T"): cls._row_description,
            ord("1"): cls._parse_complete,
            ord("2"): cls._bind_complete,
            ord("3"): cls._close_complete,
            ord("n"): cls._no_data,
            ord("t"): cls._parameter_description,
            ord("E"): cls._error,
            ord("N"): cls._notice,
            ord("A"): cls._notification,
            ord("S"): cls._parameter_status,
            ord("s"): cls._portal_suspended,
            ord("I"): cls._empty_query,
            ord("V"): cls._function_result,
            ord("G"): cls._copy_in,
            ord("H"): cls._copy_out,
            ord("W"): cls._copy_both,
            ord("c"): cls._copy_done,
        }


HANDLERS = Backend.handlers()
