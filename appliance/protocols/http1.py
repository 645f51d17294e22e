"""HTTP/1.0 and HTTP/1.1: what each request asks for, and how it was answered.

The session driver calls it. Both sides may carry credentials in any head (Authorization, Cookie,
Set-Cookie), so the driver keeps what is not a long body back until `Hide` has named them. The
client's half (`appliance.wire.httprequests`) has an Operation in the evidence before its request
leaves; the upstream's half (`appliance.wire.httpresponses`) passes on what it read and writes the
Result after it. Requests and responses are forwarded byte for byte or not at all. After a switch
to another protocol (101, or 2xx to CONNECT) the session is relayed and not decoded.

docs/protocols/http1.md says what is covered, what is refused and what is hidden.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from appliance.sansio import (
    BOTH,
    CLIENT,
    FOREVER,
    NEITHER,
    ONLY_UPSTREAM,
    UPSTREAM,
    Answer,
    Data,
    Effect,
    Elapsed,
    Eof,
    Event,
    Facts,
    Forward,
    Layer,
    Relay,
    Side,
)
from appliance.wire import httprequests, httpresponses
from appliance.wire.httpexchanges import MOST_PENDING, Exchanges
from appliance.wire.httphead import FieldReader
from appliance.wire.httprequests import ASKED, Requests
from appliance.wire.httpresponses import DONE, Responses
from appliance.wire.httpsecrets import Secrets
from appliance.wire.httpstart import LineReader

if TYPE_CHECKING:
    from appliance.config import Http


#: Methods that begin a request for certain, once a path or a URL follows.
_BEGINS = re.compile(
    rb"(?:\r\n)?(?:GET|HEAD|POST|PUT|DELETE|OPTIONS|TRACE|PATCH|PURGE|QUERY|COPY|MOVE|LOCK|UNLOCK"
    rb"|MKCOL|PROPFIND|PROPPATCH|REPORT|SEARCH) (?:/|https?://)",
)
_METHODS = tuple(
    b"GET HEAD POST PUT DELETE OPTIONS TRACE PATCH PURGE QUERY COPY MOVE LOCK UNLOCK MKCOL "
    b"PROPFIND PROPPATCH REPORT SEARCH CONNECT".split()
)
#: Other protocols' clients are not to wait for a word that is none.
_BEGUN_METHODS = frozenset(
    method[:length] for method in _METHODS for length in range(len(method) + 1)
)
_VERSION = re.compile(rb"[\r\n]*[!-~]+[ \t].*\bHTTP/[0-9]", re.IGNORECASE)
_HTTP2 = b"PRI * HTTP/2"
_MAY_BEGIN = re.compile(rb"(?:\r(?:\n)?)?(?:[A-Za-z_-]{1,32}(?:[ \t][\t\x20-\x7e\x80-\xff]*)?\r?)?")


class HTTP1:
    """One session."""

    __slots__ = ("_exchanges", "_requests", "_responses", "passive", "reading", "sensitive")

    def __init__(self, facts: Facts, lines: LineReader, fields: FieldReader) -> None:
        self._exchanges = Exchanges(facts)
        self._requests = Requests(self._exchanges, lines, fields)
        self._responses = Responses(self._exchanges, lines, fields)
        self.reading: frozenset[Side] = BOTH  #: without the client while it is far ahead
        self.sensitive: frozenset[Side] = BOTH  #: until HTTP ends
        self.passive: frozenset[Side] = NEITHER

    def handle(self, event: Event) -> list[Effect]:
        """Decode bytes, or note that a side ended or is slow."""
        out: list[Effect] = []
        exchanges = self._exchanges
        exchanges.out = out
        if not self.sensitive:
            return self._switched_already(event)
        requests = self._requests
        if type(event) is Data:
            side, data, offset, exchanges.now = event
            if side is CLIENT:
                requests.feed(data, offset)
            else:
                self._responses.feed(data, offset)
                if requests.state is ASKED or self._responses.switched:
                    self._go_on(out)
        elif not exchanges.over:
            if type(event) is Eof:
                self._end(event)
            elif type(event) is Elapsed:
                self._late(event.timer)
        if requests.state >= ASKED or len(exchanges.pending) >= MOST_PENDING:
            self.reading = NEITHER if exchanges.over else ONLY_UPSTREAM
        else:
            self.reading = NEITHER if exchanges.over else BOTH
        exchanges.out = []  # an idle session keeps nothing of what it did last
        return out

    def _go_on(self, out: list[Effect]) -> None:
        """The upstream answered: maybe a request that asked for another protocol."""
        if self._responses.switched:
            kept = self._requests.inlet.give_up()
            if kept:
                out.append(Forward(UPSTREAM, kept))
            out += (Relay(CLIENT, FOREVER), Relay(UPSTREAM, FOREVER))
            self.sensitive = NEITHER
        elif not self._exchanges.pending:
            self._requests.answered()

    @staticmethod
    def _switched_already(event: Event) -> list[Effect]:
        if type(event) is Data:
            return [Forward(UPSTREAM if event.side is CLIENT else CLIENT, event.data)]
        return []

    def _end(self, event: Eof) -> None:
        """A client that only half-closes still gets its answers."""
        if event.side is CLIENT:
            self._requests.finish(event.offset)
            if event.reset or self._responses.state is DONE:
                self._exchanges.cut()
        else:
            self._responses.finish(event.offset)

    def _late(self, timer: str) -> None:
        if timer == httprequests.HEAD_TIMER:
            self._requests.late()
        elif timer == httpresponses.HEAD_TIMER:
            self._responses.late()

    def refuse(self, message: str) -> list[Effect]:
        """Answer 503 when a response can still be given in order, and end the session."""
        exchanges = self._exchanges
        out: list[Effect] = []
        exchanges.out = out
        if not exchanges.over:
            self._requests.stop("refused")
            self._responses.stop("refused")
            first = exchanges.pending[0] if exchanges.pending else None
            exchanges.answer(first, 503, message)
        return out

    def held(self, side: Side) -> bytes | None:
        """Return what `side` sent and was not forwarded; None after a request was refused, while
        its answer waits for its turn.
        """
        if side is UPSTREAM:
            return self._responses.inlet.kept
        return None if self._requests.state is httprequests.DONE else self._requests.inlet.kept


class HTTP1Protocol:
    """What `discover` finds. What it knows of names and lines is shared by all sessions."""

    name = "http1"
    ports = frozenset({80, 3128, 8000, 8008, 8080, 8081, 8888, 9200})
    speaks_first = CLIENT
    waits = False

    def __init__(self) -> None:
        self._readers: dict[Http, tuple[LineReader, FieldReader]] = {}

    def probe(self, prefix: bytes) -> Answer:
        """Claim what a server could take for an HTTP/1 request, valid or not.

        What this lets go is opaque, and its secrets are not hidden: a first line that names HTTP is
        claimed even when the layer will refuse it. HTTP/2 with prior knowledge is not claimed.
        """
        if b" " not in prefix and b"\t" not in prefix:  # what follows costs other protocols more
            begun = prefix.lstrip(b"\r\n") in _BEGUN_METHODS and _MAY_BEGIN.fullmatch(prefix)
            return Answer.MORE if begun else Answer.NO
        if prefix.startswith(_HTTP2):
            return Answer.NO
        if _BEGINS.match(prefix) or _VERSION.match(prefix):
            line, newline, _ = prefix.lstrip(b"\r\n").partition(b"\n")
            return Answer.YES if not newline or _VERSION.match(line) else Answer.NO
        word, space, _ = prefix.lstrip(b"\r\n").partition(b" ")
        if not space and not any(method.startswith(word) for method in _METHODS):
            return Answer.NO
        return Answer.MORE if _MAY_BEGIN.fullmatch(prefix) else Answer.NO

    def layer(self, facts: Facts) -> Layer:
        """Return a fresh layer for one session."""
        readers = self._readers.get(facts.http)
        if readers is None:
            secrets = Secrets(facts.http.secret_headers, facts.http.secret_parameters)
            readers = self._readers[facts.http] = LineReader(secrets), FieldReader(secrets)
        return HTTP1(facts, *readers)


PROTOCOL = HTTP1Protocol()
