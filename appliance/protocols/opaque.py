"""opaque: any protocol that no other file knows, relayed and recorded whole in both directions.

The driver chooses it; `probe` never claims a session. It cannot hide credentials: its `Detected`
record says so.
"""

from __future__ import annotations

from appliance.sansio import (
    BOTH,
    CLIENT,
    FOREVER,
    NEITHER,
    UPSTREAM,
    Answer,
    Close,
    Data,
    Effect,
    Event,
    Facts,
    Forward,
    Layer,
    Relay,
    Side,
)


class Opaque:
    """Forwards what it is given and asks for no more."""

    __slots__ = ()

    def handle(self, event: Event) -> list[Effect]:
        """Pass the bytes on; from then on the driver relays both sides."""
        if isinstance(event, Data):
            to = UPSTREAM if event.side is CLIENT else CLIENT
            return [Forward(to, event.data), Relay(CLIENT, FOREVER), Relay(UPSTREAM, FOREVER)]
        return []

    def refuse(self, message: str) -> list[Effect]:
        """End both sides: an unknown protocol has no native error."""
        return [Close(CLIENT, message), Close(UPSTREAM, message)]

    def held(self, side: Side) -> bytes:
        """Nothing is ever held."""
        del side
        return b""

    @property
    def reading(self) -> frozenset[Side]:
        """Both sides, always."""
        return BOTH

    @property
    def sensitive(self) -> frozenset[Side]:
        """Neither: nothing is known of the bytes."""
        return NEITHER

    @property
    def passive(self) -> frozenset[Side]:
        """Neither: the first bytes tell the driver to relay."""
        return NEITHER


class OpaqueProtocol:
    """What `discover` finds."""

    name = "opaque"
    ports: frozenset[int] = frozenset()
    speaks_first = CLIENT
    waits = False

    def probe(self, prefix: bytes) -> Answer:
        """Never claim a session: the driver falls back to this layer."""
        del prefix
        return Answer.NO

    def layer(self, facts: Facts) -> Layer:
        """Return a layer; it needs no facts."""
        del facts
        return Opaque()


PROTOCOL = OpaqueProtocol()
