"""What a PostgreSQL session has asked for and which answers are still to come.

`appliance.wire.pgfrontend` adds what the client asks for, `appliance.wire.pgbackend` takes it off
as the server answers; `out` takes the effects of the event at hand.

Theory of operation. `steps` are the messages that the server will answer, in order, except those
that never get an answer of their own (Flush, CopyData). A simple query and a function call are one
step that ReadyForQuery ends; in the extended protocol each message is a step, and so is Sync. An
error there makes the server discard everything up to the next Sync; `fail` does the same here, and
`fate` is "skipped" until this Sync comes: what is asked meanwhile has no other result. When the
server is gone, it is "cut".

A result waits in `pending` until ReadyForQuery tells the transaction status, when that is what the
server sends next; other results are written at once.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any

from appliance.sansio import Audit, Effect
from appliance.wire.pgnames import Names, Portal, Running, Statement, Undecided
from capture.records import Fact, Gap, Operation, Result

if TYPE_CHECKING:
    from appliance.wire.sql import Analyser, Analysis

MOST_STEPS = 8_192  #: outstanding answers; with more the client is not read

#: ErrorResponse and NoticeResponse fields that a record shows besides code and message.
_FIELDS = {
    "V": "severity", "D": "detail", "H": "hint", "P": "position", "W": "where", "s": "schema",
    "t": "table", "c": "column", "d": "type", "n": "constraint",
}  # fmt: skip


class Step(IntEnum):
    """What kind of answer is expected, and what stands beside it in `steps`."""

    SYNC = 0  #: None
    QUERY = 1  #: list of Running, one a statement; those that ended are gone from it
    EXECUTE = 2  #: Running
    PARSE = 3  #: Statement
    BIND = 4  #: Portal
    DESCRIBE = 5  #: Portal or Statement, None when neither is known
    CLOSE = 6  #: Statement that is gone, None for a portal


SYNC: tuple[Step, Any] = (Step.SYNC, None)
_SYNC, _QUERY = Step.SYNC, Step.QUERY


def told(fields: dict[str, str]) -> dict[str, Any]:
    """Return what a record says of an ErrorResponse or NoticeResponse besides code and message."""
    found: dict[str, Any] = {name: fields[code] for code, name in _FIELDS.items() if code in fields}
    if found.get("severity") == "ERROR":
        del found["severity"]
    return found


class Pipeline:
    """The state that both sides of a session share."""

    __slots__ = (
        "copying", "fate", "last", "lost", "names", "now", "out", "pending", "replication", "steps",
    )  # fmt: skip

    def __init__(self, analyser: Analyser) -> None:
        self.names = Names(analyser)
        self.out: list[Effect] = []
        self.now = 0  #: time of the event at hand, ns
        self.last = 0  #: number of the last operation
        self.steps: list[tuple[Step, Any]] = []
        self.pending: Running | None = None
        self.fate = ""  #: the result of what is asked now, when that is known already
        self.copying: Running | None = None  #: takes the client's CopyData
        self.replication = False  #: the client speaks to a WAL sender
        self.lost = False  #: answers and questions did not match, and a Gap says so

    def ask(
        self, kind: str, analysis: Analysis, text: str, offset: int, length: int, *,
        binds: tuple[Any, ...] = (), name: str = "", truncated: bool = False,
        portal: Portal | None = None,
    ) -> Running:  # fmt: skip
        """Write an Operation and return it as running; its step is the caller's business.

        SQL's EXECUTE is told with the tables of the statement that it runs.
        """
        tables = analysis.tables
        if analysis.executes is not None:
            name = name or analysis.executes
            tables = self._tables(analysis.executes)
        self.last = number = self.last + 1
        record = Operation(
            number,
            analysis.verb,
            text,
            offset,
            length,
            tables,
            analysis.fingerprint,
            binds,
            name,
            kind,
            "allowed",
            truncated,
        )
        self.out.append(Audit(record))
        return Running(number, self.now, portal)

    def _tables(self, name: str) -> tuple[str, ...]:
        """Return the tables of a prepared statement, when it is certain which one that is."""
        try:
            prepared = self.names.meaning(name.encode())
        except Undecided:
            prepared = None
        return () if prepared is None else prepared.analysis.tables

    def fact(self, kind: str, fields: dict[str, Any]) -> None:
        """Write a Fact."""
        self.out.append(Audit(Fact(kind, fields)))

    def end(self, running: Running, status: str, tx: str = "") -> None:
        """Write the Result of an operation, once."""
        if running.done:
            return
        running.done = True
        detail = {} if running.detail is None else running.detail
        if running.copied is not None:
            detail["copy"] = running.copied.detail()
        sqlstate = message = ""
        if running.error is not None:
            status = "error"
            sqlstate, message = running.error.get("C", ""), running.error.get("M", "")
            detail |= told(running.error)
        columns = running.columns
        if columns is None:
            portal = running.portal
            columns = () if portal is None else portal.columns or portal.statement.columns
        duration = running.ended - running.since if running.ended else 0
        record = Result(
            running.number,
            status,
            running.tag,
            running.rows,
            running.bytes,
            duration,
            sqlstate,
            message,
            columns,
            tx,
            detail,
        )
        self.out.append(Audit(record))

    def wait(self, running: Running) -> None:
        """Write the Result of an operation when ReadyForQuery comes."""
        if self.pending is not None and self.pending is not running:
            self.end(self.pending, "ok")  # a server that answers out of turn
        self.pending = running

    def synced(self) -> None:
        """The client sent Sync."""
        if self.fate == "skipped":
            self.fate = ""
            self.names.undo_voided()
        self.names.batch += 1
        self.steps.append(SYNC)

    def swallow(self, running: Running) -> None:
        """The server went into copy-in mode: it ignores the Sync that came after the Execute.

        libpq sends one with every Execute, and another one after CopyDone (backend/commands
        /copyfromparse.c, CopyGetData).
        """
        self.copying = running
        steps = self.steps
        if steps[0][0] is Step.EXECUTE:
            while len(steps) > 1 and steps[1][0] is _SYNC:
                del steps[1]

    def ready(self, tx: str) -> None:
        """The server sent ReadyForQuery."""
        steps = self.steps
        if steps and steps[0][0] <= _QUERY:
            step, left = steps.pop(0)
        else:
            step, left = Step.SYNC, None
            self.mismatch("ReadyForQuery")
        if self.pending is not None:
            self.end(self.pending, "ok", tx)
            self.pending = None
        if left:
            for running in left:
                self.end(running, "skipped")
            self.names.undo_all(_definitions([(step, left)]))
        if tx == "I" and self.names.portals:
            self.forget_portals()

    def fail(self, fields: dict[str, str]) -> None:
        """The server sent ErrorResponse."""
        self.copying = None
        steps = self.steps
        step, thing = steps[0] if steps else SYNC
        if step is Step.QUERY and thing:
            self.names.undo_all(_definitions(steps[:1]))
            self._failed(thing.pop(0), fields)
        elif step <= Step.QUERY:  # at the end of a batch: what had ended fails after all
            if self.pending is None:
                self.failed_alone(fields)
            else:
                self.pending.error = fields
        else:
            self._discard(fields)

    def failed_alone(self, fields: dict[str, str]) -> None:
        """Write the Fact of an error that belongs to no operation."""
        sqlstate, message = fields.get("C", ""), fields.get("M", "")
        self.fact("error", {"sqlstate": sqlstate, "message": message, **told(fields)})

    def _failed(self, running: Running, fields: dict[str, str]) -> None:
        running.error = fields
        running.ended = self.now
        self.wait(running)

    def _discard(self, fields: dict[str, str]) -> None:
        """Take off what the server will not answer: the failed step and all up to Sync."""
        steps = self.steps
        end = next((at for at, step in enumerate(steps) if step[0] is _SYNC), len(steps))
        if end == len(steps):
            self.fate = "skipped"
        taken = steps[:end]
        del steps[:end]
        operations = _operations(taken)
        if operations:
            self._failed(operations[0], fields)
        else:
            self.failed_alone(fields)
        for running in operations[1:]:
            self.end(running, "skipped")
        self.names.void(_definitions(taken), later=self.fate == "skipped")

    def forget_portals(self) -> None:
        """The transaction is over: its portals are gone."""
        portals = self.names.portals
        for portal in portals.values():
            self.release(portal)
        portals.clear()

    def release(self, portal: Portal) -> None:
        """A portal is gone; one that was announced and never executed was still bound."""
        running = portal.running
        if running is not None and not portal.executed and not running.done:
            running.detail = {"executed": False}
            self.end(running, "ok")

    def cut(self) -> None:
        """No more answers will come."""
        self.fate = "cut"
        self.copying = None
        if self.pending is not None:
            self.end(self.pending, "ok")
            self.pending = None
        for running in _operations(self.steps):
            self.end(running, "cut")
        self.steps.clear()
        self.forget_portals()

    def mismatch(self, what: str) -> None:
        """Say once that an answer came that nothing asked for: from here on results may be off."""
        if not self.lost:
            self.lost = True
            self.out.append(Audit(Gap("session", "parser", count=1, detail=f"unexpected {what}")))


def _operations(steps: list[tuple[Step, Any]]) -> list[Running]:
    """Return the operations that `steps` run, each once."""
    found: dict[int, Running] = {}
    for step, thing in steps:
        if step is Step.QUERY:
            found |= {running.number: running for running in thing}
        elif step is Step.EXECUTE:
            found[thing.number] = thing
        elif step in (Step.PARSE, Step.BIND) and thing.running is not None:
            found[thing.running.number] = thing.running
    return list(found.values())


def _definitions(steps: list[tuple[Step, Any]]) -> list[Statement]:
    """Return what `steps` define or drop, in order."""
    found: list[Statement] = []
    for step, thing in steps:
        if step is Step.QUERY:
            for running in thing:
                found += running.names
        elif step is Step.EXECUTE:
            found += thing.names
        elif step is Step.PARSE or (step is Step.CLOSE and thing is not None):
            found.append(thing)
    return found
