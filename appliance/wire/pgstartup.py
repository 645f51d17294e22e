"""The beginning of a PostgreSQL session: encryption requests, start-up, authentication.

`appliance.protocols.postgresql` feeds it both sides until the server is ready for queries, the
session goes to TLS, or it turns out to be a cancel request. Both sides may carry secrets here, so
the driver keeps the bytes back until `Hide` has named the secret ranges; both are forwarded here,
message by message.

    OPEN       the client has yet to say what it wants: SSLRequest, GSSENCRequest, CancelRequest or
               StartupMessage
    ASKED      SSLRequest went to the server, which answers with one byte; until then the client has
               nothing to say, and whatever it sends was meant to be read after the handshake
    STARTED    authentication, then parameters and the cancel key; what the client sends besides
               authentication messages waits
    READY      ReadyForQuery came; both sides' rest is the next stage's
    CANCELLED  the client asked to cancel another session's query; the server answers by closing
    SEALED     the session went on in TLS and is not decoded; what its handshake shows is recorded
    REFUSED    the gate answered with an error; both sides are being closed

Where the gate opens TLS (`Facts.opens_tls`), the server's S is followed by both handshakes, and the
client begins anew inside. Channel binding ties SCRAM to the certificate that the client saw; where
that is the gate's, the mechanism with it is taken out of the server's list, and a client that says
that it would have used it is refused: the server would take it for an attack.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Any

from appliance.sansio import (
    CLIENT,
    UPSTREAM,
    Audit,
    Effect,
    Forward,
    Hide,
    Origin,
    ProtocolError,
    Side,
    StartTls,
)
from appliance.wire import pgbinding, pggreeting, pgmessages
from appliance.wire.pggreeting import Phase
from appliance.wire.pgmessages import (
    CANCEL_REQUEST,
    GSSENC_REQUEST,
    MOST_CANCEL_BYTES,
    MOST_STARTUP_BYTES,
    SSL_REQUEST,
    Malformed,
)
from appliance.wire.pgpipeline import told
from appliance.wire.pgtypes import text_of
from appliance.wire.tlspassing import Passing, passed
from capture.records import Fact, Result, Withheld

if TYPE_CHECKING:
    from appliance.sansio import Data, Eof, Facts

MOST_MESSAGE_BYTES = 65_536 + 64  #: the server's PG_MAX_AUTH_TOKEN_LENGTH, and its header
MOST_WAITING_BYTES = 64 * 1024  #: of the client, before the server is ready; then it is not read

_HEADER = Struct("!BI").unpack_from
_PACKET = Struct("!II").unpack_from
_INT4 = Struct("!I").unpack_from
_HEADER_BYTES, _PACKET_BYTES = 5, 8
_PASSWORD = ord("p")
_TERMINATE = ord("X")

#: Requests of AuthenticationRequest: what the evidence calls them.
_METHODS = {
    0: "none", 2: "kerberos", 3: "password", 5: "md5", 7: "gss", 9: "sspi", 10: "sasl",
}  # fmt: skip


class Startup:
    """Reads both sides until the server is ready for queries."""

    __slots__ = (
        "_client", "_client_at", "_facts", "_gss_refused", "_mechanism", "_method", "_out",
        "_passing", "_server", "_server_at", "_ssl_refused", "_tls", "authenticated", "parameters",
        "phase", "replication",
    )  # fmt: skip

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._out: list[Effect] = []
        self._client = bytearray()  #: received and not forwarded
        self._client_at = 0  #: where it begins in the half-stream
        self._server = bytearray()
        self._server_at = 0
        self._method = "none"
        self._mechanism = ""
        self._ssl_refused = self._gss_refused = False
        self._tls = facts.in_tls  #: the gate opened it
        self._passing: Passing | None = None  #: once it went to TLS that nobody opens
        self.phase = Phase.OPEN
        self.authenticated = False
        self.replication = False
        self.parameters: dict[str, str] = {}  #: the server's

    @property
    def full(self) -> bool:
        """Say whether the client sent so much ahead of time that it should not be read."""
        return self.phase is Phase.STARTED and len(self._client) >= MOST_WAITING_BYTES

    def held(self, side: Side) -> tuple[int, bytes]:
        """Return (offset, bytes) of what `side` sent and what was not forwarded."""
        if side is CLIENT:
            return self._client_at, bytes(self._client)
        return self._server_at, bytes(self._server)

    @property
    def _unbound(self) -> bool:
        """Say whether client and server see different certificates."""
        facts = self._facts
        return self._tls and not facts.plain_upstream and not facts.same_certificate

    def feed(self, data: Data, out: list[Effect]) -> None:
        """Decode bytes of either side. Raises ProtocolError."""
        if self.phase is Phase.REFUSED:
            return
        if self._passing is not None:
            out += [*self._passing.feed(data.side, data.data), *passed(data)]
            return
        self._out = out
        kept, at = (
            (self._client, self._client_at)
            if data.side is CLIENT
            else (self._server, self._server_at)
        )
        if not kept:
            at = data.offset
        kept += data.data
        try:
            if data.side is CLIENT:
                self._client_at = at
                self._from_client(data)
            else:
                self._server_at = at
                self._from_server(data)
        except Malformed as wrong:
            raise ProtocolError(data.side, str(wrong)) from wrong
        finally:
            self._out = []

    def _hide(self, data: Data, start: int, end: int, kind: str) -> None:
        """Hide what of a secret at [start, end) of the half-stream lies in the bytes at hand."""
        start = max(start, data.offset)
        end = min(end, data.offset + len(data.data))
        if start < end:
            self._out.append(Hide(data.side, start, end - start, kind))

    def _fact(self, kind: str, fields: dict[str, Any]) -> None:
        self._out.append(Audit(Fact(kind, fields)))

    # -- the client

    def _from_client(self, data: Data) -> None:
        self._nothing_due()
        while self.phase is Phase.OPEN and len(self._client) >= _PACKET_BYTES:
            if not self._packet(data):
                return
        if self._client:
            self._nothing_due()
        if self.phase is Phase.STARTED:
            self._answers(data)

    def _nothing_due(self) -> None:
        """Raise when the client has nothing to say now."""
        if self.phase is Phase.ASKED:
            raise Malformed("bytes came together with SSLRequest")
        if self.phase is Phase.CANCELLED:
            raise Malformed("bytes came after CancelRequest")

    def _packet(self, data: Data) -> bool:
        """Handle one packet without a type; False when it is not whole."""
        length, code = _PACKET(self._client, 0)
        most = MOST_CANCEL_BYTES if code == CANCEL_REQUEST else MOST_STARTUP_BYTES
        if not _PACKET_BYTES <= length <= most:
            raise Malformed(f"a start-up packet has {length} bytes")
        if code == CANCEL_REQUEST:
            self._hide(data, self._client_at + 12, self._client_at + length, "cancel-key")
        if len(self._client) < length:
            return False
        if code in (SSL_REQUEST, GSSENC_REQUEST) and length != _PACKET_BYTES:
            raise Malformed("an encryption request has 8 bytes")
        if code == SSL_REQUEST:
            self._ask_ssl()
        elif code == GSSENC_REQUEST:
            self._refuse_gss()
        elif code == CANCEL_REQUEST:
            self._cancel(bytes(self._client[:length]))
        elif code >> 16 == 3:
            self._start(bytes(self._client[:length]), code)
        else:
            raise Malformed(f"protocol {code >> 16}.{code & 0xFFFF} is not PostgreSQL 3")
        return True

    def _ask_ssl(self) -> None:
        if self._ssl_refused or self._tls:
            raise Malformed("SSLRequest came twice")
        if self._facts.opens_tls and self._facts.plain_upstream:
            self._answer_ssl()
            return
        self._pass_client(_PACKET_BYTES)
        self.phase = Phase.ASKED

    def _answer_ssl(self) -> None:
        """Answer S in the server's place, which is spoken to in the clear."""
        self._out.append(Audit(Withheld("client", self._client_at, _PACKET_BYTES, "tls")))
        self._out.append(Forward(CLIENT, b"S", Origin.SYNTHESISED))
        del self._client[:_PACKET_BYTES]
        self._client_at += _PACKET_BYTES
        if self._client:
            raise Malformed("bytes came together with SSLRequest")
        self._tls = True
        self._out.append(StartTls(both=False))

    def _refuse_gss(self) -> None:
        """Answer N in the server's place: a session that goes to GSS encryption is not readable."""
        if self._gss_refused:
            raise Malformed("GSSENCRequest came twice")
        self._gss_refused = True
        self._out.append(Audit(Withheld("client", self._client_at, _PACKET_BYTES, "gssenc")))
        self._out.append(Forward(CLIENT, b"N", Origin.SYNTHESISED))
        del self._client[:_PACKET_BYTES]
        self._client_at += _PACKET_BYTES

    def _cancel(self, packet: bytes) -> None:
        self._out.extend(pggreeting.cancel(packet, self._client_at, self._facts))
        self._pass_client(len(packet))
        self.phase = Phase.CANCELLED

    def _start(self, packet: bytes, code: int) -> None:
        fields = pggreeting.startup(packet, code)
        self._fact("startup", fields)
        mode = fields["parameters"].get("replication", "").lower()
        self.replication = mode in ("database", "true", "on", "yes", "1")
        self._pass_client(len(packet))
        self.phase = Phase.STARTED

    def _answers(self, data: Data) -> None:
        """Forward authentication messages; anything else waits until the server is ready."""
        client = self._client
        while len(client) >= _HEADER_BYTES:
            kind, length = _HEADER(client, 0)
            if kind == _TERMINATE and length == 4:
                self._pass_client(_HEADER_BYTES)
                continue
            if kind != _PASSWORD:
                if not self.authenticated:
                    raise Malformed(f"a message of type {kind} came before authentication")
                return
            if self.authenticated or not 4 <= length <= MOST_MESSAGE_BYTES:
                raise Malformed("an authentication message came that nobody asked for")
            end = 1 + length
            at = self._client_at
            self._hide(data, at + _HEADER_BYTES, at + end, self._secret)
            if len(client) < end:
                return
            body = bytes(client[_HEADER_BYTES:end])
            first = self._method == "sasl" and not self._mechanism
            if first and self._unbound and pgbinding.binds(body):
                self._refuse_binding()
                return
            self._name_mechanism(body)
            self._pass_client(end)

    def _refuse_binding(self) -> None:
        self._out.extend(self.withhold("channel-binding"))
        self._out.extend(pgbinding.refusal(self._facts.session))
        self.phase = Phase.REFUSED

    @property
    def _secret(self) -> str:
        return {"sasl": "sasl", "gss": "gss", "sspi": "gss"}.get(self._method, "password")

    def _name_mechanism(self, body: bytes) -> None:
        """Keep the name that the first SASL message begins with."""
        if self._method == "sasl" and not self._mechanism:
            self._mechanism = text_of(body[: max(body.find(0), 0)][:64]) or "unknown"

    def _pass_client(self, length: int) -> None:
        self._out.append(Forward(UPSTREAM, bytes(self._client[:length])))
        del self._client[:length]
        self._client_at += length

    # -- the server

    def _from_server(self, data: Data) -> None:
        if self.phase is Phase.ASKED and not self._ssl_answer():
            return
        if self.phase in (Phase.OPEN, Phase.CANCELLED):
            raise Malformed("the server spoke out of turn")
        server = self._server
        while self.phase is Phase.STARTED and len(server) >= _HEADER_BYTES:
            kind, length = _HEADER(server, 0)
            if not 4 <= length <= MOST_MESSAGE_BYTES:
                raise Malformed(f"a message of type {kind} has {length} bytes")
            end = 1 + length
            for start, secret in pggreeting.secrets(server):
                at = self._server_at
                self._hide(data, at + start, at + end, secret)
            if len(server) < end:
                return
            self._server_message(kind, bytes(server[_HEADER_BYTES:end]))
            offered = pgbinding.without(bytes(server[:end])) if self._unbound else None
            if offered is None:
                self._pass_server(end)
            else:
                self._replace_server(end, offered)

    def _ssl_answer(self) -> bool:
        """Handle the byte that answers SSLRequest; False when the session is TLS from here on."""
        answer = self._server[0]
        if answer == ord("N"):
            self._pass_server(1)
            self._ssl_refused = True
            self.phase = Phase.OPEN
            if self._server:
                raise Malformed("the server spoke out of turn")
            return False
        if answer == ord("S"):
            if len(self._server) > 1:
                raise Malformed("bytes came together with the answer to SSLRequest")
            if self._facts.opens_tls:
                self._pass_server(1)
                self._out.append(StartTls(both=True))
                self._tls = True
                self.phase = Phase.OPEN
                return False
            self._fact("undecoded", {"why": "tls", "secrets": "unparsed"})
            self._pass_server(1)
            self._passing = Passing()
            self.phase = Phase.SEALED
            return False
        if answer != ord("E"):
            raise Malformed("SSLRequest is answered by one letter")
        self.phase = Phase.STARTED
        return True

    def _server_message(self, kind: int, body: bytes) -> None:
        """Note what one message says; it is forwarded after."""
        if kind == ord("R"):
            self._authentication(body)
        elif kind == ord("S"):
            name, value = pgmessages.strings(body, 0, 2)
            self.parameters[name] = value
        elif kind == ord("K"):
            if not 8 <= len(body) <= 4 + 256:
                raise Malformed("a cancel key has 4 to 256 bytes")
            (pid,) = _INT4(body, 0)
            self._fact("backend-key", {"pid": pid, "key_digest": self._facts.digest(body[4:])})
        elif kind in (ord("E"), ord("N")):
            fields = pgmessages.error_fields(body)
            sqlstate, message = fields.get("C", ""), fields.get("M", "")
            name = "error" if kind == ord("E") else "notice"
            self._fact(name, {"sqlstate": sqlstate, "message": message, **told(fields)})
        elif kind == ord("v"):
            self._fact("negotiate", pggreeting.negotiated(body))
        elif kind == ord("Z"):
            self._fact("parameter", dict(self.parameters))
            self.phase = Phase.READY
        else:
            raise Malformed(f"a message of type {kind} came before the server was ready")

    def _authentication(self, body: bytes) -> None:
        if len(body) < 4:
            raise Malformed("an authentication request has a code")
        (code,) = _INT4(body, 0)
        if code:
            self._method = _METHODS.get(code, self._method)
            return
        fields: dict[str, Any] = {"method": self._method}
        if self._mechanism:
            fields["mechanism"] = self._mechanism
        self._fact("authentication", fields)
        self.authenticated = True

    def _replace_server(self, length: int, by: bytes) -> None:
        self._out.append(Audit(Withheld("upstream", self._server_at, length, "channel-binding")))
        self._out.append(Forward(CLIENT, by, Origin.SYNTHESISED))
        del self._server[:length]
        self._server_at += length

    def _pass_server(self, length: int) -> None:
        self._out.append(Forward(CLIENT, bytes(self._server[:length])))
        del self._server[:length]
        self._server_at += length

    # -- ends

    @property
    def listening(self) -> bool:
        """Say whether the client understands an ErrorResponse now."""
        return self.phase in (Phase.OPEN, Phase.ASKED, Phase.STARTED)

    def finish(self, event: Eof) -> list[Effect]:
        """A side ended. That is also the only answer to a cancel request."""
        out: list[Effect] = []
        if self.phase is Phase.REFUSED:
            return out
        if event.side is CLIENT or event.reset:
            out = self.withhold("reset" if event.reset else "incomplete")
        if self.phase is Phase.CANCELLED and event.side is UPSTREAM:
            out.append(Audit(Result(1, "cut" if event.reset else "ok")))
            self.phase = Phase.SEALED
        return out

    def withhold(self, why: str) -> list[Effect]:
        """Return the records of what was received and will not be forwarded."""
        out: list[Effect] = []
        for side in (CLIENT, UPSTREAM):
            at, kept = self.held(side)
            if kept:
                out.append(Audit(Withheld(side.value, at, len(kept), why)))
        self._client.clear()
        self._server.clear()
        return out
