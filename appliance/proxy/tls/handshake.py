"""One session's TLS handshakes: the client's offer, the server's answer, then ours to the client.

The session driver hands its sockets' events here until both legs are up. Theory of operation:

    WAITING   the client's ClientHello is collected, and recorded; nothing has left for the server
    UPSTREAM  the gate does the server's handshake with the client's server name and protocols
    CLIENT    the client's handshake, with what the server chose and a certificate for the same name
    OVER      the session goes on with two streams of plaintext, or was closed

What fails ends the session: the client gets a TLS alert, and a Tls record says what and why.
"""

from __future__ import annotations

import contextlib
import errno
import ssl
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING

from appliance.proxy.tls.authority import names_of
from appliance.proxy.tls.stream import TlsStream
from appliance.proxy.tls.terminator import UpstreamObject
from appliance.sansio import CLIENT, UPSTREAM, Side
from appliance.wire import clienthello
from appliance.wire.tlscertificates import described
from appliance.wire.tlsrecords import NotTls
from capture.records import Tls

if TYPE_CHECKING:
    import socket

    from appliance.proxy.direction import Direction
    from appliance.proxy.session import Session
    from appliance.wire.clienthello import ClientHello

TIMER = "gate: tls"
_BAD_CERTIFICATE, _HANDSHAKE_FAILURE, _DECODE_ERROR = 42, 40, 50
_PREFERRED = ("postgresql", "http/1.1")  #: where TLS ends at the gate and no server chooses
#: Alerts of a server that its client gets as they are, by OpenSSL's name.
_ALERTS = {
    "SSLV3_ALERT_HANDSHAKE_FAILURE": 40, "TLSV1_ALERT_PROTOCOL_VERSION": 70,
    "TLSV1_ALERT_INSUFFICIENT_SECURITY": 71, "TLSV1_ALERT_INTERNAL_ERROR": 80,
    "TLSV1_UNRECOGNIZED_NAME": 112, "TLSV1_ALERT_ACCESS_DENIED": 49,
    "TLSV1_ALERT_NO_APPLICATION_PROTOCOL": 120,
}  # fmt: skip


class Stage(Enum):
    """See the module's table."""

    WAITING = "waiting"
    UPSTREAM = "upstream"
    CLIENT = "client"
    OVER = "over"


class Handshake:
    """Drives both handshakes of a session. `due` means that only TLS may come (StartTls)."""

    __slots__ = ("_due", "_far", "_far_tls", "_near", "_told", "first", "session", "stage")

    def __init__(self, session: Session, first: bytes, *, due: bool) -> None:
        self.session = session
        self.first = first  #: what the client sent, until its ClientHello is whole
        self.stage = Stage.WAITING
        self._due = due
        self._near: TlsStream | None = None
        self._far: TlsStream | None = None
        self._far_tls: UpstreamObject | None = None
        self._told = Tls("hello", "intercept")
        session.set_timer(TIMER, session.worker.config.gate.connect_timeout_s, self._late)

    @property
    def side(self) -> Side:
        """Return whose bytes are waited for."""
        return UPSTREAM if self.stage is Stage.UPSTREAM else CLIENT

    def moved(self, direction: Direction) -> None:
        """Bytes came from a side, or there is room to send to it."""
        if direction.side is not self.side:
            return
        if self.stage is not Stage.WAITING:
            self.step()
        elif data := direction.receive_private():
            self.first += data
            self.step()

    def step(self) -> None:
        """Go on as far as what has come allows."""
        if self.stage is Stage.WAITING and not self._hello():
            return
        if self.stage is Stage.UPSTREAM and not self._shaken(self._far, self.session.down):
            return
        if self.stage is Stage.UPSTREAM:
            self._answered()
        if self.stage is Stage.CLIENT and self._shaken(self._near, self.session.up):
            self._established()

    # -- the client's offer

    def _hello(self) -> bool:
        """Say whether the ClientHello is there and the handshake goes on."""
        if not self._due and not clienthello.may_begin(self.first):
            self.stage = Stage.OVER
            self._give_back()
            return False
        try:
            hello = clienthello.parse(self.first)
        except NotTls as wrong:
            self._fail("client", f"no ClientHello: {wrong}", _DECODE_ERROR)
            return False
        if hello is None:
            return False
        self._told = clienthello.offer(hello, "intercept")
        self.session.record(self._told)
        try:
            self._begin(hello)
        except (OSError, ValueError) as wrong:  # a name that OpenSSL does not take, for example
            self._fail("gate", f"the handshake cannot begin: {wrong}", _HANDSHAKE_FAILURE)
            return False
        return True

    def _begin(self, hello: ClientHello) -> None:
        session = self.session
        if session.route.tls_upstream == "plain":
            self._answer(next((x for x in _PREFERRED if x in self._told.alpn_offered), ""), ())
            return
        # A private authority is trusted for any name where the client gave none; the machine's
        # authorities would sign anybody's name, so then the address must be in the certificate.
        named = bool(hello.sni) or session.route.tls_verify == "system"
        alpn = tuple(each.decode("ascii") for each in hello.alpn if each.isascii())
        context = session.worker.tls.upstream(session.route, alpn, named=named)
        name = hello.sni or (session.target[0] if named else None)
        self._far, tls = self._stream(session.down.source, context, name)
        assert isinstance(tls, UpstreamObject)
        self._far_tls = tls
        self.stage = Stage.UPSTREAM
        session.interest()

    def _stream(
        self, raw: socket.SocketType | TlsStream, context: ssl.SSLContext, name: str | None,
        *, server: bool = False,
    ) -> tuple[TlsStream, ssl.SSLObject]:  # fmt: skip
        assert not isinstance(raw, TlsStream)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_side=server, server_hostname=name)
        scratch = self.session.worker.tls.scratch
        return TlsStream(raw, tls, incoming, outgoing, scratch), tls

    # -- the handshakes

    def _shaken(self, stream: TlsStream | None, direction: Direction) -> bool:
        """Go on with one leg; say whether it is done."""
        assert stream is not None
        try:
            done = stream.handshake()
        except (ssl.SSLError, OSError) as wrong:
            self._broke(direction.side, wrong)
            return False
        if direction.back.writing is not stream.unsent:
            direction.back.writing = stream.unsent
            direction.watch()
        return done and not stream.unsent

    def _answered(self) -> None:
        """The server's leg is up: answer the client."""
        tls = self._far_tls
        assert tls is not None
        cipher = tls.cipher()
        chain = tls.certificates
        route = self.session.route
        self._told = replace(
            self._told, alpn=tls.selected_alpn_protocol() or "",
            upstream_version=tls.version() or "", upstream_cipher=cipher[0] if cipher else "",
            chain=described(chain), verified=route.tls_verify,
            certificate_asked=tls.certificate_asked,
        )  # fmt: skip
        tls.context = self.session.worker.tls.quiet
        names = names_of(chain[0]) if chain else ()
        try:
            self._answer(self._told.alpn, names)
        except (OSError, ValueError) as wrong:
            self._fail("gate", f"no certificate can be made: {wrong}", _HANDSHAKE_FAILURE)

    def _answer(self, alpn: str, names: tuple[str, ...]) -> None:
        session = self.session
        if self._told.sni:
            names = (self._told.sni,)
        names = names or (session.target[0],)
        leaf = session.worker.tls.presented(session.route, names, session.worker.now())
        context = session.worker.tls.client(leaf, alpn)
        self._near, _ = self._stream(session.up.source, context, None, server=True)
        self._near.feed(self.first)
        self._told = replace(self._told, alpn=alpn, presented=leaf.sha256)
        self.stage = Stage.CLIENT
        session.interest()

    def _established(self) -> None:
        near, far, session = self._near, self._far, self.session
        assert near is not None
        cipher = near.cipher()
        self.stage = Stage.OVER
        session.record(
            replace(
                self._told, stage="established", client_version=near.version(),
                client_cipher=cipher,
            )
        )  # fmt: skip
        self._install(near, far)

    def _install(self, near: TlsStream, far: TlsStream | None) -> None:
        """From here on the session's sockets give and take plaintext."""
        session = self.session
        self._leave()
        session.up.take_tls(near)
        if far is not None:
            session.down.take_tls(far)
            near.other, far.other = far, near
        session.interest()
        session.up.again()  # plaintext may have come with the end of the handshake
        session.down.again()

    def _give_back(self) -> None:
        """It is no TLS: detection goes on with what came."""
        self._leave()
        self.session.prefix = self.first
        self.session.detect()
        self.session.interest()

    def _leave(self) -> None:
        self.session.handshake = None
        self.session.drop_timer(TIMER)

    # -- failures

    def ended(self, side: str, why: str = "") -> None:
        """A side is gone, or the gate gave up, before the handshake was over."""
        if self.stage is not Stage.OVER:
            self._fail(side, why or f"the {side} ended during the handshake", 0)

    def told_of_end(self, reason: str, by: str) -> None:
        """The session is being closed: record that TLS did not come about."""
        if self.stage is not Stage.OVER:
            self.stage = Stage.OVER
            self._record(by, f"the session ended during the handshake: {reason}")

    def _late(self) -> None:
        waited_for = self.side.value
        self._fail(waited_for, "the handshake took too long", _HANDSHAKE_FAILURE)

    def _broke(self, side: Side, wrong: OSError) -> None:
        if isinstance(wrong, ssl.SSLCertVerificationError):
            why = f"the upstream's certificate is not accepted: {wrong.verify_message}"
            self._fail("gate", why, _BAD_CERTIFICATE)
            return
        reason = str(getattr(wrong, "reason", "") or "")
        why = reason.lower().replace("_", " ")
        if isinstance(wrong, ssl.SSLEOFError | ConnectionError) or not reason:
            why = f"the {side.value} ended during the handshake"
        if side is UPSTREAM and self._far_tls is not None and self._far_tls.certificate_asked:
            why += "; it asked for a client certificate, which needs tls = passthrough"
        self._fail(side.value, why, _ALERTS.get(reason, _HANDSHAKE_FAILURE))

    def _fail(self, by: str, why: str, alert: int) -> None:
        """Record it, tell the client, close. An alert of OpenSSL's own has been sent already."""
        if self.stage is Stage.OVER:
            return
        self.stage = Stage.OVER
        self._record(by, why)
        session = self.session
        if alert and self._near is None and self.first:
            assert not isinstance(session.up.source, TlsStream)
            with contextlib.suppress(OSError):
                session.up.source.send(b"\x15\x03\x03\x00\x02\x02" + bytes([alert]))
        session.reason = why
        session.close("tls", by)

    def _record(self, by: str, why: str) -> None:
        told = replace(self._told, stage="failed", by=by, why=why)
        tls = self._far_tls
        if tls is not None and not told.chain:
            told = replace(
                told, chain=described(tls.certificates), certificate_asked=tls.certificate_asked,
                verified="no" if by == "gate" else "",
            )  # fmt: skip
        self.session.record(told)


def begin(session: Session, first: bytes, *, due: bool) -> None:
    """Open TLS from here on; `first` is what came of the ClientHello. See `Handshake` for `due`."""
    if not due:
        session.prefix = b""
    session.handshake = Handshake(session, first, due=due)
    if first:
        session.handshake.step()
    session.interest()


def broken_later(session: Session, direction: Direction, failed: int) -> None:
    """Record that an established leg broke: by a bad record, or an alert of its peer. A TLS 1.3
    server that demands a client certificate says so only now. `failed` is the errno.
    """
    if direction.stream is not None and failed == errno.EPROTO:
        why = direction.stream.failure
        session.record(Tls("failed", "intercept", by=direction.side.value, why=why))
