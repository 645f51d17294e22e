"""What each message of a PostgreSQL client asks for, after start-up: operations out of messages.

`appliance.wire.pgfrontend` hands in whole messages, or the beginning of those that are too long to
be looked at whole; `held` tells it what has to wait. A message that raises Undecided changed
nothing, and is handed in again after the server has said more.

Theory of operation. In the extended protocol a statement is told by its Execute, with the text of
its Parse and the values of its Bind. So Parse and Bind are held back until the Execute that uses
them comes; the server need not answer before Sync or Flush either. When those come first, or when
too much would be held, what is still silent is announced then: a Parse as an operation of kind
"prepare", a Bind as the operation that a later Execute completes. Nothing is forwarded that no
record tells of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from appliance.sansio import Audit
from appliance.wire import pgmessages
from appliance.wire.pgmessages import Malformed
from appliance.wire.pgnames import MOST_PORTALS, Portal, Running, Statement
from appliance.wire.pgpipeline import Pipeline, Step
from appliance.wire.pgtypes import text_of
from appliance.wire.sql import EMPTY, NOT_KNOWN, Analysis
from capture.records import Gap

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_HELD_BYTES = 64 * 1024  #: of whole messages that wait for their Execute
_MOST_REASON_BYTES = 1024
_QUERY, _EXECUTE, _PARSE = Step.QUERY, Step.EXECUTE, Step.PARSE
_BIND, _DESCRIBE, _CLOSE = Step.BIND, Step.DESCRIBE, Step.CLOSE
_NOTHING = Analysis(EMPTY)
_FUNCTION = Analysis("FUNCTION")

#: The first word of a command decides whether the WAL sender's own grammar reads it
#: (replication_scanner_is_replication_command).
_REPLICATION = frozenset([
    "ALTER_REPLICATION_SLOT", "BASE_BACKUP", "CREATE_REPLICATION_SLOT", "DROP_REPLICATION_SLOT",
    "IDENTIFY_SYSTEM", "READ_REPLICATION_SLOT", "START_REPLICATION", "TIMELINE_HISTORY",
    "UPLOAD_MANIFEST",
])  # fmt: skip


class Requests:
    """Turns a client's messages into operations; every handler raises Malformed."""

    __slots__ = ("_pipeline", "_silent", "held")

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self.held = -1  #: offset of the first message that waits for its Execute, -1 for none
        self._silent: list[Statement | Portal] = []  #: what no operation has told of yet

    # -- simple protocol

    def _query(self, body: bytes, at: int, after: int, left: int) -> None:
        if self.held >= 0:
            self.announce()
        if not left:
            if body.find(0) != len(body) - 1:
                raise Malformed("a query is one string")
            body = body[:-1]
        pipeline = self._pipeline
        found = None if left or pipeline.replication else pipeline.names.single(body)
        if found is None:
            asked = self._ask_parts(body, at, after - at)
        else:
            text, analysis = found
            running = pipeline.ask("simple", analysis, text, at, after - at)
            if analysis.prepares is not None or analysis.deallocates is not None:
                self._rename(running, text, analysis)
            asked = [running]
        self._asked(_QUERY, asked)

    def _ask_parts(self, raw: bytes, at: int, length: int) -> list[Running]:
        """Ask for each statement of a text."""
        pipeline = self._pipeline
        text, parts, cut = pipeline.names.parts(raw)
        if pipeline.replication:
            word = text.split(None, 1)[0].rstrip(";").upper() if text.strip() else ""
            if word in _REPLICATION:
                return [pipeline.ask("simple", Analysis(word), text, at, length, truncated=cut)]
        if len(parts) <= 1:
            analysis = parts[0].analysis if parts else _NOTHING
            texts = [(text, analysis)]
        else:
            whole = text.encode()
            texts = [(whole[part.start : part.end].decode(), part.analysis) for part in parts]
        asked = []
        for text, analysis in texts:
            running = pipeline.ask("simple", analysis, text, at, length, truncated=cut)
            self._rename(running, text, analysis)
            asked.append(running)
        return asked

    def _rename(self, running: Running, text: str, analysis: Analysis) -> None:
        """Note what SQL's PREPARE, DEALLOCATE and DISCARD ALL do to names."""
        names = self._pipeline.names
        if analysis.prepares is not None:
            prepared = Analysis(analysis.prepared_verb, analysis.tables, analysis.fingerprint)
            statement = Statement(analysis.prepares.encode(), text, prepared)
            if names.define(statement):
                running.names = (statement,)
            else:
                self._no_room()
        elif analysis.deallocates:
            dropped = names.drop(analysis.deallocates.encode())
            running.names = () if dropped is None else (dropped,)
        elif analysis.deallocates is not None:
            running.names = names.drop_all()

    def _asked(self, step: Step, running: Any) -> None:
        """Expect the answer of an operation; in a batch that failed there is none."""
        pipeline = self._pipeline
        if step is _QUERY:
            pipeline.names.batch += 1
        if not pipeline.fate:
            pipeline.steps.append((step, running))
            return
        for one in running if step is _QUERY else (running,):
            pipeline.end(one, pipeline.fate)
            pipeline.names.void(one.names, later=True)

    def _function_call(self, body: bytes, at: int, after: int, left: int) -> None:
        if self.held >= 0:
            self.announce()
        oid, formats, position = pgmessages.function_call(body)
        running = self._pipeline.ask(
            "function", _FUNCTION, f"function {oid}", at, after - at,
            binds=pgmessages.values(body, position, formats, (), cut=left > 0), truncated=left > 0,
        )  # fmt: skip
        self._asked(_QUERY, [running])

    # -- extended protocol

    def _parse(self, body: bytes, at: int, after: int, left: int) -> None:
        cut = left > 0
        key, raw, oids = pgmessages.parse(body, cut=cut)
        self._hold(at, after)
        names = self._pipeline.names
        found = None if cut else names.single(raw)
        if found is not None:
            text, analysis = found
        else:
            text, parts, shortened = names.parts(raw)
            cut = cut or shortened
            analysis = parts[0].analysis if len(parts) == 1 and not cut else NOT_KNOWN
            if not parts:
                analysis = _NOTHING
        statement = Statement(key, text, analysis, oids, at, after, cut)
        room = names.define(statement)
        self._expect(_PARSE, statement)
        statement.silent = True
        self._silent.append(statement)
        if not room:
            self._no_room()
        if left or not room:
            self.announce()

    def _bind(self, body: bytes, at: int, after: int, left: int) -> None:
        key, name, formats, position = pgmessages.bind(body)
        pipeline = self._pipeline
        names = pipeline.names
        statement = names.meaning(name)
        if statement is None:
            statement = Statement(name, "", NOT_KNOWN)
        self._hold(at, after)
        binds = pgmessages.values(body, position, formats, statement.oids, cut=left > 0)
        portal = Portal(key, statement, binds, at, after)
        portals = names.portals
        replaced = portals.get(key)
        room = replaced is not None or len(portals) < MOST_PORTALS
        if replaced is not None and replaced.running is not None:
            pipeline.release(replaced)
        if room:
            portals[key] = portal
        if not pipeline.fate:
            pipeline.steps.append((_BIND, portal))
        portal.silent = True
        self._silent.append(portal)
        if left or not room:
            self.announce()
            if not room:
                self._no_room()

    def _execute(self, body: bytes, at: int, after: int, left: int) -> None:
        name = body[:-5]
        if left or len(body) < 5 or body.find(0) != len(name):
            raise Malformed("Execute is a name and a number")
        pipeline = self._pipeline
        portal = pipeline.names.portals.get(name)
        if portal is None:
            running = pipeline.ask("extended", NOT_KNOWN, "", at, after - at, name=text_of(name))
        elif portal.executed:
            running = self._ask_portal(portal, "fetch", at, after)
        elif portal.running is not None:
            portal.executed = True
            running = portal.running
            running.since = pipeline.now
        else:
            portal.executed = True
            running = self._first_execute(portal, at, after)
        self._asked(_EXECUTE, running)

    def _first_execute(self, portal: Portal, at: int, after: int) -> Running:
        """Ask for what a portal runs: this tells its Bind, and its Parse when that was silent."""
        statement = portal.statement
        if statement.silent:
            at = statement.offset
        elif portal.silent:
            at = portal.offset
        running = self._ask_portal(portal, "extended", at, after)
        portal.silent = statement.silent = False
        for thing in self._silent:
            if thing.silent:
                break
        else:
            self._silent.clear()
            self.held = -1
        analysis = statement.analysis
        if analysis.prepares is not None or analysis.deallocates is not None:
            self._rename(running, statement.text, analysis)
        return running

    def _ask_portal(self, portal: Portal, kind: str, at: int, after: int) -> Running:
        """Ask for what a portal runs; its values are told once."""
        statement = portal.statement
        binds, portal.binds = portal.binds, ()
        key = statement.key
        portal.running = running = self._pipeline.ask(
            kind, statement.analysis, statement.text, at, after - at, binds=binds,
            name=text_of(key) if key else "", truncated=statement.truncated, portal=portal,
        )  # fmt: skip
        return running

    def _describe(self, body: bytes, _at: int, after: int, left: int) -> None:
        letter, name = (b"P", b"") if body == b"P\0" else _target(body, left)
        if self.held >= 0:
            self._make_room(after)
        names = self._pipeline.names
        known = names.statements if letter == b"S" else names.portals
        thing = known.get(name)
        self._expect(_DESCRIBE, thing)

    def _close(self, body: bytes, _at: int, after: int, left: int) -> None:
        letter, name = _target(body, left)
        self._make_room(after)
        names = self._pipeline.names
        dropped = None
        if letter == b"S":
            dropped = names.drop(name)
        else:
            portal = names.portals.pop(name, None)
            if portal is not None:
                if portal.silent:
                    self.announce()
                self._pipeline.release(portal)
        self._expect(_CLOSE, dropped)

    def _sync(self, body: bytes, _at: int, _after: int, _left: int) -> None:
        if body:
            raise Malformed("Sync has no body")
        if self.held >= 0:
            self.announce()
        pipeline = self._pipeline
        steps = pipeline.steps
        if pipeline.copying is None or not steps or steps[0][0] is not _EXECUTE:
            pipeline.synced()

    def _flush(self, body: bytes, _at: int, _after: int, _left: int) -> None:
        _empty(body)
        if self.held >= 0:
            self.announce()

    def _copy_done(self, body: bytes, _at: int, _after: int, _left: int) -> None:
        _empty(body)
        if self.held >= 0:
            self.announce()
        self._pipeline.copying = None

    def _copy_fail(self, body: bytes, _at: int, _after: int, left: int) -> None:
        reason = body if left else pgmessages.cstring(body, 0)[0]
        if self.held >= 0:
            self.announce()
        running, self._pipeline.copying = self._pipeline.copying, None
        if running is not None and running.copied is not None:
            running.copied.failed = text_of(reason[:_MOST_REASON_BYTES])

    # -- what is held back

    def _hold(self, at: int, after: int) -> None:
        """Hold a message back until an Execute tells of it."""
        if self.held < 0:
            self.held = at
        elif self.held < after - MOST_HELD_BYTES:
            self.announce()
            self.held = at

    def _make_room(self, after: int) -> None:
        """Announce what is held when one more message would make it too much."""
        if 0 <= self.held < after - MOST_HELD_BYTES:
            self.announce()

    def announce(self) -> None:
        """Tell of everything that is silent, so that it may go."""
        pipeline = self._pipeline
        for thing in self._silent:
            if not thing.silent:
                continue
            thing.silent = False
            if isinstance(thing, Portal):
                running = self._ask_portal(thing, "extended", thing.offset, thing.end)
            else:
                running = pipeline.ask(
                    "prepare", thing.analysis, thing.text, thing.offset, thing.end - thing.offset,
                    name=text_of(thing.key), truncated=thing.truncated,
                )  # fmt: skip
                thing.running = running
            if pipeline.fate:
                pipeline.end(running, pipeline.fate)
        self._silent.clear()
        self.held = -1

    def _expect(self, step: Step, thing: Any) -> None:
        """Expect an answer; in a batch that failed there is none, and no name changes."""
        pipeline = self._pipeline
        if not pipeline.fate:
            pipeline.steps.append((step, thing))
        elif isinstance(thing, Statement) and step is not _DESCRIBE:
            pipeline.names.void((thing,), later=True)

    def _no_room(self) -> None:
        """Say once that names are not remembered any more."""
        names = self._pipeline.names
        if not names.full:
            names.full = True
            detail = "too many prepared statements or portals: some operations have no text"
            self._pipeline.out.append(Audit(Gap("session", "names", count=1, detail=detail)))

    def _terminate(self, body: bytes, _at: int, _after: int, _left: int) -> None:
        _empty(body)
        if self.held >= 0:
            self.announce()

    @classmethod
    def handlers(cls) -> dict[int, Callable[[Requests, bytes, int, int, int], None]]:
        """Return the handlers by the message's type."""
        return {
            ord("Q"): cls._query,
            ord("P"): cls._parse,
            ord("B"): cls._bind,
            ord("E"): cls._execute,
            ord("D"): cls._describe,
            ord("C"): cls._close,
            ord("S"): cls._sync,
            ord("H"): cls._flush,
            ord("F"): cls._function_call,
            ord("c"): cls._copy_done,
            ord("f"): cls._copy_fail,
            ord("X"): cls._terminate,
        }


def _target(body: bytes, left: int) -> tuple[bytes, bytes]:
    """Return (b"S" or b"P", name) of Describe and Close."""
    letter = body[:1]
    name, position = pgmessages.cstring(body, 1)
    if left or letter not in (b"S", b"P") or position != len(body):
        raise Malformed("Describe and Close are a letter and a name")
    return letter, name


def _empty(body: bytes) -> None:
    if body:
        raise Malformed("a message that has no body has one")


HANDLERS = Requests.handlers()
