"""A gate worker: listeners, sessions and one stream of evidence, on one loop in one process.

`appliance.daemon` builds it; nothing here knows how it was configured or who supervises it. The
writer thread calls `wake` from outside the loop; everything else runs on the loop.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import time
from typing import TYPE_CHECKING, Any

from appliance.proxy import outage
from appliance.proxy.listener import Listener, open_listener, saved_syn
from appliance.proxy.refusal import Destinations
from appliance.proxy.session import Session
from appliance.proxy.upstream import abort, dial, prepare
from capture.errors import EvidenceError
from capture.frames import session_name
from capture.records import (
    Alarm,
    Attributed,
    Decision,
    Gap,
    Heartbeat,
    Refused,
    SessionClose,
    SessionOpen,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from appliance.attribution import Attributor
    from appliance.config import Config
    from appliance.proxy.loop import Loop
    from capture.crypt import Keys
    from capture.records import Record
    from capture.segment import SegmentWriter

log = logging.getLogger("narrows.gate")

HEARTBEAT_S = 5.0


class Worker:
    """One gate process' data path."""

    def __init__(
        self, config: Config, number: int, loop: Loop, keys: Keys, attributor: Attributor, own: set[str]
    ) -> None:  # fmt: skip
        """`own` are the gate's addresses, which no session may have as its target."""
        self.config = config
        self.number = number
        self.loop = loop
        self.keys = keys
        self.attributor = attributor
        self.sessions: dict[int, Session] = {}
        self.now: Callable[[], int] = time.time_ns
        self.accepted = self.ended = self.refused = 0
        self.writer: SegmentWriter
        self._destinations = Destinations(config.route, own, config.redirect.management)
        self._listeners: list[Listener] = []
        self._stalled: list[Session] = []
        self._waiting: set[Session] = set()
        self._woken = False
        self._lost_records = 0
        self._failed_since = 0
        self._stopping: Callable[[], None] | None = None

    # -- life
    # ---------------------------------------------------------------------------------------------------------

    def start(self, writer: SegmentWriter) -> None:
        """Open the listeners; from here on connections come."""
        self.writer = writer
        for family in (socket.AF_INET, socket.AF_INET6):
            sock = open_listener(family, self.config.gate.listen_port)
            self._listeners.append(Listener(self.loop, sock, self._accept, self._accept_blocked))
        self.loop.call_later(HEARTBEAT_S, self._heartbeat)

    def stop(self, stopped: Callable[[], None]) -> None:
        """Accept no more, end every session in an orderly way, then call `stopped`."""
        self._stopping = stopped
        for listener in self._listeners:
            listener.close()
        for session in list(self.sessions.values()):
            session.refuse("the gate is stopping", "stopped")
        self._check_stopped()

    def _check_stopped(self) -> None:
        if self._stopping is not None and not self.sessions:
            stopped, self._stopping = self._stopping, None
            self._beat()
            stopped()

    # -- evidence
    # -----------------------------------------------------------------------------------------------------

    def record(self, session: int, record: Record, now: int) -> None:
        """Write a record; one that finds no room is counted and becomes a Gap."""
        try:
            self.writer.record(session, record, now)
        except EvidenceError:
            self._lost_records += 1

    def append(
        self, kind: int, session: int, data: bytes | memoryview, now: int, offset: int
    ) -> int:
        """Write bytes of a session; without room they are counted as lost and the session ends with
        the outage.
        """
        try:
            return self.writer.append(kind, session, data, now, offset)
        except EvidenceError:
            self._lost_records += 1
            return self.writer.position

    def wake(self) -> None:
        """Called by the writer thread: something moved."""
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                self.loop.call_soon_threadsafe(self._evidence_moved)

    def stall(self, session: Session) -> None:
        """There is no memory for evidence: stop reading this session until there is."""
        session.stalled = True
        session.interest()
        self._stalled.append(session)
        if len(self._stalled) == 1:
            self.writer.sync()

    def wait_for_disk(self, session: Session) -> None:
        """Flush `session` when what it queued is durable."""
        if not self._waiting:
            self.writer.sync()
        self._waiting.add(session)

    def _evidence_moved(self) -> None:
        self._woken = False
        if self.writer.failed is not None:
            self._evidence_failed()
        elif self._failed_since:
            self._evidence_works()
        if self._waiting:
            waiting, self._waiting = self._waiting, set()
            for session in waiting:
                session.up.flush()
                session.down.flush()
                if (
                    not session.closed
                    and (session.up.unsent or session.down.unsent)
                    and session.waits_for_disk
                ):
                    self._waiting.add(session)
            if self._waiting:
                self.writer.sync()
        if self._stalled and self.writer.room:
            stalled, self._stalled = self._stalled, []
            for session in stalled:
                session.stalled = False
                session.interest()

    def _evidence_failed(self) -> None:
        now = self.now()
        if not self._failed_since:
            self._failed_since = now
            log.error("%s; routes fail as configured", self.writer.failed)
        for session in list(self.sessions.values()):
            outage.begin(session, now)

    def _evidence_works(self) -> None:
        now = self.now()
        log.warning("evidence can be written again")
        for session in list(self.sessions.values()):
            outage.end(session, now)
        gap = Gap(
            "worker", "evidence-unavailable", self._failed_since, now, count=self._lost_records
        )
        self._failed_since = self._lost_records = 0
        self.record(0, gap, now)

    # -- connections
    # --------------------------------------------------------------------------------------------------

    def _accept(self, near: socket.socket, peer: tuple[Any, ...]) -> None:
        now = self.now()
        self.accepted += 1
        client: tuple[str, int] = (peer[0], peer[1])
        name = near.getsockname()
        target: tuple[str, int] = (name[0], name[1])
        route, reason = self._destinations.look_up(*target)
        failed = self.writer.failed is not None
        if route is None or (failed and route.on_evidence_failure == "closed"):
            self._refuse(near, client, target, reason or "evidence", now)
            return
        number = self.writer.new_session()
        opened = SessionOpen(
            client[0], client[1], target[0], target[1], route.name, route.durability, route.source, self.number
        )  # fmt: skip
        self.record(number, opened, now)
        try:
            prepare(near)
            far = dial(target, client[0] if route.source == "client" else None)
        except OSError as wrong:
            self._not_dialled(near, number, now, wrong)
            return
        session = Session(self, number, route, client, target, near, far)
        self.sessions[number] = session
        if failed:
            outage.begin(session, now)
        self.loop.add_writer(far.fileno(), self._connected, session, far)
        timeout = self.config.gate.connect_timeout_s
        session.timers = {"connect": self.loop.call_later(timeout, self._not_connected, session)}
        self._attribute(session, saved_syn(near))
        if len(self.sessions) >= self.config.gate.max_sessions:
            for listener in self._listeners:
                listener.pause()

    def _refuse(
        self,
        near: socket.socket,
        client: tuple[str, int],
        target: tuple[str, int],
        reason: str,
        now: int,
    ) -> None:
        self.refused += 1
        reference = session_name(self.writer.new_session())
        self.record(0, Refused(*client, *target, reason, reference), now)
        abort(near)

    def _not_dialled(self, near: socket.socket, number: int, now: int, wrong: OSError) -> None:
        """Only reached when the upstream socket could not even start to connect."""
        reason = "descriptors" if wrong.errno in (errno.EMFILE, errno.ENFILE) else "unreachable"
        self.record(number, Attributed(None, "none", "none", "not-connected"), now)
        self.record(number, SessionClose(reason, "gate", 0, 0, 0, now, session_name(number)), now)
        self.refused += 1
        abort(near)

    def _attribute(self, session: Session, syn: bytes) -> None:
        answer = self.attributor.begin(
            session.client, session.target, syn, lambda *found: self._attributed(session, *found)
        )
        if answer is not None:
            self._attributed(session, *answer)

    def _attributed(self, session: Session, found: Attributed, alarms: list[Alarm]) -> None:
        now = self.now()
        self.record(session.number, found, now)
        for alarm in alarms:
            self.record(session.number, alarm, now)
        if session.closed:
            return
        session.attributed = True
        if alarms and self.config.attribution.on_forged == "refuse":
            session.close("forged", "gate", reset=True)
            return
        session.ready()

    def _connected(self, session: Session, far: socket.socket) -> None:
        self.loop.remove_writer(far.fileno())
        if session.closed:
            return
        if session.timers is not None:
            session.timers.pop("connect").cancel()
            session.timers = None
        failed = far.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failed:
            reason = "refused" if failed == errno.ECONNREFUSED else "unreachable"
            session.close(reason, "upstream", reset=True)
            return
        session.connected = True
        session.ready()

    def _not_connected(self, session: Session) -> None:
        if not session.closed and not session.connected:
            self.loop.remove_writer(session.down.source.fileno())
            session.close("timeout", "upstream", reset=True)

    def _accept_blocked(self, since: int, until: int) -> None:
        self.record(
            0,
            Gap("worker", "emfile", since, until, detail="connections waited in the backlog"),
            until,
        )

    def closed(self, session: Session) -> None:
        """A session wrote its last record."""
        self.ended += 1
        self.sessions.pop(session.number, None)
        self._waiting.discard(session)
        if len(self.sessions) == self.config.gate.max_sessions - 1 and self._stopping is None:
            for listener in self._listeners:
                listener.resume()
        self._check_stopped()

    # -- control
    # -----------------------------------------------------------------------------------------------------

    def list_sessions(self) -> list[dict[str, Any]]:
        """Return the running sessions."""
        return [session.describe() for session in self.sessions.values()]

    def kill(self, session: int, actor: str, reason: str) -> bool:
        """End a session and record who did it; False when it is not here."""
        found = self.sessions.get(session)
        if found is None:
            return False
        self.record(session, Decision(actor, "kill", reason, "done"), self.now())
        found.refuse("this session was ended by an administrator", "killed")
        return True

    def stats(self) -> dict[str, Any]:
        """Return the worker's counters."""
        return {
            "worker": self.number, "pid": os.getpid(), "open": len(self.sessions), "accepted": self.accepted,
            "closed": self.ended, "refused": self.refused, "position": self.writer.position,
            "durable": self.writer.durable, "failed": str(self.writer.failed or ""),
            "sensor": self.attributor.connected,
        }  # fmt: skip

    # -- heartbeat
    # ----------------------------------------------------------------------------------------------------

    def _heartbeat(self) -> None:
        self._beat()
        self.loop.call_later(HEARTBEAT_S, self._heartbeat)

    def _beat(self) -> None:
        passive, drops = kernel_counts()
        unsent = sum(s.up.unsent_bytes + s.down.unsent_bytes for s in self.sessions.values())
        beat = Heartbeat(
            self.number, len(self.sessions), self.accepted, self.ended, self.refused, passive, drops,
            self.attributor.lost, unsent,
        )  # fmt: skip
        self.record(0, beat, self.now())


def kernel_counts() -> tuple[int, int]:
    """Return (passive opens, dropped or overflowed SYNs) of this network namespace, by the kernel's
    own count.
    """
    found: dict[str, int] = {}
    for path in (f"/proc/{os.getpid()}/net/snmp", f"/proc/{os.getpid()}/net/netstat"):
        with open(path, encoding="ascii") as file:
            lines = file.read().splitlines()
        for names, values in zip(lines[::2], lines[1::2], strict=True):
            keys, numbers = names.split(), values.split()
            for key, number in zip(keys[1:], numbers[1:], strict=True):
                found[keys[0] + key] = int(number)
    drops = found.get("TcpExt:ListenDrops", 0) + found.get("TcpExt:ListenOverflows", 0)
    return found.get("Tcp:PassiveOpens", 0), drops
