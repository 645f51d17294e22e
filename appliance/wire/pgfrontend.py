"""The client's half of a PostgreSQL session after start-up: bytes in, records and bytes out.

`appliance.protocols.postgresql` feeds it every byte that the client sends once the server is ready
for queries. `appliance.wire.pgrequests` says what each message asks for and what has to wait.

Messages are forwarded in whole, in one Forward for all that may go, after the records that tell of
them. Two kinds are not kept: CopyData passes as it comes, and of a message longer than
`MOST_BODY_BYTES` only that much is looked at.
"""

from __future__ import annotations

from struct import Struct

from appliance.sansio import CLIENT, UPSTREAM, Audit, Forward, ProtocolError
from appliance.wire.framing import HEADER_BYTES, hop
from appliance.wire.pgmessages import Malformed
from appliance.wire.pgnames import Undecided
from appliance.wire.pgpipeline import MOST_STEPS, Pipeline
from appliance.wire.pgrequests import HANDLERS, Requests
from capture.records import Withheld

MOST_BODY_BYTES = 64 * 1024 + 512  #: of one message: a whole text and a name

_SMALL_BYTES = 8 * 1024
_COPY_DATA = ord("d")
_HEADER = Struct("!BI").unpack_from


class Frontend:
    """Decodes what the client sends."""

    __slots__ = (
        "_at", "_kept", "_needed", "_next", "_pipeline", "_requests", "_skip", "blocked",
    )  # fmt: skip

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._requests = Requests(pipeline)
        self._kept: bytearray | None = None  #: received and not forwarded
        self._at = 0  #: where `_kept` begins in the half-stream
        self._next = 0  #: first byte of `_kept` that is not decoded
        self._needed = 0  #: length of `_kept` that makes the next message decodable
        self.blocked = False  #: a message waits for an answer of the server
        self._skip = 0  #: bytes that pass unseen: the rest of a message

    @property
    def waiting(self) -> bool:
        """Say whether answers should come before the client asks more."""
        return self.blocked or len(self._pipeline.steps) >= MOST_STEPS

    def feed(self, data: memoryview | bytes, offset: int) -> None:
        """Decode bytes that stand at `offset` of the client's half-stream. Raises ProtocolError;
        what came before the broken message is decided then, too.
        """
        given = data
        if self._skip:
            data = self._pass(data)
            if not data:
                return
        if self._kept is None:
            size = len(data)
            self._at, self._next = offset + len(given) - size, 0
            self._decode(bytes(data) if size <= _SMALL_BYTES else data, given, offset)
        else:
            self._kept += data
            if len(self._kept) >= self._needed and not self.blocked:
                self._decode(bytes(self._kept), given, offset)

    def resume(self) -> None:
        """The server said something: look again at what waits for it."""
        self.blocked = False
        kept = self.held
        self._decode(kept, kept, self._at)

    def _decode(self, buffer: bytes | memoryview, given: bytes | memoryview, offset: int) -> None:
        try:
            self._walk(buffer)
        except Undecided:
            self.blocked = True
        except Malformed as wrong:
            self._release(buffer)
            raise ProtocolError(CLIENT, str(wrong)) from wrong
        except Exception:
            if self._kept is None:  # effects of this event are lost: nothing of it was forwarded
                self._kept, self._at = bytearray(given), offset
            raise
        self._release(buffer)

    def _pass(self, data: memoryview | bytes) -> memoryview | bytes:
        """Forward the rest of a message that is not looked at; return what comes after it."""
        passed = min(self._skip, len(data))
        self._skip -= passed
        self._pipeline.out.append(Forward(UPSTREAM, data[:passed]))
        return data[passed:]

    def finish(self) -> None:
        """The client sends no more: whole messages still go, a part of one does not."""
        if self._requests.held >= 0:
            self._requests.announce()
        if self._kept is not None:
            self._release(bytes(self._kept))
        self.withhold("incomplete")

    def withhold(self, why: str) -> None:
        """Write down what was received and will not be forwarded."""
        if self._kept:
            withheld = Withheld("client", self._at, len(self._kept), why)
            self._pipeline.out.append(Audit(withheld))
            self._kept = None

    @property
    def held(self) -> bytes:
        """Return what was received and not forwarded."""
        return bytes(self._kept or b"")

    def _release(self, buffer: bytes | memoryview) -> None:
        """Forward what is decided, keep the rest."""
        held = self._requests.held
        if held < 0 and self._next == len(buffer):
            self._pipeline.out.append(Forward(UPSTREAM, buffer))
            self._at += self._next
            self._next = 0
            self._kept = None
            return
        done = self._next if held < 0 else held - self._at
        if done:
            self._pipeline.out.append(Forward(UPSTREAM, buffer[:done]))
            self._at += done
            self._next -= done
            self._needed -= done
            self._kept = bytearray(buffer[done:])
        elif self._kept is None:
            self._kept = bytearray(buffer)

    def _walk(self, buffer: bytes | memoryview) -> None:
        """Decode whole messages; `_next` is the first byte that is not decoded."""
        requests, handlers, base = self._requests, HANDLERS, self._at
        position, end = self._next, len(buffer)
        while end - position >= HEADER_BYTES:
            kind, length = _HEADER(buffer, position)
            if kind == _COPY_DATA and length >= 4:
                position = self._copy_data(buffer, position, end)
                continue
            handler = handlers.get(kind)
            if handler is None or length < 4:
                raise Malformed(f"no message has type {kind} and length {length}")
            body_end = after = position + 1 + length
            left = 0
            if length > MOST_BODY_BYTES + 4:
                left = length - 4 - MOST_BODY_BYTES
                body_end -= left
            if body_end > end:
                self._needed = body_end
                return
            body = buffer[position + HEADER_BYTES : body_end]
            if type(body) is not bytes:
                body = bytes(body)
            handler(requests, body, base + position, base + after, left)
            if after > end:
                self._skip = after - end
                after = end
            self._next = position = after
        self._needed = position + HEADER_BYTES

    def _copy_data(self, buffer: bytes | memoryview, position: int, end: int) -> int:
        """Let CopyData pass; what the client sends after an error is CopyData of nothing."""
        if self._requests.held >= 0:
            self._requests.announce()
        after, count = hop(buffer, position, end, _COPY_DATA)
        running = self._pipeline.copying
        if running is not None and running.copied is not None:
            running.copied.up_messages += count
            running.copied.up_bytes += after - position - count * HEADER_BYTES
        if after > end:
            self._skip = after - end
            after = end
        self._next = after
        return after
