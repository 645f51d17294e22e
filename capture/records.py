"""Every record type of the evidence, as dataclasses: the field docs are the format's
specification.

The gate, the seal and the command line write these records through `capture.segment`; the index,
the reader and the exports read them. The payload of a record frame is the UTF-8 JSON object of the
fields below, nothing else; the frame's kind (`capture.frames.Kind`) says which type it is, and the
frame's header carries the session and the time. Times are integer nanoseconds, UTC, since the Unix
epoch. Text that came from a peer is decoded as UTF-8 with `backslashreplace`, and is never trusted
by a reader.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import orjson


@dataclass(frozen=True, slots=True)
class SessionOpen:
    """A TCP session was accepted. First frame of its session."""

    client: str  #: address of the client, textual
    client_port: int
    target: str  #: original destination of the client's connection
    target_port: int
    route: str  #: name of the route that matched
    durability: str  #: "write" or "fsync"
    source: str  #: "client" or "gate": whose address the upstream connection uses
    worker: int  #: number of the gate worker


@dataclass(frozen=True, slots=True)
class Attributed:
    """Who the session belongs to. Exactly one per session, before its first upstream byte.

    `account` is None exactly when `reason` is set: an unknown identity always says why.
    """

    account: str | None  #: name of the service account
    assurance: str  #: "kernel", "network" or "none"
    how: str  #: "syn" (verified SYN option), "event" (connect event), "network" (source), "none"
    #: no-sensor, no-owner, no-account, ambiguous, expired, forged, replayed, timeout
    reason: str | None = None
    candidates: tuple[str, ...] = ()  #: accounts that matched, when ambiguous or expired
    owner: dict[str, Any] | None = None  #: kernel facts, see docs/evidence-format.md "Owner"
    waited_ns: int = 0  #: time from accept to this answer


@dataclass(frozen=True, slots=True)
class Detected:
    """Which protocol layer took the session."""

    protocol: str  #: name of the protocol ("postgresql", "opaque", ...)
    reason: str = (
        ""  #: why, when it is not the layer's own probe: "silent", "no-probe-matched", ...
    )
    #: "unparsed": the layer knows no credentials, so that any are recorded; "" where it hides them
    secrets: str = ""


@dataclass(frozen=True, slots=True)
class Tls:
    """A session uses TLS: what both sides said in the clear, and what came of it.

    With "hello" it is written before anything of it leaves for the upstream, where the session
    begins with TLS; a second one says how it went on.
    """

    #: "hello" (what the client offers), "established", "failed", "answered" (passthrough: what the
    #: server's side shows)
    stage: str
    mode: str  #: "intercept" or "passthrough"
    sni: str = ""  #: server name that the client gave, lower case
    alpn_offered: tuple[str, ...] = ()
    versions_offered: tuple[str, ...] = ()  #: "TLSv1.3", ...
    ja4: str = ""  #: fingerprint of the ClientHello
    alpn: str = ""  #: application protocol that the server chose
    client_version: str = ""  #: of the connection that the client has
    client_cipher: str = ""
    upstream_version: str = ""  #: of the server's; where TLS passes it is the same one
    upstream_cipher: str = ""
    #: the server's certificates, its own first: {subject, issuer, names, not_after, sha256}
    chain: tuple[dict[str, Any], ...] = ()
    #: "system", "pinned" or "off": by what the chain was accepted; "no": it was not; "" not tried
    verified: str = ""
    presented: str = ""  #: SHA-256 of the certificate that the client was shown
    certificate_asked: bool = False  #: the server asked for a client certificate
    by: str = ""  #: "client", "upstream" or "gate": on whose side it failed
    why: str = ""  #: reason of a failure, in OpenSSL's words where they are


# Operation and Result are neither frozen nor slotted, the only ones: both are made for each
# statement. A frozen dataclass stores every field through object.__setattr__, which makes it four
# times as dear; orjson writes a slotted one half as fast as one with a __dict__ (0.9 against 0.42
# us, both to make and to write). They live for a moment, and nobody changes them.


@dataclass
class Operation:
    """One thing that the client asked for, in the protocol's own unit (a statement, a request)."""

    op: int  #: number within the session, from 1
    #: parsed verb in upper case ("SELECT"), a protocol word ("COPY", "CANCEL") or "unknown"
    verb: str
    text: str  #: the statement, at most 64 KiB; `truncated` says when it was longer
    offset: int  #: where its first byte stands in the client's half-stream
    length: int  #: bytes of the message(s) that carried it
    tables: tuple[str, ...] = ()  #: objects named, schema-qualified where the text is
    fingerprint: str = ""  #: of the statement with literals removed; "" when unknown
    binds: tuple[Any, ...] = ()  #: decoded parameter values; undecodable ones as {"hex": "..."}
    name: str = ""  #: prepared statement's name, when it has one
    kind: str = "simple"  #: protocol's way, see docs/protocols/: "simple", "cancel", ...
    verdict: str = "allowed"  #: "allowed" or "denied"
    truncated: bool = False


@dataclass
class Result:
    """How an operation ended."""

    op: int  #: the operation's number
    status: (
        str  #: "ok", "error", "cut" (connection ended first), "skipped" (discarded after an error)
    )
    tag: str = ""  #: the server's own word ("SELECT 3", "INSERT 0 1")
    rows: int = 0
    bytes: int = 0  #: response bytes that belong to it
    duration_ns: int = 0  #: from the operation's last byte to the result's last byte
    sqlstate: str = ""
    message: str = ""  #: the server's error text, at most 4 KiB
    columns: tuple[tuple[str, int], ...] = ()  #: (name, type id) of a row description
    tx: str = ""  #: transaction status after it: "I", "T", "E"
    detail: dict[str, Any] = field(default_factory=dict)  #: protocol's own facts


@dataclass(frozen=True, slots=True)
class Fact:
    """A protocol-level fact that is neither operation nor result; `kind` is listed in
    docs/protocols/.
    """

    #: "startup", "parameter", "notice", "notification", "backend-key", "cancel", "undecoded", ...
    kind: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Hidden:
    """Bytes that were blanked before they reached the evidence (credentials)."""

    side: str  #: "client" or "upstream": who sent them
    offset: int  #: in that side's half-stream
    length: int
    kind: str  #: "password", "sasl", "cancel-key"
    #: hex HMAC-SHA256 over place and bytes, first 16 bytes (`capture.crypt.Keys.hidden`); empty for
    #: fewer than 8 bytes
    digest: str


@dataclass(frozen=True, slots=True)
class Withheld:
    """Received bytes that were not passed on (answered by the gate, or refused)."""

    side: str  #: who sent them
    offset: int
    length: int
    why: str


@dataclass(frozen=True, slots=True)
class Gap:
    """Something was not recorded, or may not have been. There is no silent loss."""

    scope: str  #: "session", "worker", "route", "flow", "sensor"
    reason: str  #: "evidence-unavailable", "bypass", "emfile", "parser", "ring-overflow", ...
    since: int = 0  #: ns; 0 when not known
    until: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    packets: int = 0
    count: int = 0  #: events, sessions or connections, as the reason says
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Flow:
    """Traffic that is not TCP and that a route allowed, counted since the last record."""

    client: str
    protocol: str  #: "udp", "icmp", or the IP protocol's number
    port: int  #: destination port, 0 where the protocol has none
    packets: int
    bytes: int
    since: int
    until: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A connection that was not let through. `reference` is a number to ask for.

    Whose it was is told as in Attributed; `unknown` is that record's `reason`.
    """

    client: str
    client_port: int
    target: str
    target_port: int
    #: "own-address", "loopback", "link-local", "multicast", "mapped", "management", "no-route",
    #: "evidence", "quarantine"
    reason: str
    reference: str
    account: str | None = None
    assurance: str = "none"
    how: str = "none"
    unknown: str | None = None  #: why `account` is None
    owner: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something a person should look at now."""

    kind: str  #: "forged", "replayed", "ambiguous", ...
    detail: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Decision:
    """A person or program acted: on the session that it stands in, or on the gate."""

    #: "uid:0(root)": what the kernel says of the process that asked the gate, or that did it. For
    #: the review API "token:ID(NAME) peer:ADDRESS via uid:0(root)"; what is before "via" is the
    #: review process's word
    actor: str
    action: str  #: "kill", "redirect-apply", "redirect-undo", "token-create", "token-revoke"
    reason: str  #: as given; for the redirect, what was changed; for a token, id, role and name
    outcome: str  #: "done" or why not


@dataclass(frozen=True, slots=True)
class Access:
    """Somebody read evidence. Written before the answer is shown."""

    actor: str  #: as in Decision
    #: "list", "show", "export", "search", "verify", "reindex", "seal", "live", "checkpoint",
    #: "kill"
    action: str
    query: str  #: what was asked for, as given
    objects: tuple[str, ...] = ()  #: session ids
    outcome: str = "allowed"  #: or "denied" to a token's role, "not-found"


@dataclass(frozen=True, slots=True)
class SessionClose:
    """Last frame of a session."""

    #: "fin", "reset", "refused" (upstream refused), "timeout", "killed", "evidence", "protocol",
    #: ...
    reason: str
    by: str  #: "client", "upstream" or "gate"
    bytes_up: int  #: bytes received from the client
    bytes_down: int  #: bytes received from the upstream
    operations: int
    started: int  #: ns, time of the accept
    reference: str = ""  #: shown to the client, when the gate ended the session


@dataclass(frozen=True, slots=True)
class Start:
    """A process that writes evidence began; first frame of its first segment (session 0)."""

    role: str  #: "gate", "seal", "cli", "review"
    worker: int
    pid: int
    boot_id: str
    version: str
    config_sha256: str = ""
    kernel: str = ""


@dataclass(frozen=True, slots=True)
class Stop:
    """An orderly stop; last frame of the last segment of an incarnation."""

    reason: str


@dataclass(frozen=True, slots=True)
class Recovered:
    """A dead writer's evidence was completed by another process.

    Every session of `incarnation` that has no SessionClose was cut at this record's time.
    """

    incarnation: int
    segments: tuple[int, ...]  #: generations that were completed
    frames: int  #: frames moved from memory to disk
    bytes: int
    power_loss: bool = False  #: the boot's memory was gone: what was not committed is lost


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a worker saw, at a fixed pace: the answer to sessions that were never recorded."""

    worker: int
    open: int  #: sessions open now
    accepted: int  #: sessions accepted since start
    closed: int
    refused: int
    kernel_accepted: (
        int  #: connections that the kernel handed to this worker's listeners since start
    )
    listen_drops: int  #: kernel's own count of dropped SYNs and overflows in this network namespace
    sensor_lost: int  #: events that the sensor reported lost
    unsent_bytes: int = 0


Record = (
    SessionOpen
    | Attributed
    | Detected
    | Operation
    | Result
    | Fact
    | Hidden
    | Withheld
    | Gap
    | Flow
    | Refused
    | Alarm
    | Decision
    | Access
    | SessionClose
    | Start
    | Stop
    | Recovered
    | Heartbeat
    | Tls
)

#: Frame kind of each record type (docs/evidence-format.md). Numbers are never reused. 1 to 9 are
#: data frames.
KINDS: dict[type, int] = {
    SessionOpen: 16,
    Attributed: 17,
    Detected: 18,
    Operation: 19,
    Result: 20,
    Fact: 21,
    Hidden: 22,
    Withheld: 23,
    Gap: 24,
    Flow: 25,
    Refused: 26,
    Alarm: 27,
    Decision: 28,
    Access: 29,
    SessionClose: 30,
    Start: 31,
    Stop: 32,
    Recovered: 33,
    Heartbeat: 34,
    Tls: 35,
}
TYPES: dict[int, type] = {number: record for record, number in KINDS.items()}


def encode(record: Record) -> bytes:
    """Return the JSON payload of `record`."""
    return orjson.dumps(record)


def decode(kind: int, payload: bytes | memoryview) -> dict[str, Any]:
    """Return the fields of a record frame's payload, with its type's name under "record".

    Raises ValueError when the payload is no JSON object or the kind is unknown.
    """
    if kind not in TYPES:
        raise ValueError(f"unknown record kind {kind}")
    fields = orjson.loads(payload)
    if not isinstance(fields, dict):
        raise ValueError("a record's payload is a JSON object")  # noqa: TRY004 - what a reader catches
    fields["record"] = TYPES[kind].__name__
    return fields
