"""What happens to a session while evidence cannot be written.

`on_evidence_failure = "closed"` (the default) refuses it; `"open"` lets it go on unrecorded, counts
what passed, and writes a Gap record when writing works again. Decoding does not come back within
such a session: its place in the stream is lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from appliance.sansio import CLIENT
from capture.records import Gap

if TYPE_CHECKING:
    from appliance.proxy.direction import Direction
    from appliance.proxy.session import Session

SCRATCH_BYTES = 64 * 1024


class Outage:
    """Counts what a session passed on without a record."""

    __slots__ = ("_bytes_down", "_bytes_up", "_since")

    def __init__(self, since: int) -> None:
        self._since = since
        self._bytes_up = 0
        self._bytes_down = 0

    def receive(self, direction: Direction) -> None:
        """Pass one piece on."""
        self._count(direction, direction.receive_unrecorded(direction.session.worker.scratch))

    def pass_on(self, direction: Direction, data: bytes) -> None:
        """Pass on what had been received already."""
        direction.received += len(data)
        self._count(direction, len(data))
        direction.send(data, 0, 0)

    def _count(self, direction: Direction, length: int) -> None:
        if direction.side is CLIENT:
            self._bytes_up += length
        else:
            self._bytes_down += length

    def gap(self, until: int) -> Gap:
        """Return the record of what was not recorded."""
        return Gap(
            "session", "evidence-unavailable", self._since, until, self._bytes_up, self._bytes_down
        )  # fmt: skip


def begin(session: Session, now: int) -> None:
    """Evidence cannot be written: refuse the session, or let it go on unrecorded."""
    if session.outage is not None or session.closed:
        return
    waited, session.waits_for_disk = session.waits_for_disk, False
    if session.route.on_evidence_failure == "closed":
        if waited:  # nothing that waits for the disk may leave any more
            session.up.drop()
            session.down.drop()
        session.refuse("evidence cannot be written", "evidence")
        return
    if session.handshake is not None:  # what it would relay are two halves of a handshake
        session.close("evidence", "gate", reset=True)
        return
    outage = session.outage = Outage(now)
    if session.prefix is not None:
        held_back = session.choose_nothing("evidence-unavailable")
        if held_back:
            outage.pass_on(session.up, held_back)
    else:
        session.forget_protocol()
    if session.closed:
        return
    session.up.flush()
    session.down.flush()
    session.interest()


def end(session: Session, now: int) -> None:
    """Evidence can be written again."""
    outage, session.outage = session.outage, None
    if outage is not None and not session.closed:
        session.waits_for_disk = session.route.durability == "fsync"
        session.record(outage.gap(now))
        session.interest()
