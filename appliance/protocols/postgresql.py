"""PostgreSQL 3.0 and 3.2: what each statement asks for, and how it ended.

The session driver calls it. Start-up and authentication (`appliance.wire.pgstartup`) are active on
both sides and hide credentials; from ReadyForQuery on the layer is active for the client
(`appliance.wire.pgfrontend`: an Operation is in the evidence before its statement leaves) and
passive for the server (`appliance.wire.pgbackend`: rows pass first and are counted after). A
session in TLS that the gate does not open is relayed and not decoded; a cancel request is a session
of its own.

docs/protocols/postgresql.md says what is covered and lists the facts.
"""

from __future__ import annotations

from appliance.sansio import (
    BOTH,
    CLIENT,
    NEITHER,
    ONLY_UPSTREAM,
    UPSTREAM,
    Answer,
    Close,
    Data,
    Effect,
    Eof,
    Event,
    Facts,
    Forward,
    Layer,
    Origin,
    ProtocolError,
    Side,
)
from appliance.wire.pgbackend import Backend
from appliance.wire.pgfrontend import Frontend
from appliance.wire.pggreeting import Phase
from appliance.wire.pgmessages import (
    CANCEL_REQUEST,
    GSSENC_REQUEST,
    MOST_CANCEL_BYTES,
    MOST_STARTUP_BYTES,
    SSL_REQUEST,
    error_response,
)
from appliance.wire.pgpipeline import Pipeline
from appliance.wire.pgstartup import Startup
from appliance.wire.sql import Analyser

ADMIN_SHUTDOWN = "57P01"  #: what a server says when an administrator ends a connection
_ENCRYPTION_BYTES = 8
_LEAST_STARTUP_BYTES = 9
_NOTHING: list[Effect] = []


class PostgreSQL:
    """One session."""

    __slots__ = (
        "_analyser", "_backend", "_frontend", "_pipeline", "_startup", "passive", "reading",
        "sensitive",
    )  # fmt: skip

    _frontend: Frontend
    _backend: Backend
    _pipeline: Pipeline

    def __init__(self, facts: Facts, analyser: Analyser) -> None:
        self._analyser = analyser
        self._startup: Startup | None = Startup(facts)
        self.reading: frozenset[Side] = BOTH  #: without the client while it is far ahead
        #: until the server is ready for queries: passwords go up, keys come down
        self.sensitive: frozenset[Side] = BOTH
        self.passive: frozenset[Side] = NEITHER  #: the server, from then on

    def handle(self, event: Event) -> list[Effect]:
        """Decode bytes, or note that a side ended."""
        out: list[Effect] = []
        if self._startup is not None:
            self._starting(self._startup, event, out)
            full = self._startup.full if self._startup is not None else self._frontend.waiting
            self.reading = ONLY_UPSTREAM if full else BOTH
            return out
        pipeline = self._pipeline
        pipeline.out = out
        try:
            if type(event) is Data:
                side, data, offset, pipeline.now = event
                if side is CLIENT:
                    self._frontend.feed(data, offset)
                else:
                    self._backend.feed(data, offset)
                    if self._frontend.blocked:
                        self._frontend.resume()
            elif isinstance(event, Eof):
                self._ending(event)
        except ProtocolError as wrong:
            wrong.done = out
            raise
        finally:
            pipeline.out = _NOTHING  # effects hold on to the bytes of their event
        self.reading = ONLY_UPSTREAM if self._frontend.waiting else BOTH
        return out

    def _ending(self, event: Eof) -> None:
        """A client that only half-closes still gets its answers; nobody else does."""
        gone = event.reset or self._pipeline.fate == "cut"
        if event.side is CLIENT and not gone:
            self._frontend.finish()
            return
        if event.side is CLIENT:
            self._frontend.withhold("reset" if event.reset else "upstream-ended")
        self._backend.finish()

    def _starting(self, startup: Startup, event: Event, out: list[Effect]) -> None:
        if isinstance(event, Data):
            try:
                startup.feed(event, out)
                if startup.phase is Phase.READY:
                    self._begin(startup, event.time_ns, out)
            except ProtocolError as wrong:
                wrong.done = out
                raise
        elif isinstance(event, Eof):
            out.extend(startup.finish(event))

    def _begin(self, startup: Startup, now: int, out: list[Effect]) -> None:
        """Go on with queries; what came early is decoded now."""
        self._pipeline = pipeline = Pipeline(self._analyser)
        pipeline.replication = startup.replication
        pipeline.out, pipeline.now = out, now
        server_at, early = startup.held(UPSTREAM)
        client_at, waiting = startup.held(CLIENT)
        self._frontend = Frontend(pipeline)
        self._backend = Backend(pipeline, server_at)
        for name, value in startup.parameters.items():
            self._backend.parameter(name, value)
        self._startup = None
        self.sensitive, self.passive = NEITHER, ONLY_UPSTREAM
        if early:
            out.append(Forward(CLIENT, early))
            self._backend.feed(early, server_at)
        if waiting:
            self._frontend.feed(waiting, client_at)
        pipeline.out = _NOTHING

    def refuse(self, message: str) -> list[Effect]:
        """End the session with a FATAL error, unless the client is inside a message.

        Then, in TLS, and for a cancel request, which has no answer, both sides are only closed.
        """
        out: list[Effect] = []
        speak = True
        if self._startup is not None:
            speak = self._startup.listening
            out.extend(self._startup.withhold("refused"))
        else:
            self._pipeline.out = out
            speak = not self._backend.inside
            self._frontend.withhold("refused")
            self._backend.finish()
            self._pipeline.out = _NOTHING
        if speak:
            error = error_response(ADMIN_SHUTDOWN, message)
            out.append(Forward(CLIENT, error, Origin.SYNTHESISED))
        return [*out, Close(CLIENT, message), Close(UPSTREAM, message)]

    def held(self, side: Side) -> bytes:
        """Return what `side` sent and was not forwarded."""
        if self._startup is not None:
            return self._startup.held(side)[1]
        return self._frontend.held if side is CLIENT else b""


class PostgreSQLProtocol:
    """What `discover` finds. Its analyser is shared by all sessions of the process."""

    name = "postgresql"
    ports = frozenset({5432, 6432})
    speaks_first = CLIENT
    waits = True

    def __init__(self) -> None:
        self._analyser = Analyser()

    def probe(self, prefix: bytes) -> Answer:
        """Claim what begins with a start-up packet: a length, and a code that says what it is.

        A StartupMessage is only claimed with the first letter of its first parameter: other
        protocols begin with a length and a small number, too.
        """
        if len(prefix) < _ENCRYPTION_BYTES:
            return Answer.MORE if prefix[:2] in (b"", b"\0", b"\0\0") else Answer.NO
        length, code = int.from_bytes(prefix[:4], "big"), int.from_bytes(prefix[4:8], "big")
        if code in (SSL_REQUEST, GSSENC_REQUEST):
            return Answer.YES if length == _ENCRYPTION_BYTES else Answer.NO
        if code == CANCEL_REQUEST:
            return Answer.YES if 16 <= length <= MOST_CANCEL_BYTES else Answer.NO
        if code >> 16 != 3 or not _LEAST_STARTUP_BYTES <= length <= MOST_STARTUP_BYTES:
            return Answer.NO
        if len(prefix) == _ENCRYPTION_BYTES:
            return Answer.MORE
        begins = prefix[8:9].isalpha() or (prefix[8] == 0 and length == _LEAST_STARTUP_BYTES)
        return Answer.YES if begins else Answer.NO

    def layer(self, facts: Facts) -> Layer:
        """Return a fresh layer for one session."""
        return PostgreSQL(facts, self._analyser)


PROTOCOL = PostgreSQLProtocol()
