"""What a record becomes in the ledger: the leaf that says it is there, without what it says. Pure.

`capture.sealer` calls it for every record of a kind in `KINDS`. Fields come from the record as its
writer made it; KeyError, TypeError or ValueError mean that they are not what `capture.records`
says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from capture import leaves, records
from capture.frames import session_name
from capture.moment import rfc3339

if TYPE_CHECKING:
    from collections.abc import Callable

    from capture.tally import Tally


class Place(NamedTuple):
    """Where a record lies, and its time."""

    generation: int
    commit: int
    session: int
    time_ns: int


def session_open(place: Place, name: str) -> leaves.Leaf:
    """Return the leaf of the SessionOpen record of the session `name`."""
    return leaves.SessionOpen(
        commit=place.commit, generation=place.generation, session=name,
        time=rfc3339(place.time_ns),
    )  # fmt: skip


def session_close(place: Place, tally: Tally, fields: dict[str, Any]) -> leaves.Leaf:
    """Return the leaf of a session's end; `fields` are those of a SessionClose record."""
    up, down, own_up, own_down = tally.sizes
    return leaves.SessionClose(
        by=leaves.word(fields["by"]), bytes=(up, down), commit=place.commit,
        commits=tally.tree.size,
        declared=(fields["bytes_up"], fields["bytes_down"], fields["operations"]),
        frames=tally.frames, gaps=tally.gaps, generation=place.generation,
        opened=rfc3339(tally.opened_ns) if tally.opened_ns else "", operations=tally.operations,
        own=(own_up, own_down), reason=leaves.word(fields["reason"]), records=tally.records,
        session=tally.name, subroot=leaves.base64_of(tally.tree.root()),
        time=rfc3339(place.time_ns),
    )  # fmt: skip


def session_cut(place: Place, tally: Tally, by: str) -> leaves.Leaf:
    """Return the leaf of a session whose writer ended before it did."""
    declared = {"bytes_up": 0, "bytes_down": 0, "operations": 0}
    return session_close(place, tally, {"by": by, "reason": "cut", **declared})


def config(place: Place, digest: str) -> leaves.Leaf:
    """Return the leaf of a configuration that the log did not name last."""
    return leaves.Config(
        commit=place.commit, generation=place.generation, sha256=digest,
        time=rfc3339(place.time_ns),
    )  # fmt: skip


def _start(place: Place, fields: dict[str, Any]) -> leaves.Leaf:
    return leaves.Start(
        boot=fields["boot_id"], commit=place.commit, generation=place.generation,
        role=leaves.word(fields["role"]), time=rfc3339(place.time_ns),
    )  # fmt: skip


def _stop(place: Place, fields: dict[str, Any]) -> leaves.Leaf:
    return leaves.Stop(
        commit=place.commit, generation=place.generation, reason=leaves.word(fields["reason"]),
        time=rfc3339(place.time_ns),
    )  # fmt: skip


def _decision(place: Place, fields: dict[str, Any]) -> leaves.Leaf:
    return leaves.Decision(
        action=leaves.word(fields["action"]), commit=place.commit, generation=place.generation,
        session=session_name(place.session) if place.session else "", time=rfc3339(place.time_ns),
    )  # fmt: skip


def _access(place: Place, fields: dict[str, Any]) -> leaves.Leaf:
    return leaves.Access(
        action=leaves.word(fields["action"]), commit=place.commit, generation=place.generation,
        time=rfc3339(place.time_ns),
    )  # fmt: skip


def _gap(place: Place, fields: dict[str, Any]) -> leaves.Leaf | None:
    if place.session:
        return None  # counted in its session's close
    return leaves.Gap(
        bytes=(fields["bytes_up"], fields["bytes_down"]), commit=place.commit,
        count=fields["count"], generation=place.generation, packets=fields["packets"],
        reason=leaves.word(fields["reason"]), scope=leaves.word(fields["scope"]),
        time=rfc3339(place.time_ns),
    )  # fmt: skip


def _heartbeat(place: Place, fields: dict[str, Any]) -> leaves.Leaf:
    return leaves.Heartbeat(
        accepted=fields["accepted"], closed=fields["closed"], commit=place.commit,
        generation=place.generation, kernel_accepted=fields["kernel_accepted"],
        listen_drops=fields["listen_drops"], open=fields["open"], refused=fields["refused"],
        sensor_lost=fields["sensor_lost"], time=rfc3339(place.time_ns), worker=fields["worker"],
    )  # fmt: skip


def _recovered(place: Place, fields: dict[str, Any]) -> leaves.Leaf:
    return leaves.Recovered(
        bytes=fields["bytes"], commit=place.commit, frames=fields["frames"],
        generation=place.generation, incarnation=fields["incarnation"],
        last=max(fields["segments"], default=0), power_loss=fields["power_loss"],
        segments=len(fields["segments"]), time=rfc3339(place.time_ns),
    )  # fmt: skip


#: Makers of leaves by frame kind, apart from those of a session's two ends.
KINDS: dict[int, Callable[[Place, dict[str, Any]], leaves.Leaf | None]] = {
    records.KINDS[records.Start]: _start,
    records.KINDS[records.Stop]: _stop,
    records.KINDS[records.Decision]: _decision,
    records.KINDS[records.Access]: _access,
    records.KINDS[records.Gap]: _gap,
    records.KINDS[records.Heartbeat]: _heartbeat,
    records.KINDS[records.Recovered]: _recovered,
}
