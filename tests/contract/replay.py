"""Feeds a layer the way the session driver does, without sockets, and keeps what it did."""

import hashlib
import hmac

from appliance.protocols import discover
from appliance.sansio import (
    CLIENT,
    FOREVER,
    UPSTREAM,
    Audit,
    Close,
    Data,
    Eof,
    Facts,
    Forward,
    Hide,
    Origin,
    ProtocolError,
    Relay,
)
from capture.records import Operation

SESSION = 1 << 40 | 1
TIME = 1_700_000_000_000_000_000


def digest(secret):
    return hmac.new(b"key of the test", secret, hashlib.sha256).hexdigest()[:32]


def facts():
    return Facts(SESSION, ("192.0.2.10", 40000), ("198.51.100.10", 5432), digest)


def other(side):
    return UPSTREAM if side is CLIENT else CLIENT


class Replay:
    """One session of one protocol."""

    def __init__(self, protocol, *, keep=True):
        """Without `keep` nothing is kept of what the layer did."""
        self.layer = protocol.layer(facts())
        self._keep = keep
        self.captured = {CLIENT: bytearray(), UPSTREAM: bytearray()}  #: as the evidence has it
        self.received = {CLIENT: 0, UPSTREAM: 0}
        self.relayed = {CLIENT: bytearray(), UPSTREAM: bytearray()}  #: by the side that sent them
        self.own = {CLIENT: bytearray(), UPSTREAM: bytearray()}  #: by the side they were sent to
        self.records = []
        self.hidden = []  #: (side, offset, length, kind), neighbours joined
        self.relay = {CLIENT: 0, UPSTREAM: 0}
        self.closed = set()
        self.failed = None
        self.untold = []  #: operations whose bytes were forwarded before their record
        self._waiting = []

    def feed(self, side, data):
        """Give bytes (or None for FIN), or keep them while the layer does not want them."""
        self._waiting.append((side, data))
        progress = True
        while progress:
            progress = False
            for number, (waiting, piece) in enumerate(self._waiting):
                first = all(earlier is not waiting for earlier, _ in self._waiting[:number])
                reads = self.relay[waiting] or waiting in self.layer.reading
                if first and reads and not self.failed:
                    del self._waiting[number]
                    self._give(waiting, piece)
                    progress = True
                    break
        if not self._keep:
            self._waiting.clear()

    def _give(self, side, data):
        if data is None:
            self._run(self._handle(Eof(side, reset=False, offset=self.received[side])))
            return
        while data:
            if self.relay[side]:
                count = len(data) if self.relay[side] == FOREVER else self.relay[side]
                passed, data = data[:count], data[count:]
                if self.relay[side] != FOREVER:
                    self.relay[side] -= len(passed)
                self._capture(side, passed)
                self._relay(side, passed)
                continue
            offset = self.received[side]
            event = Data(side, memoryview(data), offset, TIME)
            if side in self.layer.sensitive:
                effects = self._handle(event)
                hides = [effect for effect in effects if isinstance(effect, Hide)]
                self._capture(side, b"\0" * len(data) if self.failed else self._blank(event, hides))
            else:
                self._capture(side, data)
                if side in self.layer.passive:
                    self._relay(side, data)
                effects = self._handle(event)
            self._run(effects)
            return

    def _handle(self, event):
        try:
            return self.layer.handle(event)
        except ProtocolError as wrong:
            self.failed = wrong
            return wrong.done

    def _blank(self, event, hides):
        clear = bytearray(event.data)
        for hide in hides:
            start = hide.offset - event.offset
            assert hide.side is event.side
            assert start >= 0
            assert start + hide.length <= len(clear)
            clear[start : start + hide.length] = bytes(hide.length)
            last = self.hidden[-1] if self.hidden else None
            if last and last[0] is hide.side and last[1] + last[2] == hide.offset:
                self.hidden[-1] = (*last[:2], last[2] + hide.length, hide.kind)
            else:
                self.hidden.append((hide.side, hide.offset, hide.length, hide.kind))
        return clear

    def _capture(self, side, data):
        if self._keep:
            self.captured[side] += data
        self.received[side] += len(data)

    def _relay(self, side, data):
        if self._keep:
            self.relayed[side] += data

    def _run(self, effects):
        for effect in effects:
            if not self._keep and isinstance(effect, Audit | Forward):
                continue
            if isinstance(effect, Audit):
                self.records.append(effect.record)
                if isinstance(effect.record, Operation):
                    record = effect.record
                    if record.offset < len(self.relayed[CLIENT]):
                        self.untold.append(record)
            elif isinstance(effect, Forward):
                if effect.origin is Origin.RELAYED:
                    sender = other(effect.to)
                    self.relayed[sender] += effect.data
                else:
                    self.own[effect.to] += effect.data
            elif isinstance(effect, Relay):
                self.relay[effect.from_side] = effect.length
            elif isinstance(effect, Close):
                self.closed.add(effect.side)

    def refuse(self, message):
        self._run(self.layer.refuse(message))

    def of(self, kind):
        """Return the records of one type."""
        return [record for record in self.records if isinstance(record, kind)]


def run(transcript, cut=None):
    """Replay a transcript; `cut` yields the parts of a piece."""
    replay = Replay(discover()[transcript.protocol])
    for side, data in transcript.pieces:
        for part in cut(data) if cut and data else (data,):
            replay.feed(side, part)
    return replay
