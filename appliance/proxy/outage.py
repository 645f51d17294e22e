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

    scratch = memoryview(bytearray(SCRATCH_BYTES))

    def __init__(self, since: int) -> None:
        self._since = since
        self._bytes_up = 0
        self._bytes_down = 0

    def receive(self, direction: Direction) -> None:
        """Pass one piece on."""
        length = direction.receive_unrecorded(self.scratch)
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
    if session.route.on_evidence_failure == "closed":
        session.refuse("evidence cannot be written", "evidence")
        return
    session.forget_protocol()
    session.waits_for_disk = False
    session.outage = Outage(now)
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
