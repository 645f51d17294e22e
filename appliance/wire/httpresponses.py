"""The upstream's half of an HTTP/1.1 session: bytes in, records and bytes out.

`appliance.protocols.http1` feeds it every byte that the upstream sends. A head is forwarded when it
is whole and read; a body as it comes, in bulk past the layer where it is long. A Result is written
when the answer's last byte was passed on. A response that cannot be read in one way only is not
passed on: the gate answers instead while it still can, else the session ends.

    HEAD      a head comes next
    BODY      `_left` bytes of a body
    CHUNKS    a chunked body
    TILL_END  the body ends with the upstream's half of the connection
    DONE      nothing more is decoded
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

from appliance.sansio import FOREVER, UPSTREAM, Audit, Relay, SetTimer
from appliance.wire.httpchunks import Chunks, Part
from appliance.wire.httphead import IN_CHUNKS, TO_THE_END, FieldReader, Fields, Malformed
from appliance.wire.httpinlet import Inlet
from appliance.wire.httpstart import MOST_LINE_BYTES, LineReader, StatusLine
from appliance.wire.httpunfinished import MOST_HEAD_BYTES
from capture.records import Fact

if TYPE_CHECKING:
    from appliance.wire.httpexchanges import Exchange, Exchanges

HEAD_TIMER = "response-head"
HEAD_S = 30.0
SWITCHING = 101
_LEAST_FINAL = 200
_NO_BODY = frozenset({204, 304})
_MOST_INTERIM = 16


class State(IntEnum):
    """See the module's table."""

    HEAD = 0
    BODY = 1
    CHUNKS = 2
    TILL_END = 3
    DONE = 4


HEAD, BODY, CHUNKS, TILL_END, DONE = State  #: found faster under these names


class Responses:
    """Decodes what the upstream sends."""

    __slots__ = (
        "_block", "_chunks", "_ended", "_exchanges", "_fields", "_left", "_lines", "_meant",
        "_timed", "inlet", "state", "switched",
    )  # fmt: skip

    def __init__(self, exchanges: Exchanges, lines: LineReader, fields: FieldReader) -> None:
        self._exchanges = exchanges
        self._lines = lines
        self._fields = fields
        self.inlet = Inlet(UPSTREAM, fields)
        self.state = HEAD
        self.switched = False  #: the session goes on with something else than HTTP
        self._left = 0
        self._chunks: Chunks | None = None
        self._timed = False  #: a timer runs for the head at hand
        self._ended: list[Audit] = []  #: results of the answers that this event completes
        self._block: bytes | None = None  #: the last response's field lines, and what they meant
        self._meant = Fields()

    def feed(self, data: bytes | memoryview, offset: int) -> None:
        """Decode bytes that stand at `offset` of the upstream's half-stream."""
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
        exchange = self._exchanges.pending[0]
        exchange.bytes += length
        exchange.body_bytes += length
        if self._chunks is not None:
            self._chunks.skip(length)
        elif self.state is BODY:
            self._left -= length

    def finish(self, end: int) -> None:
        """The upstream sends no more; it sent `end` bytes in all."""
        exchanges = self._exchanges
        passed = end - self.inlet.end
        if passed > 0 and exchanges.pending:
            self.passed(passed)
        if self.state is TILL_END:
            self._over(exchanges.pending[0])
            self._write_results()
        elif self.inlet.kept and self.state is HEAD and exchanges.pending:
            wrong = Malformed("a response that is not whole", 502)
            self._refuse(self.inlet.again(), 0, wrong)
        self.stop("incomplete")
        exchanges.cut_off()

    def late(self) -> None:
        """A head did not become whole in time."""
        if self.state is HEAD and self.inlet.kept:
            self._refuse(self.inlet.again(), 0, Malformed("a response that took too long"))

    def stop(self, why: str) -> None:
        """Decode nothing more; what waits is withheld."""
        self.inlet.withhold(why, self._exchanges.out)
        self.state = DONE

    def _walk(self, buffer: bytes) -> None:
        inlet, out = self.inlet, self._exchanges.out
        at = before = 0
        end = len(buffer)
        try:
            while at < end:
                before = at
                at = (self._head if self.state is HEAD else self._rest)(buffer, at)
                if at == before:
                    self._wait(buffer, at)
                    break
        except Malformed as wrong:
            if self._chunks is not None:
                at = self._chunks.at
                self._exchanges.pending[0].bytes += at - before
                self._exchanges.pending[0].body_bytes = self._chunks.data_bytes
            self._refuse(buffer, at, wrong)
            return
        except Exception:
            inlet.kept = buffer  # effects of this event are lost: nothing of it is forwarded
            raise
        inlet.release(buffer, at, out)
        if self._ended:
            out += self._ended
            self._ended.clear()
            pending = self._exchanges.pending
            if pending and pending[0].refusal is not None:
                self._exchanges.settle()
        if self.state is BODY:
            inlet.relay(self._left, out)
        elif self.state is TILL_END:
            out.append(Relay(UPSTREAM, FOREVER))
        elif self._chunks is not None:
            inlet.relay_chunk(self._chunks.left, out)

    def _rest(self, buffer: bytes, at: int) -> int:
        """Decode what is no head; return where it ends, or `at` when it is not whole."""
        state = self.state
        pending = self._exchanges.pending
        if self._chunks is not None:
            exchange = pending[0]
            after = self._chunks.walk(buffer, at)
            exchange.bytes += after - at
            exchange.body_bytes = self._chunks.data_bytes
            if self._chunks.part is Part.DONE:
                self.inlet.hide(self._chunks.spans, 0, self._exchanges.out)
                self._over(exchange)
            return after
        if state is DONE:  # switched
            return len(buffer)
        taken = len(buffer) - at
        if state is BODY:
            taken = min(self._left, taken)
        self.passed(taken)
        if state is BODY and not self._left:
            self._over(pending[0])
        return at + taken

    def _wait(self, buffer: bytes, at: int) -> None:
        """Look at what is not whole yet: it may hold secrets, or be broken already."""
        out = self._exchanges.out
        if self.state is HEAD:
            line = self.inlet.unfinished(buffer, at, out, line_bytes=MOST_LINE_BYTES)
            if line:
                self._lines.status(line)
            if not self._timed:
                self._timed = True
                out.append(SetTimer(HEAD_TIMER, HEAD_S))
        elif self._chunks is not None and self._chunks.part is Part.TRAILERS:
            self.inlet.unfinished(buffer, at, out, line_bytes=0)

    def _head(self, buffer: bytes, at: int) -> int:
        pending = self._exchanges.pending
        if not pending or pending[0].refusal is not None:
            raise Malformed("a response that nothing asked for")
        stop = buffer.find(b"\r\n\r\n", at)
        if stop < 0:
            return at
        if stop - at > MOST_HEAD_BYTES:
            raise Malformed("a head that is too long")
        line_end = buffer.index(b"\r\n", at)
        line = self._lines.status(buffer[at:line_end])
        block = buffer[line_end + 2 : stop + 2]
        if block != self._block:
            self._meant = self._fields.read(block)
            self._block = block
        self._timed = False
        if self._meant.spans:
            self.inlet.hide(self._meant.spans, line_end + 2, self._exchanges.out)
        self._answers(pending[0], line, self._meant, stop + 4 - at)
        return stop + 4

    def _answers(self, exchange: Exchange, line: StatusLine, fields: Fields, size: int) -> None:
        """A head is whole and valid: expect what follows it."""
        status = line.status
        if status < _LEAST_FINAL and status != SWITCHING:
            _note_interim(exchange, status, size)
            return
        switches = (status == SWITCHING or exchange.switch) and _switches(exchange, status)
        length = _body(line, fields, exchange.verb)
        exchange.begun = True
        exchange.status, exchange.tag, exchange.fields = status, line.tag, fields
        exchange.bytes += size
        if switches:
            self._switch(exchange, fields)
        elif length > 0:
            self._left = length
            self.state = BODY
        elif length == IN_CHUNKS:
            self._chunks = Chunks(self._fields, request=False)
            self.state = CHUNKS
        elif length == TO_THE_END:
            self.state = TILL_END
        else:
            self._over(exchange)

    def _switch(self, exchange: Exchange, fields: Fields) -> None:
        """From here on both sides speak something else: it is relayed."""
        self._over(exchange)
        self.switched = True
        self.state = DONE
        to = fields.upgrade or exchange.switch
        fields_of_fact = {"op": exchange.number, "to": to, "secrets": "unparsed"}
        self._ended.append(Audit(Fact("upgraded", fields_of_fact)))

    def _over(self, exchange: Exchange) -> None:
        """The answer is whole."""
        self._exchanges.pending.pop(0)
        exchange.done = True
        status = "ok" if exchange.status < 400 else "error"
        self._ended.append(self._exchanges.result(exchange, status))
        self._chunks = None
        self.state = HEAD

    def _write_results(self) -> None:
        self._exchanges.out += self._ended
        self._ended.clear()

    def _refuse(self, buffer: bytes, at: int, wrong: Malformed) -> None:
        """Pass on nothing from `at` on; answer in the upstream's place while that is possible."""
        exchanges, inlet = self._exchanges, self.inlet
        inlet.hide_junk(buffer, at, exchanges.out)
        inlet.release(buffer, at, exchanges.out)
        inlet.withhold(str(wrong), exchanges.out)
        self._write_results()
        self.state = DONE
        pending = exchanges.pending
        if pending and pending[0].refusal is not None:
            exchanges.settle()
        else:
            exchanges.refuse(pending[0] if pending else None, 502, f"response refused: {wrong}")


def _note_interim(exchange: Exchange, status: int, size: int) -> None:
    exchange.bytes += size
    if exchange.interim is None:
        exchange.interim = []
    if len(exchange.interim) < _MOST_INTERIM:
        exchange.interim.append(status)


def _switches(exchange: Exchange, status: int) -> bool:
    """Say whether `status` ends HTTP on this connection. Raises Malformed when nobody asked."""
    if exchange.verb == "CONNECT":
        if status == SWITCHING:
            raise Malformed("101 to CONNECT")
        return _LEAST_FINAL <= status < 300
    if status != SWITCHING:
        return False
    if not exchange.switch:
        raise Malformed("101 to a request without Upgrade")
    return True


def _body(line: StatusLine, fields: Fields, verb: str) -> int:
    """Return how many bytes follow a head, IN_CHUNKS or TO_THE_END (RFC 9112, section 6.3).

    Raises Malformed.
    """
    if fields.coding and not line.minor:
        raise Malformed("Transfer-Encoding in HTTP/1.0")
    if verb == "HEAD" or line.status in _NO_BODY or line.status == SWITCHING:
        return 0
    if fields.coding:
        return IN_CHUNKS
    return TO_THE_END if fields.length < 0 else fields.length
