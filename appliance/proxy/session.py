"""The session driver: between two sockets, a protocol layer and the evidence.

A gate worker makes one per accepted connection. Theory of operation:

    waiting     dialling upstream and asking who it is, at once; nothing is read
    detecting   client bytes are held privately until a protocol claims them; a server that speaks first makes it opaque
    running     bytes go through the layer, or past it once it asked for Relay
    ending      one side ended or was refused; what is unsent still goes out, then FIN
    closed      the SessionClose record is the last frame

The rules for layers are in `appliance.sansio`; effects run in order, to the end, before the next
event. Errors of a layer that are not its peer's fault lose meaning, never evidence: the session
goes on as opaque with a Gap record.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from appliance.protocols import discover
from appliance.proxy.detect import detect
from appliance.proxy.direction import Direction
from appliance.proxy.upstream import abort
from appliance.sansio import (
    CLIENT,
    FOREVER,
    UPSTREAM,
    Audit,
    Close,
    Data,
    Effect,
    Elapsed,
    Eof,
    Facts,
    Forward,
    Hide,
    Layer,
    Origin,
    ProtocolError,
    Relay,
    SetTimer,
)
from capture.frames import Kind, session_name
from capture.records import Detected, Gap, Hidden, Operation, SessionClose

if TYPE_CHECKING:
    import socket

    from appliance.config import Route
    from appliance.proxy.loop import Timer
    from appliance.proxy.outage import Outage
    from appliance.proxy.worker import Worker
    from capture.records import Record

log = logging.getLogger("narrows.session")

LINGER_S = 10.0


class Session:
    """One connection through the gate."""

    __slots__ = (
        "attributed",
        "client",
        "closed",
        "connected",
        "down",
        "ending",
        "first_end",
        "layer",
        "number",
        "operations",
        "outage",
        "prefix",
        "protocol",
        "reason",
        "route",
        "stalled",
        "started",
        "target",
        "timers",
        "up",
        "waits_for_disk",
        "worker",
    )  # fmt: skip

    layer: Layer

    def __init__(
        self, worker: Worker, number: int, route: Route, client: tuple[str, int], target: tuple[str, int],
        near: socket.socket, far: socket.socket,
    ) -> None:  # fmt: skip
        self.worker = worker
        self.number = number
        self.route = route
        self.client = client
        self.target = target
        self.started = worker.now()
        self.protocol = ""
        self.operations = 0
        self.up = Direction(self, CLIENT, near, far, Kind.UP, Kind.UP_OWN)
        self.down = Direction(self, UPSTREAM, far, near, Kind.DOWN, Kind.DOWN_OWN)
        self.prefix: bytearray | None = bytearray()
        self.attributed = self.connected = self.closed = self.stalled = False
        self.waits_for_disk = route.durability == "fsync"
        self.ending: tuple[str, str] | None = None  #: (reason, by) once decided
        self.first_end = "client"  #: side that sent the first FIN
        self.reason = ""
        self.timers: dict[str, Timer] | None = None
        self.outage: Outage | None = (
            None  #: while evidence cannot be written and the route says to go on
        )

    # -- life
    # ---------------------------------------------------------------------------------------------------------

    def ready(self) -> None:
        """Attribution or the upstream connection came; start when both are there."""
        if self.attributed and self.connected and not self.closed:
            self.interest()

    def interest(self) -> None:
        """Read exactly those sides that may be read now."""
        if self.closed:
            return
        running = self.attributed and self.connected and not self.stalled
        reading = None if self.prefix is not None else self.layer.reading
        for direction in (self.up, self.down):
            wanted = (
                running
                and not direction.ended
                and direction.unsent is None
                and (reading is None or direction.relay != 0 or direction.side in reading)
            )
            direction.register(wanted)

    def readable(self, direction: Direction) -> None:
        """The loop says that `direction` has bytes."""
        if self.outage is not None:
            self.outage.receive(direction)
        elif direction.relay:
            direction.receive_relayed()
        elif self.prefix is not None:
            self._detecting(direction)
        elif direction.side in self.layer.sensitive:
            data = direction.receive_private()
            if data:
                self.feed_private(direction, data)
        else:
            direction.receive_for_layer()

    def _detecting(self, direction: Direction) -> None:
        if direction.side is UPSTREAM:
            self._choose("opaque", "server-first")
            return
        data = direction.receive_private()
        if not data:
            return
        assert self.prefix is not None
        self.prefix += data
        protocol, reason = detect(bytes(self.prefix), self.target[1])
        if protocol is not None:
            self._choose(protocol.name, reason)
        elif not self.timers:
            delay = self.worker.config.gate.detect_ms / 1000
            self.timers = {"detect": self.worker.loop.call_later(delay, self._undecided)}

    def _undecided(self) -> None:
        if self.prefix is not None and not self.closed:
            self._choose("opaque", "undecided")

    def _choose(self, name: str, reason: str) -> None:
        prefix, self.prefix = self.prefix, None
        if self.timers is not None and "detect" in self.timers:
            self.timers.pop("detect").cancel()
        self.protocol = name
        facts = Facts(
            self.number,
            self.client,
            self.target,
            self.worker.keys.digest,
            self.worker.config.http,
        )
        self.layer = discover()[name].layer(facts)
        self.record(Detected(name, reason))
        if name == "opaque":
            self.up.relay = self.down.relay = FOREVER
        if prefix:
            self.feed_private(self.up, bytes(prefix))
        if not self.closed:
            self.interest()

    # -- bytes
    # --------------------------------------------------------------------------------------------------------

    def feed(self, direction: Direction, data: memoryview | bytes, offset: int, now: int) -> None:
        """Give bytes that are in the evidence to the layer."""
        try:
            effects = self.layer.handle(Data(direction.side, data, offset, now))
        except ProtocolError as wrong:
            self._protocol_error(wrong)
            return
        except Exception:
            log.exception(
                "session %s: the %s layer failed", session_name(self.number), self.protocol
            )
            self._layer_failed(direction, data)
            return
        if effects:
            self.run(effects, now)

    def feed_private(self, direction: Direction, data: bytes) -> None:
        """Record bytes that may hold credentials, blanked where the layer says, then do what it
        says.
        """
        now = self.worker.now()
        offset = direction.received
        failed: ProtocolError | None = None
        effects: list[Effect] = []
        try:
            if not direction.relay:
                effects = self.layer.handle(Data(direction.side, data, offset, now))
        except ProtocolError as wrong:
            failed = wrong
        except Exception:
            log.exception(
                "session %s: the %s layer failed", session_name(self.number), self.protocol
            )
            self.record(
                Gap("session", "parser", count=1, detail="while credentials were exchanged")
            )
            failed = ProtocolError(direction.side, "this session cannot be decoded")
        hides = [effect for effect in effects if type(effect) is Hide]
        blanked = data
        if hides or failed is not None:
            clear = bytearray(data)
            if failed is not None:  # what the layer could not read may be a secret
                hides = [Hide(direction.side, offset, len(data), "unparsed")]
            for hide in hides:
                start = hide.offset - offset
                clear[start : start + hide.length] = bytes(hide.length)
            blanked = bytes(clear)
        position = self.worker.append(direction.kind, self.number, blanked, now, offset)
        direction.received += len(data)
        for hide in hides:
            start = hide.offset - offset
            digest = self.worker.keys.digest(data[start : start + hide.length])
            self.record(Hidden(direction.side.value, hide.offset, hide.length, hide.kind, digest))
        if failed is not None:
            self._protocol_error(failed)
        elif direction.relay:
            direction.send(data, 0, position)
        else:
            self.run(effects, now)

    def run(self, effects: list[Effect], now: int) -> None:
        """Execute effects in order."""
        worker = self.worker
        for effect in effects:
            kind = type(effect)
            if kind is Audit:
                record = effect.record  # type: ignore[union-attr]
                if type(record) is Operation:
                    self.operations += 1
                worker.record(self.number, record, now)
            elif kind is Forward:
                self._forward(effect, now)  # type: ignore[arg-type]
            elif kind is Relay:
                (self.up if effect.from_side is CLIENT else self.down).relay = effect.length  # type: ignore[union-attr]
            elif kind is Close:
                self._end(effect)  # type: ignore[arg-type]
            elif kind is SetTimer:
                self._set_timer(effect)  # type: ignore[arg-type]
            if self.closed:
                return
        self.interest()

    def _forward(self, effect: Forward, now: int) -> None:
        direction = self.up if effect.to is UPSTREAM else self.down
        position = self.worker.writer.position
        if effect.origin is not Origin.RELAYED:
            position = self.worker.append(
                direction.own_kind, self.number, effect.data, now, direction.own_sent
            )
            direction.own_sent += len(effect.data)
        direction.send(effect.data, 0, position)

    def _set_timer(self, effect: SetTimer) -> None:
        if self.timers is None:
            self.timers = {}
        elif effect.timer in self.timers:
            self.timers[effect.timer].cancel()
        self.timers[effect.timer] = self.worker.loop.call_later(
            effect.seconds, self._elapsed, effect.timer
        )

    def _elapsed(self, timer: str) -> None:
        if not self.closed:
            self.run(self.layer.handle(Elapsed(timer)), self.worker.now())

    # -- ends
    # ---------------------------------------------------------------------------------------------------------

    def source_ended(self, direction: Direction) -> None:
        """The source sent FIN: pass it on after what is unsent, and close when both have."""
        direction.ended = True
        direction.register(wanted=False)
        if self.ending is None and not (self.up.ended and self.down.ended):
            self.first_end = direction.side.value
        if self.prefix is not None:
            if direction.side is CLIENT and self.prefix:
                self._choose("opaque", "undecided")
            elif not self.protocol:
                self._choose("opaque", "silent")
        self._tell_layer(Eof(direction.side, reset=False, offset=direction.received))
        if self.closed:
            return
        direction.finish()
        self._close_if_done()

    def flushed(self, direction: Direction) -> None:
        """Everything of `direction` was sent."""
        if direction.ended:
            direction.finish()
            self._close_if_done()
        self.interest()

    def _close_if_done(self) -> None:
        if self.up.shut and self.down.shut:
            reason, by = self.ending or ("fin", self.first_end)
            self.close(reason, by)

    def _end(self, effect: Close) -> None:
        """The layer ends the direction towards `effect.side`."""
        direction = self.down if effect.side is CLIENT else self.up
        if self.ending is None:
            self.ending = ("protocol", "gate")
            self.reason = effect.reason
            self.worker.loop.call_later(LINGER_S, self._linger_over)
        direction.ended = True
        direction.register(wanted=False)
        direction.finish()
        self._close_if_done()

    def _linger_over(self) -> None:
        if not self.closed:
            reason, by = self.ending or ("timeout", "gate")
            self.close(reason, by, reset=True)

    def broken(self, direction: Direction, wrong: OSError) -> None:
        """The source was reset: reset the other side too."""
        del wrong
        self._tell_layer(Eof(direction.side, reset=True, offset=direction.received))
        self.close("reset", direction.side.value, reset=True)

    def sink_broken(self, direction: Direction, wrong: OSError) -> None:
        """The sink takes no more: that side is gone."""
        del wrong
        gone = UPSTREAM if direction.side is CLIENT else CLIENT
        received = (self.up if gone is CLIENT else self.down).received
        self._tell_layer(Eof(gone, reset=True, offset=received))
        self.close("reset", gone.value, reset=True)

    def _tell_layer(self, event: Eof) -> None:
        if self.prefix is None and not self.closed:
            try:
                self.run(self.layer.handle(event), self.worker.now())
            except ProtocolError:
                pass  # the peer is gone; there is nobody to tell
            except Exception:
                log.exception(
                    "session %s: the %s layer failed at the end",
                    session_name(self.number),
                    self.protocol,
                )

    def _protocol_error(self, wrong: ProtocolError) -> None:
        self.run(wrong.done, self.worker.now())
        if self.closed:
            return
        self.record(
            Gap("session", "protocol-error", count=1, detail=f"{wrong.side.value}: {wrong}")
        )
        self.refuse(str(wrong), "protocol")

    def forget_protocol(self) -> None:
        """Relay both sides from here on; what the layer would have decoded is recorded as bytes
        only.
        """
        if self.prefix is not None:
            self._choose("opaque", "evidence-unavailable")
        facts = Facts(
            self.number,
            self.client,
            self.target,
            self.worker.keys.digest,
            self.worker.config.http,
        )
        self.layer = discover()["opaque"].layer(facts)
        self.up.relay = self.down.relay = FOREVER

    def _layer_failed(self, direction: Direction, data: memoryview | bytes) -> None:
        """A bug of ours: go on as opaque. What an active side had not forwarded goes on now."""
        self.record(Gap("session", "parser", count=1, detail=f"the {self.protocol} layer failed"))
        passive = direction.side in self.layer.passive
        self.forget_protocol()
        if not passive:
            direction.send(bytes(data), 0, self.worker.writer.position)
        self.interest()

    def refuse(self, message: str, reason: str) -> None:
        """End the session from the gate's side, with the protocol's own error where there is
        one.
        """
        if self.closed:
            return
        self.ending = (reason, "gate")
        self.reason = message
        reference = session_name(self.number)
        if self.prefix is not None:
            self.close(reason, "gate", reset=True)
            return
        self.worker.loop.call_later(LINGER_S, self._linger_over)
        self.up.relay = self.down.relay = 0
        self.run(self.layer.refuse(f"{message} (reference {reference})"), self.worker.now())

    def close(self, reason: str, by: str, *, reset: bool = False) -> None:
        """Close both sockets and write the last record."""
        if self.closed:
            return
        self.closed = True
        for timer in (self.timers or {}).values():
            timer.cancel()
        if not self.connected:
            self.worker.loop.remove_writer(self.down.source.fileno())
        self.up.close()
        self.down.close()
        for sock in (self.up.source, self.down.source):
            if reset:
                abort(sock)
            else:
                sock.close()
        self.record(
            SessionClose(
                reason,
                by,
                self.up.received,
                self.down.received,
                self.operations,
                self.started,
                session_name(self.number) if by == "gate" else "",
            )  # fmt: skip
        )
        self.worker.closed(self)

    def record(self, record: Record) -> None:
        """Write a record of this session."""
        self.worker.record(self.number, record, self.worker.now())

    def describe(self) -> dict[str, Any]:
        """Return what `narrows live` shows."""
        return {
            "id": session_name(self.number), "client": self.client, "target": self.target,
            "protocol": self.protocol, "route": self.route.name, "started": self.started,
            "bytes_up": self.up.received, "bytes_down": self.down.received, "operations": self.operations,
            "unsent": self.up.unsent_bytes + self.down.unsent_bytes,
        }  # fmt: skip
