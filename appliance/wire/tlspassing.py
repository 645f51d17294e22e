"""TLS that passes unopened: what both sides say of it in the clear becomes Tls records.

The `tls` protocol uses it, and others after they sent a session to TLS. It only looks: bytes are
forwarded by who feeds it, and what is no TLS loses meaning, nothing else.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from appliance.sansio import CLIENT, FOREVER, UPSTREAM, Audit, Data, Effect, Forward, Relay, Side
from appliance.wire import clienthello, tlsanswer, tlscertificates
from appliance.wire.tlsrecords import (
    CERTIFICATE,
    CERTIFICATE_REQUEST,
    SERVER_HELLO,
    SERVER_HELLO_DONE,
    Handshakes,
    NotTls,
    certificates,
)
from capture.records import Tls

if TYPE_CHECKING:
    from appliance.wire.tlsanswer import ServerHello


class Passing:
    """Reads the client's ClientHello, then the server's answer, each until it says no more."""

    __slots__ = ("_answer", "_asked", "_chain", "_hello", "_server", "_told", "done")

    def __init__(self) -> None:
        self._hello = b""  #: what came of the ClientHello
        self._server = Handshakes()
        self._told = Tls("hello", "passthrough")
        self._answer: ServerHello | None = None
        self._chain: tuple[bytes, ...] = ()
        self._asked = False
        self.done: frozenset[Side] = frozenset()  #: sides of which nothing more is wanted

    def feed(self, side: Side, data: bytes | memoryview) -> list[Effect]:
        """Return records, and Relay for a side whose bytes are not wanted any more."""
        if side in self.done:
            return []
        try:
            return self._client(data) if side is CLIENT else self._upstream(data)
        except NotTls:
            return [self._leave(side)]

    def _leave(self, side: Side) -> Effect:
        self.done |= {side}
        return Relay(side, FOREVER)

    def _client(self, data: bytes | memoryview) -> list[Effect]:
        self._hello += bytes(data)
        hello = clienthello.parse(self._hello)
        if hello is None:
            return []
        self._hello = b""
        self._told = clienthello.offer(hello, "passthrough")
        return [Audit(self._told), self._leave(CLIENT)]

    def _upstream(self, data: bytes | memoryview) -> list[Effect]:
        for kind, body in self._server.feed(data):
            if kind == SERVER_HELLO:
                self._answer = tlsanswer.server_hello(body)
            elif kind == CERTIFICATE:
                self._chain = certificates(body, thirteen=False)
            elif kind == CERTIFICATE_REQUEST:
                self._asked = True
            if kind == SERVER_HELLO_DONE or (self._answer and self._answer.encrypted):
                return self._answered()
        return self._answered() if self._server.closed else []

    def _answered(self) -> list[Effect]:
        """The server says no more in the clear, or refused."""
        refused, self._server = self._server.alert, Handshakes()
        leave = self._leave(UPSTREAM)
        answer = self._answer
        if answer is None:
            why = tlsanswer.alert(refused) if refused else "the answer is no ServerHello"
            failed = replace(self._told, stage="failed", by="upstream", why=why)
            return [Audit(failed), leave]
        told = replace(
            self._told, stage="answered", alpn=answer.alpn, client_version=answer.version,
            client_cipher=answer.cipher, upstream_version=answer.version,
            upstream_cipher=answer.cipher, chain=tlscertificates.described(self._chain),
            certificate_asked=self._asked,
        )  # fmt: skip
        return [Audit(told), leave]


def passed(data: Data) -> list[Effect]:
    """Return what sends bytes on as they are."""
    to = UPSTREAM if data.side is CLIENT else CLIENT
    return [Forward(to, bytes(data.data))]
