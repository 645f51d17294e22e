"""One direction of a session: what one side sent, on its way to the other side.

`appliance.proxy.session` owns two of them. A direction receives straight into the evidence, sends
from the same memory, and keeps what a slow peer has not taken as claims on the evidence
(`capture.held.Held`), not as copies. It stops reading while anything is unsent: that is the
backpressure.
"""

from __future__ import annotations

import socket
from collections import deque
from typing import TYPE_CHECKING

from capture.held import Held

if TYPE_CHECKING:
    from appliance.proxy.session import Session
    from appliance.sansio import Side

RECEIVE_BYTES = 256 * 1024
PRIVATE_BYTES = 64 * 1024

Unsent = Held | bytes | memoryview


class Direction:
    """Bytes of `side`. `sink` is the socket that they are sent to; `received` counts what came."""

    __slots__ = (
        "ended",
        "kind",
        "own_kind",
        "own_sent",
        "received",
        "registered",
        "relay",
        "session",
        "shut",
        "side",
        "sink",
        "source",
        "unsent",
        "unsent_bytes",
        "writing",
    )  # fmt: skip

    def __init__(
        self,
        session: Session,
        side: Side,
        source: socket.socket,
        sink: socket.socket,
        kind: int,
        own_kind: int,
    ) -> None:
        self.session = session
        self.side = side
        self.source = source
        self.sink = sink
        self.kind = kind  #: frame kind of received bytes
        self.own_kind = own_kind  #: frame kind of the gate's own bytes sent to `sink`
        self.received = 0
        self.own_sent = 0
        self.relay = 0  #: bytes that still pass without the layer; -1 for all
        self.ended = False  #: the source sends no more
        self.shut = False  #: the sink was told so
        self.registered = False
        self.writing = False
        self.unsent: deque[tuple[Unsent, int]] | None = (
            None  #: (bytes, stream position that must be durable first)
        )
        self.unsent_bytes = 0

    def receive_relayed(self) -> None:
        """Receive into the evidence and send from there; no layer is asked."""
        session = self.session
        worker = session.worker
        writer = worker.writer
        area = writer.reserve(RECEIVE_BYTES if self.relay < 0 else min(RECEIVE_BYTES, self.relay))
        if area is None:
            worker.stall(session)
            return
        length = self._receive(area)
        if length <= 0:
            return
        position = writer.publish(self.kind, session.number, self.received, length, worker.now())
        self.received += length
        if self.relay > 0:
            self.relay = max(0, self.relay - length)
        self.send(area[:length], position - (-length & 7), position)

    def receive_for_layer(self) -> None:
        """Receive into the evidence, then let the layer say what happens; a passive side is sent
        first.
        """
        session = self.session
        worker = session.worker
        area = worker.writer.reserve(PRIVATE_BYTES)
        if area is None:
            worker.stall(session)
            return
        length = self._receive(area)
        if length <= 0:
            return
        now = worker.now()
        offset = self.received
        position = worker.writer.publish(self.kind, session.number, offset, length, now)
        self.received += length
        data = area[:length]
        if self.side in session.layer.passive:
            self.send(data, position - (-length & 7), position)
        session.feed(self, data, offset, now)

    def receive_unrecorded(self, scratch: memoryview) -> int:
        """Pass bytes on while evidence cannot be written and the route says to go on; return how
        many.
        """
        length = self._receive(scratch)
        if length > 0:
            self.received += length
            self.send(bytes(scratch[:length]), 0, 0)
        return max(length, 0)

    def receive_private(self) -> bytes:
        """Return bytes that are not in the evidence yet (detection, credentials); empty when there
        is nothing to do.
        """
        try:
            data = self.source.recv(PRIVATE_BYTES)
        except BlockingIOError:
            return b""
        except OSError as wrong:
            self.session.broken(self, wrong)
            return b""
        if not data:
            self.session.source_ended(self)
        return data

    def _receive(self, area: memoryview) -> int:
        try:
            length = self.source.recv_into(area)
        except BlockingIOError:
            return -1
        except OSError as wrong:
            self.session.broken(self, wrong)
            return -1
        if not length:
            self.session.source_ended(self)
        return length

    def send(self, data: memoryview | bytes, end: int, position: int) -> None:
        """Send to the sink. `end` is where `data` ends in the evidence's stream, 0 when it is not
        there as such.

        `position` is what must be durable before it may leave, on routes that wait for the disk.
        """
        if self.session.waits_for_disk:
            self._keep(data, 0, position)
            self.session.worker.wait_for_disk(self.session)
            return
        if self.unsent is not None:
            self._keep(data, end, 0)
            return
        try:
            sent = self.sink.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as wrong:
            self.session.sink_broken(self, wrong)
            return
        if sent < len(data):
            self._keep(data[sent:], end, 0)
            self.want_write()

    def _keep(self, data: memoryview | bytes, end: int, position: int) -> None:
        if self.unsent is None:
            self.unsent = deque()
        length = len(data)
        kept: Unsent = self.session.worker.writer.hold(end, length) if end else bytes(data)
        self.unsent.append((kept, position))
        self.unsent_bytes += length
        self.session.interest()

    def want_write(self) -> None:
        """Be told when the sink can take more."""
        if not self.writing:
            self.writing = True
            self.session.worker.loop.add_writer(self.sink.fileno(), self.flush)

    def flush(self) -> None:
        """Send what is unsent, as far as the sink takes it and the disk has it."""
        session = self.session
        durable = session.worker.writer.durable
        while self.unsent:
            kept, position = self.unsent[0]
            if position > durable:
                break
            view = kept.view() if isinstance(kept, Held) else kept
            try:
                sent = self.sink.send(view)
            except BlockingIOError:
                self.want_write()
                return
            except OSError as wrong:
                session.sink_broken(self, wrong)
                return
            self.unsent_bytes -= sent
            if sent < len(view):
                if isinstance(kept, Held):
                    kept.advance(sent)
                else:
                    self.unsent[0] = (kept[sent:], position)
                self.want_write()
                return
            if isinstance(kept, Held):
                kept.release()
            self.unsent.popleft()
        self._stop_writing()
        if not self.unsent:
            self.unsent = None
            session.flushed(self)

    def _stop_writing(self) -> None:
        if self.writing:
            self.writing = False
            self.session.worker.loop.remove_writer(self.sink.fileno())

    def finish(self) -> None:
        """Tell the sink that no more comes, once everything was sent."""
        if self.unsent is None and not self.shut:
            self.shut = True
            try:
                self.sink.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # it is gone already; the other direction will notice

    def register(self, wanted: bool) -> None:  # one caller, one meaning
        """Read from the source, or stop reading."""
        if wanted == self.registered:
            return
        self.registered = wanted
        loop = self.session.worker.loop
        if wanted:
            loop.add_reader(self.source.fileno(), self.session.readable, self)
        else:
            loop.remove_reader(self.source.fileno())

    def close(self) -> None:
        """Forget claims and callbacks; the session closes the sockets."""
        self.register(wanted=False)
        self._stop_writing()
        if self.unsent:
            for kept, _ in self.unsent:
                if isinstance(kept, Held):
                    kept.release()
        self.unsent = None
