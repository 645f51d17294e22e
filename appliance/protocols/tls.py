"""TLS that nobody opens: relayed and recorded as it is; what the handshake shows is decoded.

The session driver calls it for sessions that begin with a ClientHello where the route passes TLS
through, and for TLS inside TLS. It cannot hide credentials: whoever has the keys may find them in
the recorded bytes, and the `Detected` record says so. docs/protocols/tls.md says what is covered.
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
    Event,
    Facts,
    Forward,
    Layer,
    Origin,
    Side,
)
from appliance.wire import clienthello
from appliance.wire.tlspassing import Passing, passed
from appliance.wire.tlsrecords import NotTls

#: Alert "access denied", fatal (RFC 8446, section 6).
_REFUSAL = b"\x15\x03\x03\x00\x02\x02\x31"


class PassedTls:
    """One session."""

    __slots__ = ("_answered", "_held", "_passing")

    def __init__(self) -> None:
        self._passing = Passing()
        self._answered = False
        self._held = b""

    def handle(self, event: Event) -> list[Effect]:
        """Pass bytes on, after the records of what they say."""
        if not isinstance(event, Data):
            return []
        if event.side is CLIENT:
            self._held = bytes(event.data)
            said = self._passing.feed(CLIENT, event.data)
            self._held = b""
            return [*said, *passed(event)]
        self._answered = True
        return self._passing.feed(UPSTREAM, event.data)

    def refuse(self, message: str) -> list[Effect]:
        """Send an alert, unless the server has said something already; end both sides."""
        out: list[Effect] = []
        if not self._answered:
            out.append(Forward(CLIENT, _REFUSAL, Origin.SYNTHESISED))
        return [*out, Close(CLIENT, message), Close(UPSTREAM, message)]

    def held(self, side: Side) -> bytes:
        """Return what the client just sent, should that have been too much for this layer."""
        return self._held if side is CLIENT else b""

    @property
    def reading(self) -> frozenset[Side]:
        """Both sides, always."""
        return BOTH

    @property
    def sensitive(self) -> frozenset[Side]:
        """Neither."""
        return NEITHER

    @property
    def passive(self) -> frozenset[Side]:
        """The server: what it says is read after it has passed."""
        return ONLY_UPSTREAM


class TlsProtocol:
    """What `discover` finds."""

    name = "tls"
    ports = frozenset({443, 465, 636, 853, 989, 990, 993, 995, 5671, 6443, 6514, 8443, 8883, 9093})
    speaks_first = CLIENT
    waits = True

    def probe(self, prefix: bytes) -> Answer:
        """Claim what begins with a whole ClientHello."""
        if not clienthello.may_begin(prefix):
            return Answer.NO
        try:
            hello = clienthello.parse(prefix)
        except NotTls:
            return Answer.NO
        return Answer.MORE if hello is None else Answer.YES

    def layer(self, facts: Facts) -> Layer:
        """Return a fresh layer; it needs no facts."""
        del facts
        return PassedTls()


PROTOCOL = TlsProtocol()
