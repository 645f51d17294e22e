"""A gate worker: listeners, sessions and one stream of evidence, on one loop in one process.

`appliance.daemon` builds it; nothing here knows how it was configured or who supervises it. The
writer thread calls `wake` from outside the loop; everything else runs on the loop.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import socket
import time
from typing import TYPE_CHECKING, Any

from appliance.protocols.opaque import Opaque
from appliance.proxy import outage
from appliance.proxy.dialling import Dialling
from appliance.proxy.heartbeat import kernel_counts
from appliance.proxy.listener import Listener, open_listener, saved_syn, target_of
from appliance.proxy.refusal import Destinations
from appliance.proxy.session import LINGER_S, Session
from appliance.proxy.standing import Standing
from appliance.proxy.tls import Terminator
from appliance.proxy.turned import TurnedAway
from appliance.proxy.upstream import dial
from capture.errors import EvidenceError
from capture.records import KINDS, Decision, Gap, Heartbeat, SessionOpen, encode

if TYPE_CHECKING:
    from collections.abc import Callable

    from appliance.attribution import Attributor
    from appliance.config import Config, Route
    from appliance.proxy.loop import GateLoop
    from capture.crypt import Keys
    from capture.records import Record
    from capture.segment import SegmentWriter

log = logging.getLogger("narrows.gate")

HEARTBEAT_S = 5.0
OPEN = KINDS[SessionOpen]
#: Descriptors that sessions leave for segments, control connections and the like.
SPARE_DESCRIPTORS = 128
#: First and last records of sessions that found no memory are kept for later, so many of them.
MOST_OWED = 30_000


class Worker:
    """One gate process' data path."""

    def __init__(
        self, config: Config, number: int, loop: GateLoop, keys: Keys, attributor: Attributor,
        own: set[str],
    ) -> None:  # fmt: skip
        """`own` are the gate's addresses, which no session may have as its target. Raises OSError,
        ssl.SSLError or KeyFileError when a certificate or key of the configuration cannot be used.
        """
        self.config = config
        self.number = number
        self.loop = loop
        self.sockets = loop.sockets
        self.keys = keys
        self.attributor = attributor
        self.sessions: dict[int, Session] = {}
        self.now: Callable[[], int] = time.time_ns
        self.accepted = self.ended = 0
        self.turned = TurnedAway(self)
        self.opaque = Opaque()
        self.standing = Standing(number)
        self.tls = Terminator(config)
        self.dialling = Dialling(loop, config.gate.connect_timeout_s)
        self.scratch = memoryview(bytearray(outage.SCRATCH_BYTES))
        self.writer: SegmentWriter
        self._started = False
        self._destinations = Destinations(config.route, own, config.redirect.management)
        self._listeners: list[Listener] = []
        self._stalled: dict[Session, None] = {}
        self._waiting: set[Session] = set()
        self._woken = False
        self._lost_records = 0
        self._owed: list[tuple[int, int, bytes, int]] = []
        self._failed_since = 0
        self._most, self._scarce = self._limit()
        self._full_since = 0
        self._stopping: Callable[[], None] | None = None

    def _limit(self) -> tuple[int, str]:
        """Return how many sessions there may be at once, and what they would run out of."""
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = max((descriptors - SPARE_DESCRIPTORS) // 2, 1)
        if most < self.config.gate.max_sessions:
            return most, "emfile"
        return self.config.gate.max_sessions, "session-limit"

    # -- life --------------------------------------------------------------------------------------

    def start(self, writer: SegmentWriter) -> None:
        """Open the listeners; from here on connections come."""
        self.writer = writer
        self._started = True
        for family in (socket.AF_INET, socket.AF_INET6):
            sock = open_listener(family, self.config.gate.listen_port)
            self._listeners.append(Listener(self.loop, sock, self._accept, self._accept_blocked))
        self.loop.call_later(HEARTBEAT_S, self._heartbeat)

    def own_addresses_are(self, own: set[str]) -> None:
        """Refuse these as targets from now on: the gate's addresses changed."""
        self._destinations = Destinations(self.config.route, own, self.config.redirect.management)

    def stop(self, stopped: Callable[[], None]) -> None:
        """Accept no more, end every session in an orderly way, then call `stopped`."""
        self._stopping = stopped
        for listener in self._listeners:
            listener.close()
        for session in list(self.sessions.values()):
            session.refuse("the gate is stopping", "stopped")
        self.loop.call_later(2 * LINGER_S, self._stop_now)
        self.check_stopped()

    def check_stopped(self) -> None:
        """End the stop, if there is one, when nothing is left to be recorded."""
        if self._stopping is not None and not self.sessions and not self.turned.waiting:
            self._stop_now()

    def _stop_now(self) -> None:
        if self._stopping is not None:
            stopped, self._stopping = self._stopping, None
            self._beat()
            stopped()

    # -- evidence ----------------------------------------------------------------------------------

    def record(self, session: int, record: Record, now: int) -> bool:
        """Write a record; one that finds no room is counted and becomes a Gap, and the answer is
        False.
        """
        try:
            self.writer.append(KINDS[type(record)], session, encode(record), now)
        except EvidenceError:
            self._lost_records += 1
            return False
        return True

    def lay(self, kind: int, session: int, payload: bytes, now: int) -> None:
        """Write a record without which a session cannot be understood: later, if there is no room
        now.
        """
        try:
            self.writer.append(kind, session, payload, now)
        except EvidenceError:
            if len(self._owed) < MOST_OWED:
                self._owed.append((kind, session, payload, now))
            else:
                self._lost_records += 1

    def wake(self) -> None:
        """Called by the writer thread: something moved."""
        if not self._woken and self._started:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                self.loop.call_soon_threadsafe(self._evidence_moved)

    def stall(self, session: Session) -> None:
        """There is no memory for evidence: stop reading this session until there is."""
        session.stalled = True
        session.interest()
        self._stalled[session] = None
        self.writer.hurry()

    def wait_for_disk(self, session: Session) -> None:
        """Flush `session` when what it queued is durable."""
        if not self._waiting:
            self.writer.sync()
        self._waiting.add(session)

    def _evidence_moved(self) -> None:
        self._woken = False
        if self.writer.failed is not None:
            self._evidence_failed()
            return
        if self._failed_since:
            self._evidence_works()
        if self._waiting:
            self._flush_durable()
        if self._stalled and self.writer.room:
            self._go_on()
        if self._owed:
            self._pay()
        if self._lost_records:
            self._say_lost(0)

    def _go_on(self) -> None:
        """Read the stalled sessions again."""
        stalled, self._stalled = self._stalled, {}
        for session in stalled:
            session.stalled = False
            session.interest()

    def _flush_durable(self) -> None:
        waiting, self._waiting = self._waiting, set()
        for session in waiting:
            session.up.flush()
            session.down.flush()
            unsent = session.up.waits or session.down.waits
            if unsent and not session.closed:
                self._waiting.add(session)
        if self._waiting:
            self.writer.sync()

    def _evidence_failed(self) -> None:
        if self._failed_since:
            return
        self._failed_since = now = self.now()
        log.error("%s; routes fail as configured", self.writer.failed)
        self._waiting.clear()
        self._go_on()  # what an open route does needs no memory
        for session in list(self.sessions.values()):
            outage.begin(session, now)

    def _evidence_works(self) -> None:
        now = self.now()
        log.warning("evidence can be written again")
        self._pay()
        for session in list(self.sessions.values()):
            outage.end(session, now)
        since, self._failed_since = self._failed_since, 0
        self._say_lost(since)

    def _pay(self) -> None:
        owed, self._owed = self._owed, []
        for late in owed:
            self.lay(*late)

    def _say_lost(self, since: int) -> None:
        """Record how many records found no memory, in an outage that began at `since` or at
        another time.
        """
        now = self.now()
        reason = "evidence-unavailable" if since else "records-lost"
        gap = Gap("worker", reason, since, now, count=self._lost_records)
        self._lost_records = 0
        self.record(0, gap, now)

    # -- connections -------------------------------------------------------------------------------

    def _accept(self, near: socket.SocketType, peer: tuple[Any, ...]) -> None:
        now = self.now()
        self.accepted += 1
        syn = saved_syn(near)
        client: tuple[str, int] = peer[:2]
        target = target_of(near, syn)
        route, reason = self._destinations.look_up(*target)
        failed = self.writer.failed is not None
        if route is None or (failed and route.on_evidence_failure == "closed"):
            self.turned.refuse(near, client, target, syn, reason or "evidence", now)
            return
        number = self.writer.new_session()
        self.lay(OPEN, number, self.standing.opened(client, target, route), now)
        try:
            session = self._dial(near, client, target, route, number, now)
        except OSError as wrong:
            self.turned.not_dialled(near, client, target, syn, number, now, wrong)
            return
        self.sessions[number] = session
        if failed:
            outage.begin(session, now)
        answer = self.attributor.begin(client, target, syn, session.attribute)
        if answer is not None:
            session.attribute(*answer)
        if len(self.sessions) >= self._most:
            self._full()

    def _dial(
        self, near: socket.SocketType, client: tuple[str, int], target: tuple[str, int],
        route: Route, number: int, now: int,
    ) -> Session:  # fmt: skip
        """Raises OSError when the upstream socket cannot be had, or not even start to connect."""
        source = client[0] if route.source == "client" else None
        near.setblocking(False)  # noqa: FBT003 - the method's own way
        try:
            far = dial(target, source)
        except OSError as wrong:
            lent = wrong.errno == errno.EMFILE and any(x.lend() for x in self._listeners)
            if not lent:
                raise
            far = dial(target, source)
        session = Session(self, number, route, client, target, near, far, now)
        self.dialling.add(session)
        return session

    def _accept_blocked(self, since: int, until: int) -> None:
        detail = "connections wait in the backlog" if not until else "accepting again"
        self.record(0, Gap("worker", "emfile", since, until, detail=detail), self.now())

    def _full(self) -> None:
        if self._full_since or self._stopping is not None:
            return
        self._full_since = now = self.now()
        for listener in self._listeners:
            listener.pause()
        detail = f"{len(self.sessions)} sessions; connections wait in the backlog"
        self.record(0, Gap("worker", self._scarce, now, detail=detail), now)

    def _not_full(self) -> None:
        now = self.now()
        detail = f"{len(self.sessions)} sessions; accepting again"
        self.record(0, Gap("worker", self._scarce, self._full_since, now, detail=detail), now)
        self._full_since = 0
        for listener in self._listeners:
            listener.resume()

    def forget(self, session: Session) -> None:
        """A session wrote its last record."""
        self.ended += 1
        del self.sessions[session.number]
        if self._waiting:
            self._waiting.discard(session)
        if self._stalled:
            self._stalled.pop(session, None)
        if self._full_since and len(self.sessions) < self._most - self._most // 64:
            self._not_full()
        if self._stopping is not None:
            self.check_stopped()

    # -- control -----------------------------------------------------------------------------------

    def list_sessions(self) -> list[dict[str, Any]]:
        """Return the running sessions."""
        return [session.describe() for session in self.sessions.values()]

    def kill(self, session: int, actor: str, reason: str) -> bool:
        """End a session and record who did it; False when it is not here."""
        found = self.sessions.get(session)
        if found is None or found.closed:
            return False
        self.record(session, Decision(actor, "kill", reason, "done"), self.now())
        found.refuse("this session was ended by an administrator", "killed")
        return True

    def stats(self) -> dict[str, Any]:
        """Return the worker's counters."""
        return {
            "worker": self.number, "pid": os.getpid(), "open": len(self.sessions),
            "accepted": self.accepted, "closed": self.ended, "refused": self.turned.count,
            "position": self.writer.position, "durable": self.writer.durable,
            "failed": str(self.writer.failed or ""),
            "sensor": self.attributor.connected, "sensor_pid": self.attributor.sensor_pid,
            "stalled": len(self._stalled),
        }  # fmt: skip

    # -- heartbeat ---------------------------------------------------------------------------------

    def _heartbeat(self) -> None:
        self.loop.call_later(HEARTBEAT_S, self._heartbeat)
        self._beat()

    def _beat(self) -> None:
        try:
            passive, drops = kernel_counts()
        except OSError as wrong:
            log.warning("the kernel's counters cannot be read: %s", wrong)
            passive = drops = 0
        unsent = sum(s.up.unsent_bytes + s.down.unsent_bytes for s in self.sessions.values())
        beat = Heartbeat(
            self.number, len(self.sessions), self.accepted, self.ended, self.turned.count, passive,
            drops, self.attributor.lost, unsent,
        )  # fmt: skip
        self.record(0, beat, self.now())
