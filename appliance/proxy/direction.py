"""One direction of a session: what one side sent, on its way to the other side.

`appliance.proxy.session` owns two of them. A direction receives straight into the evidence, sends
from the same memory, and keeps what a slow peer has not taken as claims on the evidence
(`capture.held.Held`), not as copies. It stops reading while anything is unsent: that is the
backpressure.

The loop tells of a socket once when something is new (edge-triggered), to one handler: a direction
is the handler of its source, and hears there of bytes to read and, on behalf of the direction back,
of space to write. Whatever is left in the kernel is noted in `pending`: a read that filled its
area, bytes that are not wanted now, an end or an urgent mark behind the bytes. `watch` asks the
loop to tell again. A read that did not fill its area took all there was; what comes later is new.
"""

from __future__ import annotations

import logging
import socket
from collections import deque
from typing import TYPE_CHECKING

from appliance.proxy.effects import feed
from appliance.proxy.loop import DEAD, PLAIN, WRITE
from appliance.proxy.tls.stream import TlsStream
from appliance.proxy.upstream import abort
from capture.errors import EvidenceError
from capture.frames import session_name
from capture.held import Held

if TYPE_CHECKING:
    from appliance.proxy.session import Session
    from appliance.sansio import Side

log = logging.getLogger("narrows.session")

RECEIVE_BYTES = 256 * 1024
#: A source that fills its receives, while its sink takes all of them, may give so much at once:
#: fewer and larger receives mean fewer turns of the loop, and fewer acknowledgements.
MOST_RECEIVE_BYTES = 2 * 1024 * 1024
PRIVATE_BYTES = 64 * 1024

Unsent = Held | bytes | memoryview


class Direction:
    """Bytes of `side`. `sink` is the socket that they are sent to; `received` counts what came."""

    __slots__ = (
        "at_once", "back", "ended", "fd", "kind", "own_kind", "own_sent", "own_waits", "pending",
        "reading", "received", "relay", "session", "shut", "side", "sink", "source", "stream",
        "unsent", "unsent_bytes", "watched", "writing",
    )  # fmt: skip

    back: Direction  #: the other direction of the session

    def __init__(
        self, session: Session, side: Side, source: socket.SocketType, sink: socket.SocketType,
        kind: int, own_kind: int,
    ) -> None:  # fmt: skip
        self.session = session
        self.side = side
        self.source: socket.SocketType | TlsStream = source
        self.sink: socket.SocketType | TlsStream = sink
        self.stream: TlsStream | None = None  #: the source, when the gate opened its TLS
        self.fd = source.fileno()
        self.kind = kind  #: frame kind of received bytes
        self.own_kind = own_kind  #: frame kind of the gate's own bytes sent to `sink`
        self.received = 0
        self.at_once = RECEIVE_BYTES  #: how much the next receive may bring
        self.own_sent = 0
        self.relay = 0  #: bytes that still pass without the layer; -1 for all
        self.ended = False  #: the source sends no more
        self.shut = False  #: the sink was told so, or takes no more
        self.reading = False  #: bytes are wanted from the source
        self.writing = False  #: the sink is full
        self.watched = False  #: the loop looks at the source
        self.pending = False  #: there may be something to read that the loop has told of already
        #: (bytes, stream position that must be durable first), oldest first; None when all was sent
        self.unsent: deque[tuple[Unsent, int]] | None = None
        self.unsent_bytes = 0
        self.own_waits = False  #: some of what is unsent is the gate's own

    # -- the loop ----------------------------------------------------------------------------------

    def event(self, mask: int) -> None:
        """The loop says what is new on the source."""
        try:
            if self.back.writing and mask & WRITE:
                self.back.flush()
            if self.reading:
                if mask & ~WRITE:
                    self.pending = mask & ~PLAIN != 0  # an end or an urgent mark is behind
                    self.session.readable(self)
                    if self.pending and self.reading:
                        self.watch()
            elif mask & ~WRITE:
                self.pending = True
                if mask & DEAD and not self.session.closed:
                    failed = self.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    self.session.broken(self, failed)
        except Exception:
            name = session_name(self.session.number)
            log.exception("session %s failed", name)
            self.session.close("error", "gate", reset=True)

    def tls_event(self, mask: int) -> None:
        """The loop says what is new on a source that is TLS, or was asked to call again."""
        stream = self.stream
        assert stream is not None
        try:
            if self.back.writing and mask & WRITE:
                self.back.flush()
            if mask & ~WRITE:
                stream.told(behind=mask & ~PLAIN != 0)
            if self.reading and stream.pending:
                self.session.readable(self)
                self.again()
            elif mask & DEAD and not self.session.closed:
                failed = self.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                self.session.broken(self, failed)
        except Exception:
            name = session_name(self.session.number)
            log.exception("session %s failed", name)
            self.session.close("error", "gate", reset=True)

    def take_tls(self, stream: TlsStream) -> None:
        """Read and, in the direction back, write through `stream` from here on."""
        self.source = self.stream = self.back.sink = stream
        stream.told(behind=True)  # what the loop told of while the other leg was opened
        if self.watched:
            self.session.worker.sockets.rename(self.fd, self.tls_event)

    def again(self) -> None:
        """Ask for another turn for what a TLS source has decrypted, or could."""
        if self.reading and self.stream is not None and self.stream.pending:
            self.session.worker.sockets.soon(self.fd)

    def watch(self) -> None:
        """Have the loop look at the source, and look again at what was there before."""
        sockets = self.session.worker.sockets
        if self.stream is not None and self.watched:
            self.again()
        elif not self.watched:
            self.watched = True
            sockets.watch(self.fd, self.event if self.stream is None else self.tls_event)
        elif self.pending:
            self.pending = False
            sockets.again(self.fd)

    # -- receiving ---------------------------------------------------------------------------------

    def receive_relayed(self) -> None:
        """Receive into the evidence and send from there; no layer is asked."""
        relay = self.relay
        want = self.at_once if relay < 0 or relay > self.at_once else relay
        session = self.session
        worker = session.worker
        writer = worker.writer
        area = writer.reserve(want)
        if area is None:
            self.pending = True
            worker.stall(session)
            return
        try:
            length = self.source.recv_into(area)
        except BlockingIOError:
            return
        except OSError as wrong:
            session.broken(self, wrong.errno or 0)
            return
        if not length:
            session.source_ended(self)
            return
        if length == len(area):
            self.pending = True
            if length == self.at_once < MOST_RECEIVE_BYTES:
                self.at_once = 2 * length
        position = writer.publish(self.kind, session.number, self.received, length, worker.now())
        self.received += length
        self.send(area[:length], position - (-length & 7), position)
        if relay > 0:
            self.relay = relay - length
            if not self.relay:
                session.interest()

    def receive_for_layer(self) -> None:
        """Receive into the evidence, then let the layer say what happens; a passive side is sent
        first.
        """
        session = self.session
        worker = session.worker
        area = worker.writer.reserve(PRIVATE_BYTES)
        if area is None:
            self.pending = True
            worker.stall(session)
            return
        length = self.receive(area)
        if length <= 0:
            return
        now = worker.now()
        offset = self.received
        position = worker.writer.publish(self.kind, session.number, offset, length, now)
        self.received += length
        data = area[:length]
        if self.side in session.layer.passive:
            self.send(data, position - (-length & 7), position)
            if session.closed:
                return
        feed(session, self, data, offset, now)

    def receive_unrecorded(self, scratch: memoryview) -> int:
        """Pass bytes on while evidence cannot be written and the route says to go on; return how
        many.
        """
        length = self.receive(scratch)
        if length > 0:
            self.received += length
            self.send(bytes(scratch[:length]), 0, 0)
        return max(length, 0)

    def receive_private(self) -> bytes:
        """Return bytes that are not in the evidence yet (detection, credentials); empty when there
        is nothing to do.
        """
        session = self.session
        if not session.worker.writer.room:
            self.pending = True
            session.worker.stall(session)
            return b""
        try:
            data = self.source.recv(PRIVATE_BYTES)
        except BlockingIOError:
            return b""
        except OSError as wrong:
            session.broken(self, wrong.errno or 0)
            return b""
        if not data:
            session.source_ended(self)
        elif len(data) == PRIVATE_BYTES:
            self.pending = True
        return data

    def receive(self, area: memoryview) -> int:
        """Return how many bytes came into `area`; none or fewer when there is nothing to do."""
        try:
            length = self.source.recv_into(area)
        except BlockingIOError:
            return -1
        except OSError as wrong:
            self.session.broken(self, wrong.errno or 0)
            return -1
        if not length:
            self.session.source_ended(self)
        elif length == len(area):
            self.pending = True
        return length

    def pass_on(self, data: bytes) -> None:
        """Record bytes that were received privately, and send them on. Raises EvidenceError."""
        session = self.session
        worker = session.worker
        position = worker.writer.append(
            self.kind, session.number, data, worker.now(), self.received
        )
        self.received += len(data)
        self.send(data, 0, position)

    # -- sending -----------------------------------------------------------------------------------

    def send(self, data: memoryview | bytes, end: int, position: int, *, own: bool = False) -> None:
        """Send to the sink. `end` is where `data` ends in the evidence's stream, 0 when it is not
        there as such; then it must stay valid only during the call.

        `position` is what must be durable before it may leave, on routes that wait for the disk.
        `own` bytes are the gate's.
        """
        session = self.session
        if self.shut:
            return  # the sink is gone
        if session.waits_for_disk and position > session.worker.writer.durable:
            self._keep(data, end, position, own=own)
            session.worker.wait_for_disk(session)
            return
        if self.unsent is None:
            try:
                sent = self.sink.send(data)
            except BlockingIOError:
                sent = 0
            except OSError as wrong:
                session.sink_broken(self, wrong.errno or 0)
                return
            if sent == len(data):
                return
            data = data[sent:]
            self.at_once = RECEIVE_BYTES
            self._want_write()
        self._keep(data, end, 0, own=own)

    def _keep(self, data: memoryview | bytes, end: int, position: int, *, own: bool) -> None:
        if self.unsent is None:
            self.unsent = deque()
        length = len(data)
        kept: Unsent = self.session.worker.writer.hold(end, length) if end else bytes(data)
        self.unsent.append((kept, position))
        self.unsent_bytes += length
        self.own_waits = self.own_waits or own
        self.session.interest()

    def _want_write(self) -> None:
        self.writing = True
        if not self.back.watched:
            self.back.watch()

    def flush(self) -> None:
        """Send what is unsent, as far as the sink takes it and the disk has it."""
        if self.unsent is None:
            if self.writing:
                self.session.writable(self)
            return
        session = self.session
        durable = session.worker.writer.durable if session.waits_for_disk else -1
        while self.unsent:
            kept, position = self.unsent[0]
            if 0 <= durable < position:
                break
            try:
                view = kept.view() if isinstance(kept, Held) else kept
                sent = self.sink.send(view)
            except BlockingIOError:
                self._want_write()
                return
            except EvidenceError:
                log.exception("session %s: what it waits for is gone", session_name(session.number))
                session.close("evidence", "gate", reset=True)
                return
            except OSError as wrong:
                session.sink_broken(self, wrong.errno or 0)
                return
            self._sent(kept, position, sent)
            if sent < len(view):
                self._want_write()
                return
        self.writing = False
        if not self.unsent:
            self.unsent = None
            self.own_waits = False
            session.flushed(self)

    @property
    def waits(self) -> bool:
        """Say whether it waits for the disk, and not for its sink."""
        unsent = self.unsent
        return unsent is not None and unsent[0][1] > self.session.worker.writer.durable

    def _sent(self, kept: Unsent, position: int, sent: int) -> None:
        assert self.unsent is not None
        self.unsent_bytes -= sent
        if isinstance(kept, Held):
            kept.advance(sent)
            if kept.length:
                return
            kept.release()
        elif sent < len(kept):
            self.unsent[0] = (kept[sent:], position)
            return
        self.unsent.popleft()

    # -- ends --------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Tell the sink that no more comes, once everything was sent."""
        if self.unsent is None and not self.shut:
            self.shut = True
            if self.back.shut:
                return  # both ways are ended: the session closes now, and that says the same
            try:
                self.sink.shutdown(socket.SHUT_WR)
            except BlockingIOError:
                self.shut = False  # TLS has something to say first, and no room: `Session.writable`
                self._want_write()
            except OSError:
                pass  # it is gone already; the other direction will notice
            self.back.again()  # TLS reads what is there before it says its end

    def drop(self) -> None:
        """Forget what is unsent."""
        for kept, _ in self.unsent or ():
            if isinstance(kept, Held):
                kept.release()
        self.unsent = None
        self.unsent_bytes = 0
        self.own_waits = self.writing = False
        if self.back.stream is not None:
            self.back.stream.forget()

    def close(self, *, reset: bool) -> None:
        """Forget claims and close the source."""
        self.reading = False
        if self.unsent is not None:
            self.drop()
        if self.watched:
            self.watched = False
            self.session.worker.sockets.drop(self.fd)
        if reset:
            abort(self.source.raw if isinstance(self.source, TlsStream) else self.source)
        else:
            self.source.close()
