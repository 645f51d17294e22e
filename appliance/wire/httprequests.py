"""The client's half of an HTTP/1.1 session: bytes in, records and bytes out.

`appliance.protocols.http1` feeds it every byte that the client sends. A head is forwarded when it
is whole, read, and its Operation written; a body as it comes, in bulk past the layer where it is
long. A request that cannot be read in one way only ends the client's half: nothing more is
forwarded, and the gate answers it when its turn comes.

    HEAD      a head comes next
    BODY      `_left` bytes of a body
    CHUNKS    a chunked body
    ASKED     the client asked to go on with something else than HTTP: the answer says whether what
              it sends next is a request
    DONE      nothing more is decoded
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import TYPE_CHECKING

from appliance.sansio import CLIENT, SetTimer
from appliance.wire.httpchunks import Chunks, Part
from appliance.wire.httphead import IN_CHUNKS, FieldReader, Fields, Malformed
from appliance.wire.httpinlet import Inlet
from appliance.wire.httpsecrets import redact
from appliance.wire.httpstart import MOST_LINE_BYTES, LineReader, RequestLine
from appliance.wire.httpunfinished import MOST_HEAD_BYTES

if TYPE_CHECKING:
    from appliance.wire.httpexchanges import Exchange, Exchanges
    from appliance.wire.httpsecrets import Span

HEAD_TIMER = "request-head"
HEAD_S = 30.0
_CR = ord("\r")
_FIRST_LINE = re.compile(rb"(?:\r?\n)?(?:([A-Z]{1,32}) )?[^\r\n]{0,1024}")


class State(IntEnum):
    """See the module's table."""

    HEAD = 0
    BODY = 1
    CHUNKS = 2
    ASKED = 3
    DONE = 4


HEAD, BODY, CHUNKS, ASKED, DONE = State  #: found faster under these names


class Requests:
    """Decodes what the client sends."""

    __slots__ = (
        "_blank", "_block", "_chunks", "_exchange", "_exchanges", "_fields", "_left", "_lines",
        "_meant", "_timed", "inlet", "state",
    )  # fmt: skip

    def __init__(self, exchanges: Exchanges, lines: LineReader, fields: FieldReader) -> None:
        self._exchanges = exchanges
        self._lines = lines
        self._fields = fields
        self.inlet = Inlet(CLIENT, fields)
        self.state = HEAD
        self._exchange: Exchange | None = None  #: whose body comes
        self._left = 0
        self._chunks: Chunks | None = None
        self._blank = False  #: an empty line came before the head
        self._timed = False  #: a timer runs for the head at hand
        self._block: bytes | None = None  #: the last request's field lines, and what they meant
        self._meant = Fields()

    def feed(self, data: bytes | memoryview, offset: int) -> None:
        """Decode bytes that stand at `offset` of the client's half-stream."""
        inlet = self.inlet
        passed = offset - inlet.end
        buffer = inlet.take(data, offset)
        if self.state is DONE:
            inlet.discard(buffer, self._exchanges.out)
            return
        if passed:
            self.passed(passed)
        self._walk(buffer)

    def passed(self, length: int) -> None:
        """Note that `length` bytes of a body passed elsewhere."""
        if self._chunks is not None:
            self._chunks.skip(length)
        elif self._exchange is not None:
            self._left -= length
            self._exchange.request_bytes += length

    def finish(self, end: int) -> None:
        """The client sends no more; it sent `end` bytes in all."""
        passed = end - self.inlet.end
        if passed > 0:
            self.passed(passed)
        self.inlet.withhold("incomplete", self._exchanges.out)
        self.state = DONE

    def answered(self) -> None:
        """The request that asked for something else was answered as any other."""
        if self.state is ASKED:
            self.state = HEAD
            self._walk(self.inlet.again())

    def late(self) -> None:
        """A head did not become whole in time."""
        if self.state is HEAD and self.inlet.kept:
            self._refuse(self.inlet.again(), 0, Malformed("a request that took too long", 408))

    def stop(self, why: str) -> None:
        """Decode nothing more; a part of a request is denied, what waits is withheld."""
        if self.state is HEAD and self.inlet.kept:
            kept = self.inlet.again()
            self._deny(kept, self.inlet.hide_junk(kept, 0, self._exchanges.out), self.inlet.at)
        self.inlet.withhold(why, self._exchanges.out)
        self.state = DONE

    def _walk(self, buffer: bytes) -> None:
        inlet, out = self.inlet, self._exchanges.out
        at, end = 0, len(buffer)
        try:
            while at < end:
                before = at
                at = (self._head if self.state is HEAD else self._rest)(buffer, at)
                if at == before:
                    self._wait(buffer, at)
                    break
        except Malformed as wrong:
            if self._chunks is not None and self._exchange is not None:
                at = self._chunks.at
                self._exchange.request_bytes = self._chunks.data_bytes
            self._refuse(buffer, at, wrong)
            return
        except Exception:
            inlet.kept = buffer  # effects of this event are lost: nothing of it is forwarded
            raise
        inlet.release(buffer, at, out)
        if self.state is BODY:
            inlet.relay(self._left, out)
        elif self._chunks is not None:
            inlet.relay_chunk(self._chunks.left, out)

    def _rest(self, buffer: bytes, at: int) -> int:
        """Decode what is no head; return where it ends, or `at` when it is not whole."""
        if self.state is BODY:
            taken = min(self._left, len(buffer) - at)
            self.passed(taken)
            if not self._left:
                self._whole()
            return at + taken
        if self._chunks is not None:
            at = self._chunks.walk(buffer, at)
            assert self._exchange is not None
            self._exchange.request_bytes = self._chunks.data_bytes
            if self._chunks.part is Part.DONE:
                self.inlet.hide(self._chunks.spans, 0, self._exchanges.out)
                self._whole()
        return at

    def _wait(self, buffer: bytes, at: int) -> None:
        """Look at what is not whole yet: it may hold secrets, or be broken already."""
        out = self._exchanges.out
        if self.state is HEAD:
            line = self.inlet.unfinished(buffer, at, out, line_bytes=MOST_LINE_BYTES)
            if line:
                self._lines.request(line)
            if not self._timed:
                self._timed = True
                out.append(SetTimer(HEAD_TIMER, HEAD_S))
        elif self.state is ASKED:
            self.inlet.hide_junk(buffer, at, out)
        elif self._chunks is not None and self._chunks.part is Part.TRAILERS:
            self.inlet.unfinished(buffer, at, out, line_bytes=0)

    def _head(self, buffer: bytes, at: int) -> int:
        if buffer[at] == _CR and buffer.startswith(b"\r\n", at):
            if self._blank:
                raise Malformed("empty lines before a request")
            self._blank = True
            return at + 2
        stop = buffer.find(b"\r\n\r\n", at)
        if stop < 0:
            return at
        if stop - at > MOST_HEAD_BYTES:
            raise Malformed("a head that is too long", 431)
        line_end = buffer.index(b"\r\n", at)
        line = self._lines.request(buffer[at:line_end])
        block = buffer[line_end + 2 : stop + 2]
        if block != self._block:
            self._meant = self._fields.read(block)
            self._block = block
        self._asks(line, self._meant, at, line_end + 2, stop + 4)
        self._blank = self._timed = False
        return stop + 4

    def _asks(self, line: RequestLine, fields: Fields, at: int, block_at: int, after: int) -> None:
        """A head is whole and valid: write its Operation and expect its body."""
        length = _body(line, fields)
        exchanges, inlet = self._exchanges, self.inlet
        whole = after - at + max(length, 0)
        if line.spans:
            inlet.hide(line.spans, at, exchanges.out)
        if fields.spans:
            inlet.hide(fields.spans, block_at, exchanges.out)
        exchange = exchanges.ask(line, fields, inlet.at + at, whole)
        if fields.upgrade or line.verb == "CONNECT":
            exchange.switch = line.host if line.verb == "CONNECT" else fields.upgrade
        if not length:
            exchange.asked = exchanges.now
            self.state = ASKED if exchange.switch else HEAD
            return
        self._exchange = exchange
        if length > 0:
            self._left = length
            self.state = BODY
        else:
            self._chunks = Chunks(self._fields, request=True)
            self.state = CHUNKS

    def _whole(self) -> None:
        """The request at hand is whole."""
        exchange = self._exchange
        assert exchange is not None
        exchange.asked = self._exchanges.now
        self._chunks = None
        self.state = ASKED if exchange.switch and not exchange.done else HEAD
        self._exchange = None

    def _refuse(self, buffer: bytes, at: int, wrong: Malformed) -> None:
        """Pass on nothing from `at` on; answer the request that is broken in its turn."""
        exchanges, inlet = self._exchanges, self.inlet
        spans = inlet.hide_junk(buffer, at, exchanges.out)
        exchange = self._exchange
        if self.state is HEAD:
            exchange = self._deny(buffer[at:], spans, inlet.at + at)
        inlet.release(buffer, at, exchanges.out)
        inlet.withhold(str(wrong), exchanges.out)
        self.state = DONE
        exchanges.refuse(exchange, wrong.status, f"request refused: {wrong}")

    def _deny(self, rest: bytes, spans: list[Span], offset: int) -> Exchange:
        """Write the Operation of a request that is not passed on."""
        line = _FIRST_LINE.match(redact(rest, spans))
        assert line is not None
        verb = line[1].decode() if line[1] else "unknown"
        text = line[0].decode("utf-8", "backslashreplace")
        return self._exchanges.deny(verb, text, offset, len(rest))


def _body(line: RequestLine, fields: Fields) -> int:
    """Return how many bytes follow a head, or IN_CHUNKS. Raises Malformed."""
    if not fields.coding and fields.length <= 0 and not fields.padded:
        return 0
    if fields.coding:
        if not line.minor:
            raise Malformed("Transfer-Encoding in HTTP/1.0")
        if fields.coding != b"chunked":
            raise Malformed("a Transfer-Encoding besides chunked", 501)
        if line.verb == "CONNECT":
            raise Malformed("CONNECT with a body")
        return IN_CHUNKS
    if fields.padded:
        raise Malformed("a Content-Length that begins with zero")
    if line.verb == "CONNECT" and fields.length > 0:
        raise Malformed("CONNECT with a body")
    return fields.length
