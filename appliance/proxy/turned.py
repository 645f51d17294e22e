"""Connections that the gate accepted and turns away: reset at once, and recorded with whose they
were.

`appliance.proxy.worker` hands over what has no route, what no evidence can be written for, and what
could not even start to connect upstream. Nothing of the connection is needed to learn who made it:
the client is gone, the SYN is here, and the attributor is asked as for any other connection.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from appliance.proxy.standing import closed
from appliance.proxy.upstream import abort
from capture.frames import session_name
from capture.records import KINDS, Alarm, Attributed, Refused, SessionClose

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from appliance.proxy.worker import Worker

_ATTRIBUTED, _CLOSE = KINDS[Attributed], KINDS[SessionClose]
Endpoint = tuple[str, int]


class TurnedAway:
    """What one worker turned away: `count` since its start, `waiting` for their identity now."""

    __slots__ = ("_worker", "count", "waiting")

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.count = 0
        self.waiting = 0

    def refuse(
        self, near: socket.SocketType, client: Endpoint, target: Endpoint, syn: bytes, reason: str,
        now: int,
    ) -> None:  # fmt: skip
        """Turn away what may not pass: there is no session, only a Refused record."""
        worker = self._worker
        reference = session_name(worker.writer.new_session())

        def known(found: Attributed, alarms: list[Alarm]) -> None:
            refused = Refused(
                *client, *target, reason, reference, found.account, found.assurance, found.how,
                found.reason, found.owner,
            )  # fmt: skip
            worker.record(0, refused, now)
            for alarm in alarms:
                worker.record(0, alarm, now)

        self._turn(near, client, target, syn, known)

    def not_dialled(
        self, near: socket.SocketType, client: Endpoint, target: Endpoint, syn: bytes, number: int,
        now: int, wrong: OSError,
    ) -> None:  # fmt: skip
        """End a session, opened in the evidence, whose upstream socket could not be had."""
        worker = self._worker
        reason = "descriptors" if wrong.errno in {errno.EMFILE, errno.ENFILE} else "unreachable"

        def known(found: Attributed, alarms: list[Alarm]) -> None:
            worker.lay(_ATTRIBUTED, number, worker.standing.attributed(found), now)
            for alarm in alarms:
                worker.record(number, alarm, now)
            end = closed(reason, "gate", 0, 0, 0, now, session_name(number))
            worker.lay(_CLOSE, number, end, now)

        self._turn(near, client, target, syn, known)

    def _turn(
        self, near: socket.SocketType, client: Endpoint, target: Endpoint, syn: bytes,
        known: Callable[[Attributed, list[Alarm]], None],
    ) -> None:  # fmt: skip
        abort(near)
        self.count += 1
        self.waiting += 1

        def answered(found: Attributed, alarms: list[Alarm]) -> None:
            self.waiting -= 1
            known(found, alarms)
            self._worker.check_stopped()

        answer = self._worker.attributor.begin(client, target, syn, answered)
        if answer is not None:
            answered(*answer)
