"""The session driver: between two sockets, a protocol layer and the evidence.

A gate worker makes one per accepted connection. Theory of operation:

    waiting     dialling upstream and asking who it is, at once; nothing is read
    detecting   client bytes are held privately until a protocol claims them; a server that speaks
                first makes it opaque
    running     bytes go through the layer, or past it once it asked for Relay
    ending      one side ended or was refused; what is unsent still goes out, then FIN
    closed      both sockets are closed; SessionClose, the last frame, waits for Attributed

What the layer decides is carried out in `appliance.proxy.effects`; what happens while evidence
cannot be written is in `appliance.proxy.outage`.
"""

from __future__ import annotations

import errno
import logging
import socket
from typing import TYPE_CHECKING, Any

from appliance.protocols import discover
from appliance.proxy import effects
from appliance.proxy.detect import detect, expected
from appliance.proxy.direction import Direction
from appliance.proxy.loop import DEAD, ENDED, WRITE
from appliance.proxy.standing import closed
from appliance.proxy.tls.handshake import Handshake, begin, broken_later
from appliance.proxy.upstream import why
from appliance.sansio import CLIENT, FOREVER, UPSTREAM, Layer, Side
from appliance.wire.clienthello import may_begin
from capture.errors import EvidenceError
from capture.frames import Kind, session_name
from capture.records import KINDS, Attributed, Detected, SessionClose

if TYPE_CHECKING:
    from collections.abc import Callable

    from appliance.config import Route
    from appliance.proxy.loop import Timer
    from appliance.proxy.outage import Outage
    from appliance.proxy.worker import Worker
    from capture.records import Alarm, Record

log = logging.getLogger("narrows.session")

LINGER_S = 5.0
#: Above this much of the gate's own answers waiting, the side that causes them is not read.
MOST_OWN_BYTES = 64 * 1024
_FORGED = frozenset({"forged", "replayed"})
_DETECT, _LINGER = "gate: detect", "gate: linger"
_ATTRIBUTED, _DETECTED, _CLOSE = KINDS[Attributed], KINDS[Detected], KINDS[SessionClose]
_UP, _UP_OWN, _DOWN, _DOWN_OWN = map(int, (Kind.UP, Kind.UP_OWN, Kind.DOWN, Kind.DOWN_OWN))


class Session:
    """One connection through the gate."""

    __slots__ = (
        "account", "attributed", "client", "closed", "connected", "down", "ending", "first_end",
        "handshake", "layer", "number", "operations", "outage", "prefix", "protocol", "read_last",
        "reason", "route", "stalled", "started", "target", "timers", "up", "waits_for_disk",
        "worker",
    )  # fmt: skip

    layer: Layer

    def __init__(
        self, worker: Worker, number: int, route: Route, client: tuple[str, int],
        target: tuple[str, int], near: socket.SocketType, far: socket.SocketType, started: int,
    ) -> None:  # fmt: skip
        self.worker = worker
        self.number = number
        self.route = route
        self.client = client
        self.target = target
        self.started = started
        self.protocol = ""
        self.operations = 0
        self.up = Direction(self, CLIENT, near, far, _UP, _UP_OWN)
        self.down = Direction(self, UPSTREAM, far, near, _DOWN, _DOWN_OWN)
        self.up.back, self.down.back = self.down, self.up
        self.prefix: bytes | None = b""  #: what the client said, until a protocol claims it
        self.account: str | None = None
        self.attributed = self.connected = self.closed = self.stalled = False
        self.waits_for_disk = route.durability == "fsync"
        self.ending: tuple[str, str] | None = None  #: (reason, by) once decided
        self.first_end = "client"  #: side that sent the first FIN
        self.reason = ""
        self.read_last: object = None  #: what the layer wanted to read when that was last looked at
        self.timers: dict[str, Timer] | None = None
        self.handshake: Handshake | None = None  #: while TLS is being opened
        #: while evidence cannot be written and the route says to go on
        self.outage: Outage | None = None

    # -- life --------------------------------------------------------------------------------------

    def attribute(self, found: Attributed, alarms: list[Alarm]) -> None:
        """Who it is became known: record it, and start, or end what is closed already."""
        worker = self.worker
        now = worker.now()
        worker.lay(_ATTRIBUTED, self.number, worker.standing.attributed(found), now)
        for alarm in alarms:
            worker.record(self.number, alarm, now)
        self.account = found.account
        self.attributed = True
        if self.closed:
            self._end()
        elif found.reason in _FORGED and worker.config.attribution.on_forged == "refuse":
            self.close("forged", "gate", reset=True)
        else:
            self.interest()

    def dialled(self, mask: int) -> None:
        """The upstream connection was made, or failed."""
        down = self.down
        if mask & (DEAD | ENDED):
            failed = down.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            self.close(why(failed), "upstream", reset=True)
            return
        self.worker.dialling.remove(self)
        self.worker.sockets.rename(down.fd, down.event)
        self.connected = True
        down.pending = mask != WRITE  # the server has spoken already
        self.interest()

    def interest(self) -> None:
        """Read exactly those sides that may be read now."""
        if not (self.attributed and self.connected) or self.closed:
            return
        running = not self.stalled
        if self.handshake is not None:
            reading: frozenset[Side] | None = frozenset({self.handshake.side})
        elif self.prefix is None:
            reading = self.read_last = self.layer.reading
        else:
            reading = None
        for direction in (self.up, self.down):
            back = direction.back
            wanted = (
                running
                and direction.unsent is None
                and not direction.ended
                and (reading is None or direction.relay != 0 or direction.side in reading)
                and not (back.own_waits and back.unsent_bytes > MOST_OWN_BYTES)
            )
            if wanted is not direction.reading:
                direction.reading = wanted
                if wanted and (direction.pending or direction.stream or not direction.watched):
                    direction.watch()  # TLS keeps itself what is left (`TlsStream.pending`)

    def readable(self, direction: Direction) -> None:
        """The loop says that `direction` has bytes."""
        try:
            if self.handshake is not None:
                self.handshake.moved(direction)
            elif self.outage is not None:
                self.outage.receive(direction)
            elif direction.relay:
                direction.receive_relayed()
            elif self.prefix is not None:
                self._detecting(direction)
            elif direction.side in self.layer.sensitive:
                data = direction.receive_private()
                if data:
                    effects.feed_private(self, direction, data)
            else:
                direction.receive_for_layer()
        except EvidenceError:
            self.unrecordable()

    def writable(self, direction: Direction) -> None:
        """There is room again where a TLS leg had something of its own to say."""
        if self.handshake is not None:
            self.handshake.moved(direction.back)
            return
        direction.writing = False
        if direction.ended:
            self.flushed(direction)

    def unrecordable(self) -> None:
        """There is no memory to record received bytes: they go nowhere."""
        if not self.closed:
            self.close("evidence", "gate", reset=True)

    def set_timer(
        self, name: str, delay_s: float, callback: Callable[..., None], *arguments: Any
    ) -> None:
        """Call once, unless the session closes first; setting a name again replaces it."""
        if self.timers is None:
            self.timers = {}
        elif name in self.timers:
            self.timers[name].cancel()
        self.timers[name] = self.worker.loop.call_later(delay_s, callback, *arguments)

    def drop_timer(self, name: str) -> None:
        """Do not call any more, if it was to be called."""
        if self.timers is not None and name in self.timers:
            self.timers.pop(name).cancel()

    # -- detection ---------------------------------------------------------------------------------

    def _detecting(self, direction: Direction) -> None:
        if direction.side is UPSTREAM:
            direction.pending = True
            if direction.stream is None or direction.stream.peek():
                self._choose("opaque", "server-first")
            return
        data = direction.receive_private()
        if not data:
            return
        assert self.prefix is not None
        self.prefix = self.prefix + data if self.prefix else data
        if self.route.tls == "intercept" and not self.up.stream and may_begin(self.prefix):
            begin(self, self.prefix, due=False)
        else:
            self.detect()

    def detect(self) -> None:
        """Ask which protocol `prefix` belongs to. Raises EvidenceError."""
        assert self.prefix is not None
        protocol, reason = detect(self.prefix, self.target[1])
        if protocol is not None:
            self._choose(protocol.name, reason)
        elif self.timers is None or _DETECT not in self.timers:
            self.set_timer(_DETECT, self.worker.config.gate.detect_ms / 1000, self._undecided)

    def _undecided(self) -> None:
        prefix = self.prefix
        if prefix is not None and not self.closed and not expected(prefix, self.target[1]):
            try:
                self._choose("opaque", "undecided")
            except EvidenceError:
                self.unrecordable()

    def _choose(self, name: str, reason: str) -> None:
        """Make a layer, and give it what was held back. Raises EvidenceError."""
        prefix, self.prefix = self.prefix, None
        self.drop_timer(_DETECT)
        self.protocol = name
        worker = self.worker
        worker.lay(_DETECTED, self.number, worker.standing.detected(name, reason), worker.now())
        if name == "opaque":
            self.layer = self.worker.opaque
            self.up.relay = self.down.relay = FOREVER
        else:
            self.layer = discover()[name].layer(effects.facts(self))
        if prefix:
            if self.up.relay:
                self.up.pass_on(prefix)
            else:
                effects.feed_private(self, self.up, prefix)
        self.interest()

    def choose_nothing(self, reason: str) -> bytes:
        """Make a session that is being detected opaque; return what was held back, which is neither
        recorded nor sent.
        """
        prefix, self.prefix = self.prefix, b""
        self._choose("opaque", reason)
        return prefix or b""

    def forget_protocol(self) -> None:
        """Relay both sides, as bytes only: what the layer holds, then everything. End the session
        if the layer has refused a side.
        """
        layer, self.layer = self.layer, self.worker.opaque
        position = self.worker.writer.position
        for direction in (self.up, self.down):
            direction.relay = FOREVER
            held = layer.held(direction.side)
            if held is None and not direction.ended:
                self.close("protocol", "gate", reset=True)
            if held and not self.closed:
                direction.send(held, 0, position)
        self.interest()

    # -- ends --------------------------------------------------------------------------------------

    def source_ended(self, direction: Direction) -> None:
        """The source sent FIN: pass it on after what is unsent, and close when both have."""
        if self.handshake is not None:
            self.handshake.ended(direction.side.value)
            return
        direction.ended = True
        if self.ending is None and not direction.back.ended:
            self.first_end = direction.side.value
        if self.prefix is not None:
            undecided = direction.side is CLIENT and self.prefix
            self._choose("opaque", "undecided" if undecided else "silent")
        effects.tell_end(self, direction, reset=False)
        if self.closed:
            return
        direction.finish()
        self._close_if_done()
        self.interest()

    def flushed(self, direction: Direction) -> None:
        """Everything of `direction` was sent."""
        if direction.ended:
            direction.finish()
            self._close_if_done()
        self.interest()

    def _close_if_done(self) -> None:
        if self.up.shut and self.down.shut:
            reason, by = self.ending or ("fin", self.first_end)
            self.close(reason, by, reset=reason == "reset")

    def end_side(self, side: Side, reason: str) -> None:
        """The layer ends the direction towards `side`: what is unsent goes out, then FIN."""
        direction = self.down if side is CLIENT else self.up
        if self.ending is None:
            self.ending = ("protocol", "gate")
            self.reason = reason
        self.set_timer(_LINGER, LINGER_S, self._linger_over)
        direction.ended = True
        self.interest()
        direction.finish()
        self._close_if_done()

    def _linger_over(self) -> None:
        reason, by = self.ending or ("timeout", "gate")
        self.close(reason, by, reset=True)

    def broken(self, direction: Direction, failed: int) -> None:
        """The source was reset, or gave up with errno `failed`: reset the other side too."""
        if self.handshake is not None:
            self.handshake.ended(direction.side.value)
            return
        broken_later(self, direction, failed)
        try:
            effects.tell_end(self, direction, reset=True)
        except EvidenceError:
            self.unrecordable()
        reason, by = self.ending or ("reset", direction.side.value)
        self.close("timeout" if failed == errno.ETIMEDOUT else reason, by, reset=True)

    def sink_broken(self, direction: Direction, failed: int) -> None:
        """The sink takes no more: that side is gone. What it had said before still passes."""
        direction.shut = direction.ended = True
        direction.drop()
        back = direction.back
        self.ending = self.ending or ("reset", back.side.value)
        if back.ended:
            self.broken(back, failed)
        else:
            self.interest()

    def refuse(self, message: str, reason: str) -> None:
        """End the session from the gate's side, with the protocol's own error if there is one."""
        if self.closed or (self.ending is not None and self.ending[0] == reason):
            return
        self.ending = (reason, "gate")
        self.reason = message
        if self.prefix is not None or not self.connected or self.handshake is not None:
            self.close(reason, "gate", reset=bool(self.prefix) or not self.connected)
            return
        self.set_timer(_LINGER, LINGER_S, self._linger_over)
        self.up.relay = self.down.relay = 0
        said = f"{message} (reference {session_name(self.number)})"
        try:
            effects.run(self, self.layer.refuse(said), self.worker.now())
        except Exception:
            log.exception("session %s cannot be refused in its own words", self.number)
            self.close(reason, "gate", reset=True)

    def close(self, reason: str, by: str, *, reset: bool = False) -> None:
        """Close both sockets; the last record follows once it is known who it was."""
        if self.closed:
            return
        self.closed = True
        handshake, self.handshake = self.handshake, None
        if handshake is not None:
            handshake.told_of_end(reason, by)
        self.ending = (reason, by)
        if self.timers is not None:
            for timer in self.timers.values():
                timer.cancel()
            self.timers = None
        self.up.close(reset=reset)
        self.down.close(reset=reset)
        if not self.connected:
            self.worker.dialling.remove(self)
        if self.attributed:
            self._end()

    def _end(self) -> None:
        """Write the last record of a closed session."""
        assert self.ending is not None
        reason, by = self.ending
        reference = session_name(self.number) if by == "gate" else ""
        end = closed(
            reason, by, self.up.received, self.down.received, self.operations, self.started,
            reference,
        )  # fmt: skip
        self.worker.lay(_CLOSE, self.number, end, self.worker.now())
        self.worker.forget(self)

    def record(self, record: Record) -> None:
        """Write a record of this session."""
        self.worker.record(self.number, record, self.worker.now())

    def describe(self) -> dict[str, Any]:
        """Return what `narrows live` shows."""
        return {
            "id": session_name(self.number), "client": self.client, "target": self.target,
            "protocol": self.protocol, "route": self.route.name, "started": self.started,
            "service_account": self.account,
            "bytes_up": self.up.received, "bytes_down": self.down.received,
            "operations": self.operations,
            "unsent": self.up.unsent_bytes + self.down.unsent_bytes,
        }  # fmt: skip
