"""The protocol-layer interface: one layer object per session, fed events, answering with effects.

The session driver (`appliance.proxy.session`) calls it; protocols in `appliance.protocols`
implement it. Nothing here, and no layer, blocks or does I/O; a layer raises only `ProtocolError`.

How the driver treats a layer:

* it runs an effect list to its end before the next event;
* what is received is in the evidence before the layer sees it, except while `sensitive` names the
  side: then the bytes stay in private memory, the layer names the secret ranges with `Hide` in the
  same list, and the driver records the bytes with those ranges blanked before it executes any
  `Forward`;
* bytes of a side in `passive` are forwarded unchanged before `handle` is called: the layer then
  only decodes (its list holds no `Forward` for them);
* `Relay` ends the layer's interest in a side's bytes for `length` bytes (or for good): they pass
  without `handle`.

Events and effects are named tuples, not dataclasses: they are made several times per message on the
hot path, and a frozen dataclass costs three times as much to build.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple
from typing import Protocol as Interface

from appliance.config import Http

if TYPE_CHECKING:
    from collections.abc import Callable

    from capture.records import Record

FOREVER = -1


class Side(Enum):
    """Who sent the bytes, or who is to get them."""

    CLIENT = "client"
    UPSTREAM = "upstream"

    #: Members are singletons; Enum's own hash is a Python call, made on every event.
    __hash__ = object.__hash__


CLIENT = Side.CLIENT
UPSTREAM = Side.UPSTREAM
NEITHER: frozenset[Side] = frozenset()
BOTH: frozenset[Side] = frozenset(Side)
ONLY_CLIENT: frozenset[Side] = frozenset({Side.CLIENT})
ONLY_UPSTREAM: frozenset[Side] = frozenset({Side.UPSTREAM})


class Origin(Enum):
    """What the evidence says of bytes put on a wire."""

    RELAYED = "relayed"
    MASKED = "masked"
    INJECTED = "injected"
    SYNTHESISED = "synthesised"


class Answer(Enum):
    """What `Protocol.probe` says of the first bytes of a client."""

    NO = "no"
    MORE = "more"
    YES = "yes"


class ProtocolError(Exception):
    """The peer on `side` broke the protocol: the session is refused natively and closed.

    `done` is what the layer had decided about the bytes before the broken ones; the driver runs it
    first, so that the outcome does not depend on how the bytes were cut into pieces.
    """

    def __init__(self, side: Side, message: str, done: list[Effect] | None = None) -> None:
        super().__init__(message)
        self.side = side
        self.done: list[Effect] = done or []


class Data(NamedTuple):
    """Bytes arrived from `side`; valid only during the call. `offset` counts that side's
    half-stream from 0.
    """

    side: Side
    data: memoryview | bytes
    offset: int
    time_ns: int


class Eof(NamedTuple):
    """`side` will send no more; `reset` when it aborted. `offset` is how much it sent in all."""

    side: Side
    reset: bool
    offset: int = 0


class Elapsed(NamedTuple):
    """The timer that the layer set went off."""

    timer: str


class Forward(NamedTuple):
    """Send `data` to side `to`.

    RELAYED: the very bytes that came from the other side, in order (they are in the evidence
    already). SYNTHESISED or MASKED: recorded as bytes of the gate's own before they leave.
    """

    to: Side
    data: memoryview | bytes
    origin: Origin = Origin.RELAYED


class Audit(NamedTuple):
    """Write `record` now, before the effects that follow."""

    record: Record


class Hide(NamedTuple):
    """Blank `length` bytes of `side`'s half-stream from `offset`: only of the Data being
    handled.
    """

    side: Side
    offset: int
    length: int
    kind: str


class SetTimer(NamedTuple):
    """Send `Elapsed(timer)` after `seconds`, once; setting it again replaces it."""

    timer: str
    seconds: float


class Relay(NamedTuple):
    """Pass the next `length` bytes from `from_side` without `handle`; FOREVER for the rest of the
    session.
    """

    from_side: Side
    length: int


class Close(NamedTuple):
    """Send what is queued for `side`, then end that direction; when both are ended the session
    closes.
    """

    side: Side
    reason: str


class StartTls(NamedTuple):
    """TLS begins after what was forwarded so far: the client's next bytes are its ClientHello, and
    events go on with plaintext. With `both` the server waits for one, too; otherwise only the
    client's side is TLS. Only where `Facts.opens_tls` says so.
    """

    both: bool


Event = Data | Eof | Elapsed
Effect = Forward | Audit | Hide | SetTimer | Relay | Close | StartTls


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a session when its layer is made."""

    session: int
    client: tuple[str, int]
    target: tuple[str, int]  #: original destination
    digest: Callable[[bytes], str]  #: keyed digest (HMAC) of bytes that must not be shown
    http: Http = field(default_factory=Http)  #: what is secret in HTTP besides the usual
    opens_tls: bool = False  #: StartTls works here
    in_tls: bool = False  #: the session is in TLS already, which the gate opened
    plain_upstream: bool = False  #: the server's side is in the clear where the client's is TLS
    same_certificate: bool = False  #: the client is shown the server's own certificate


class Layer(Interface):
    """One session's protocol state."""

    def handle(self, event: Event) -> list[Effect]:
        """Return what the driver is to do, in order. Raises ProtocolError."""
        ...

    def refuse(self, message: str) -> list[Effect]:
        """Return the native error for a cause outside the layer (kill, upstream down, evidence
        unavailable).
        """
        ...

    def held(self, side: Side) -> bytes | None:
        """Return what `side` sent that the layer was given and has not forwarded; after `handle`
        failed, the bytes of that event are part of it. The driver sends them itself when it goes
        on without the layer.

        None says that the layer refused what `side` said, and that nothing more of it may pass: the
        driver cannot go on without the layer.
        """
        ...

    @property
    def reading(self) -> frozenset[Side]:
        """The sides whose bytes the layer can take now: the only backpressure there is."""
        ...

    @property
    def sensitive(self) -> frozenset[Side]:
        """The sides whose next bytes may hold credentials."""
        ...

    @property
    def passive(self) -> frozenset[Side]:
        """The sides whose bytes are forwarded before the layer decodes them."""
        ...


class Protocol(Interface):
    """What a file in `appliance/protocols` offers as `PROTOCOL`."""

    name: str
    ports: frozenset[int]  #: usual ports: a hint, never proof
    speaks_first: Side
    #: whether, on its usual ports, silence inside what may be its first message means nothing: for
    #: protocols whose first bytes are hardly another's
    waits: bool

    def probe(self, prefix: bytes) -> Answer:
        """Say whether the client's first bytes are this protocol's."""
        ...

    def layer(self, facts: Facts) -> Layer:
        """Return a fresh layer for one session."""
        ...
