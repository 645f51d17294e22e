"""A session as the TCP packets that its client would have seen: what the pcapng export writes.

`capture.export.capturefile` reads `packets`; nothing is written here. The conversation is
synthetic: the gate ends both TCP connections, so that segments, acknowledgements and the handshake
of the wire are not in the evidence; bytes, their order, their times and their end are.

- What the client sent stands whole; what it received is what the upstream sent and the gate passed
  on, and the gate's own bytes, which a comment names. Bytes that the gate sent to the upstream on
  its own are not in it (`raw` has them).
- A sequence number less 1 is the place in that conversation. Bytes that were not recorded are a
  jump; hidden ones are zero and keep their place, so that a dissector reads on.
- Where the gate opened TLS, the decrypted stream is written as plain TCP. What was said in the
  clear before it (PostgreSQL's SSLRequest) is left out: a dissector would wait for TLS after it.

Memory: one frame, and the ranges that were withheld from the client.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from capture.export.identity import MOST_LETTERS, shown
from capture.frames import Kind
from capture.records import KINDS, Alarm, Decision, Gap, Hidden, SessionClose, Tls

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from capture.exchange import Record
    from capture.index_query import Session
    from capture.reader import Frame, Reader

MOST_BYTES = 65_495  #: of data in a packet: what IPv4's length field leaves
MOST_NOTES = 20  #: comments on one packet
_BEGINNING = 1  #: sequence number of a side's first byte
_HIDDEN, _CLOSE, _TLS = KINDS[Hidden], KINDS[SessionClose], KINDS[Tls]
_NOTED = {KINDS[kind] for kind in (Gap, Alarm, Decision)}
#: How a session ended that the client saw as a reset; else it saw FIN.
_RESETS = frozenset({"reset", "refused", "timeout", "unreachable", "descriptors", "evidence"})


@dataclass(frozen=True, slots=True)
class Packet:
    """One TCP packet. `flags` are letters: S, A, P, F, R."""

    time_ns: int
    from_client: bool
    flags: str
    sequence: int
    acknowledged: int
    data: bytes | memoryview = b""
    comments: tuple[str, ...] = ()


@dataclass(slots=True)
class Known:
    """What must be known of a session before its first byte is written."""

    tls: list[dict[str, Any]] = field(default_factory=list)  #: its Tls records
    withheld: list[tuple[int, int, str]] = field(default_factory=list)  #: (start, end, why)

    @property
    def opened(self) -> bool:
        """Say whether the gate opened TLS."""
        return any(map(_opens, self.tls))


def survey(records: Iterable[Record]) -> Known:
    """Read a session's records once."""
    known = Known()
    for _, fields in records:
        if fields["record"] == "Tls":
            known.tls.append(fields)
        elif fields["record"] == "Withheld" and fields["side"] == "upstream":
            start = fields["offset"]
            known.withheld.append((start, start + fields["length"], fields["why"]))
    return known


def packets(reader: Reader, session: Session, known: Known) -> Iterator[Packet]:
    """Yield the packets of a session, in the recorded order."""
    talk = _Talk(session, known)
    yield from talk.handshake()
    held: Frame | None = None  # what is hidden in a frame is said right after it
    hidden: list[dict[str, Any]] = []
    for frame in reader.frames(session.number):
        if frame.kind == _HIDDEN:
            hidden.append(frame.fields())
            continue
        if held is not None:
            yield from talk.data(held, hidden)
        held, hidden = None, []
        if frame.kind == _CLOSE:
            yield from talk.end(frame)
        elif frame.kind == _TLS:
            talk.tls(frame.fields())
        elif frame.kind in _NOTED:
            talk.note(frame.fields())
        elif not frame.is_record and frame.kind != Kind.UP_OWN:
            held = frame
    if held is not None:
        yield from talk.data(held, hidden)


class _Talk:
    """The two sequence numbers, and what the next packet has to say."""

    def __init__(self, session: Session, known: Known) -> None:
        self._session, self._withheld = session, known.withheld
        self._in_clear = known.opened  #: what comes now is before the TLS that the gate opened
        self._sent = {True: _BEGINNING, False: _BEGINNING}  #: by whether the client sent it
        self._places = dict.fromkeys((Kind.UP, Kind.DOWN, Kind.DOWN_OWN), 0)
        self._notes: list[str] = []

    def handshake(self) -> Iterator[Packet]:
        """Yield how it began."""
        at = self._session.started
        yield Packet(at, from_client=True, flags="S", sequence=0, acknowledged=0)
        yield Packet(
            at, from_client=False, flags="SA", sequence=0, acknowledged=_BEGINNING
        )  # fmt: skip
        yield self._packet(at, "A", from_client=True)

    def tls(self, fields: dict[str, Any]) -> None:
        """Go on behind TLS."""
        if self._in_clear and _opens(fields):
            self._in_clear = False

    def note(self, fields: dict[str, Any]) -> None:
        """Say something on the next packet."""
        told = ", ".join(f"{name} {value}" for name, value in fields.items() if name != "record")
        self._say(f"{fields['record']}: {told}")

    def data(self, frame: Frame, hidden: list[dict[str, Any]]) -> Iterator[Packet]:
        """Yield the packets of a frame of bytes."""
        kind = Kind(frame.kind)
        passed, self._places[kind] = self._places[kind], frame.offset + len(frame.payload)
        if self._in_clear:
            return
        from_client = kind is Kind.UP
        if frame.offset > passed:
            self._jump(kind, passed, frame.offset)
        if kind is Kind.DOWN_OWN:
            self._say(f"{len(frame.payload)} bytes here are the gate's own")
        for fields in hidden:
            self._say(
                f"hidden and zero here: {fields['length']} bytes at {fields['offset']} of what the"
                f" {fields['side']} sent ({fields['kind']})"
            )
        for piece in self._given(frame):
            for start in range(0, len(piece), MOST_BYTES):
                data = piece[start : start + MOST_BYTES]
                yield self._packet(frame.time_ns, "PA", data, from_client=from_client)

    def end(self, frame: Frame) -> Iterator[Packet]:
        """Yield how it ended: FIN on both sides, or RST."""
        fields = frame.fields()
        reason, by = fields["reason"], fields["by"]
        first = by == "client"
        for kind, total in ((Kind.UP, fields["bytes_up"]), (Kind.DOWN, fields["bytes_down"])):
            if total > self._places[kind] and not self._in_clear:
                self._jump(kind, self._places[kind], total)
        self._say(f"the session ended: {reason} by {by}")
        if reason in _RESETS:
            yield self._packet(frame.time_ns, "RA", from_client=first)
            return
        for from_client in (first, not first):
            yield self._packet(frame.time_ns, "FA", from_client=from_client)
            self._sent[from_client] += 1
        yield self._packet(frame.time_ns, "A", from_client=first)

    def _given(self, frame: Frame) -> Iterator[memoryview]:
        """Yield what the other side was given of a frame."""
        at, payload = frame.offset, frame.payload
        end = at + len(payload)
        if frame.kind == Kind.DOWN:
            for start, stop, why in sorted(self._withheld):
                if stop <= at or start >= end:
                    continue
                self._say(f"{min(stop, end) - max(start, at)} bytes here were withheld: {why}")
                if start > at:
                    yield payload[at - frame.offset : start - frame.offset]
                at = min(stop, end)
        if at < end:
            yield payload[at - frame.offset :]

    def _jump(self, kind: Kind, start: int, end: int) -> None:
        self._sent[kind is Kind.UP] += end - start
        self._say(f"{end - start} bytes before this were not recorded")

    def _say(self, text: str) -> None:
        if len(self._notes) < MOST_NOTES:
            self._notes.append(shown(text)[:MOST_LETTERS])

    def _packet(
        self, time_ns: int, flags: str, data: bytes | memoryview = b"", *, from_client: bool
    ) -> Packet:
        notes, self._notes = tuple(self._notes), []
        sequence = self._sent[from_client]
        self._sent[from_client] += len(data)
        return Packet(
            time_ns, from_client, flags, sequence, self._sent[not from_client], data, notes
        )


def _opens(fields: dict[str, Any]) -> bool:
    return bool(fields["mode"] == "intercept" and fields["stage"] == "established")
