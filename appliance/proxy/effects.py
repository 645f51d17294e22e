"""Between a session and its protocol layer: gives the layer what happened, and does what it says.

`appliance.proxy.session` calls it. The rules for layers are in `appliance.sansio`; effects run in
order, to the end, before the next event. Errors of a layer that are not its peer's fault lose
meaning, never evidence: the session goes on as opaque with a Gap record.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from appliance.proxy.tls.handshake import begin
from appliance.sansio import (
    CLIENT,
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
    Origin,
    ProtocolError,
    Relay,
    SetTimer,
    StartTls,
)
from capture.errors import EvidenceError
from capture.frames import session_name
from capture.records import Gap, Hidden, Operation

if TYPE_CHECKING:
    from appliance.proxy.direction import Direction
    from appliance.proxy.session import Session

log = logging.getLogger("narrows.session")


def facts(session: Session) -> Facts:
    """Return what a session's layer is told when it is made."""
    route, in_tls = session.route, session.up.stream is not None
    return Facts(
        session.number, session.client, session.target, session.worker.keys.digest,
        session.worker.config.http,
        opens_tls=route.tls == "intercept" and not in_tls, in_tls=in_tls,
        plain_upstream=route.tls_upstream == "plain",
        same_certificate=bool(route.tls_certificate),
    )  # fmt: skip


def feed(
    session: Session, direction: Direction, data: memoryview | bytes, offset: int, now: int
) -> None:
    """Give bytes that are in the evidence to the layer."""
    try:
        effects = session.layer.handle(Data(direction.side, data, offset, now))
    except ProtocolError as wrong:
        _refuse(session, wrong)
        return
    except Exception as bug:  # noqa: BLE001 - whatever a layer does, the bytes go on
        _failed(session, bug)
        return
    if effects:
        run(session, effects, now)
    elif session.layer.reading is not session.read_last:
        session.interest()


def feed_private(session: Session, direction: Direction, data: bytes) -> None:
    """Record bytes that may hold credentials, blanked where the layer says, then do what it
    says.
    """
    now = session.worker.now()
    offset = direction.received
    wrong: ProtocolError | None = None
    effects: list[Effect] = []
    try:
        effects = session.layer.handle(Data(direction.side, data, offset, now))
    except ProtocolError as said:
        wrong = said
        effects = said.done
    except Exception:
        log.exception("session %s: the %s layer failed", _name(session), session.protocol)
        session.record(Gap("session", "parser", count=1, detail="while credentials were exchanged"))
        wrong = ProtocolError(direction.side, "this session cannot be decoded")
    hides = [effect for effect in effects if type(effect) is Hide]
    if wrong is not None:  # what the layer could not read may be a secret
        hides = [Hide(direction.side, offset, len(data), "unparsed")]
    _record_hidden(session, direction, data, hides, now)
    run(session, effects, now)
    if wrong is not None and not session.closed:
        wrong.done = []
        _refuse(session, wrong)


def _record_hidden(
    session: Session, direction: Direction, data: bytes, hides: list[Hide], now: int
) -> None:
    """Record received bytes with the ranges blanked, and a keyed digest of each range. Raises
    EvidenceError.
    """
    offset = direction.received
    blanked = data
    if hides:
        clear = bytearray(data)
        for hide in hides:
            start = hide.offset - offset
            clear[start : start + hide.length] = bytes(hide.length)
        blanked = bytes(clear)
    session.worker.writer.append(direction.kind, session.number, blanked, now, offset)
    direction.received += len(data)
    for hide in hides:
        start = hide.offset - offset
        digest = session.worker.keys.hidden(
            session.number, direction.side.value, hide.offset, data[start : start + hide.length]
        )
        session.record(Hidden(direction.side.value, hide.offset, hide.length, hide.kind, digest))


def run(session: Session, effects: list[Effect], now: int) -> None:
    """Execute effects in order, then read what the layer wants to be read. Raises EvidenceError
    when bytes that are to be sent cannot be recorded.
    """
    relaying = False
    for effect in effects:
        if isinstance(effect, Audit):
            record = effect.record
            if type(record) is Operation:
                session.operations += 1
            session.worker.record(session.number, record, now)
        elif isinstance(effect, Forward):
            _forward(session, effect, now)
        elif isinstance(effect, Relay):
            relayed = session.up if effect.from_side is CLIENT else session.down
            relayed.relay = effect.length
            relaying = True
        elif isinstance(effect, Close):
            session.end_side(effect.side, effect.reason)
        elif isinstance(effect, StartTls):
            begin(session, b"", due=True)
        elif isinstance(effect, SetTimer):
            _set_timer(session, effect)
        if session.closed:
            return
    # What was queued or ended has said so itself.
    if relaying or session.layer.reading is not session.read_last:
        session.interest()


def _forward(session: Session, effect: Forward, now: int) -> None:
    direction = session.up if effect.to is UPSTREAM else session.down
    writer = session.worker.writer
    if effect.origin is Origin.RELAYED:
        direction.send(effect.data, 0, writer.position)
        return
    position = writer.append(
        direction.own_kind, session.number, effect.data, now, direction.own_sent
    )
    direction.own_sent += len(effect.data)
    direction.send(effect.data, 0, position, own=True)


def _set_timer(session: Session, effect: SetTimer) -> None:
    session.set_timer(effect.timer, effect.seconds, _elapsed, session, effect.timer)


def _elapsed(session: Session, timer: str) -> None:
    if session.closed:
        return
    try:
        run(session, session.layer.handle(Elapsed(timer)), session.worker.now())
    except ProtocolError as wrong:
        _refuse(session, wrong)
    except EvidenceError:
        session.unrecordable()
    except Exception as bug:  # noqa: BLE001 - whatever a layer does, the bytes go on
        _failed(session, bug)


def tell_end(session: Session, direction: Direction, *, reset: bool) -> None:
    """Tell the layer that a side will send no more."""
    if session.prefix is not None or session.closed or session.layer is session.worker.opaque:
        return
    try:
        event = Eof(direction.side, reset, direction.received)
        effects = session.layer.handle(event)
        if effects:
            run(session, effects, session.worker.now())
    except ProtocolError as wrong:
        run(session, wrong.done, session.worker.now())  # there is nobody left to be refused
    except EvidenceError:
        raise
    except Exception:
        log.exception("session %s: the %s layer failed", _name(session), session.protocol)
        session.record(Gap("session", "parser", count=1, detail="at the end of the session"))


def _refuse(session: Session, wrong: ProtocolError) -> None:
    run(session, wrong.done, session.worker.now())
    if not session.closed:
        detail = f"{wrong.side.value}: {wrong}"
        session.record(Gap("session", "protocol-error", count=1, detail=detail))
        session.refuse(str(wrong), "protocol")


def _failed(session: Session, bug: Exception) -> None:
    """A bug of ours: go on as opaque."""
    log.error("session %s: the %s layer failed", _name(session), session.protocol, exc_info=bug)
    detail = f"the {session.protocol} layer failed"
    session.record(Gap("session", "parser", count=1, detail=detail))
    session.forget_protocol()


def _name(session: Session) -> str:
    return session_name(session.number)
