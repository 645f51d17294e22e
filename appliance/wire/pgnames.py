"""Prepared statements and portals of a PostgreSQL session: what a name means.

`appliance.wire.pgpipeline` owns one `Names` a session.

A client may pipeline Parse, Bind and Execute, so a definition counts from the moment it is asked
for. But one that failed, or that the server discarded, never happened, and the name keeps what it
meant before: otherwise a Parse that fails on purpose would make the next Execute look like another
statement than the one that runs. So a statement remembers what it replaced (`previous`) until the
server confirms it, and `undo` takes it out again, also from the middle of a chain of definitions
that are not confirmed yet. A name that was closed is a statement too, one that is `gone`.

Within a batch (up to Sync, or one simple query) that is certain enough: what fails takes all that
follows with it. A later batch does not share the fate of an earlier one, so a Bind there has to
wait until it is known what its name means: `Undecided`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from appliance.wire.pgencoding import UTF8, read, whole_characters
from appliance.wire.sql import NOT_KNOWN, Part

if TYPE_CHECKING:
    from collections.abc import Iterable

    from appliance.wire.pgmessages import Columns
    from appliance.wire.sql import Analyser, Analysis

MOST_TEXT_BYTES = 64 * 1024  #: of one statement that a record shows
MOST_NAMES_BYTES = 4 * 1024 * 1024  #: names and texts of the prepared statements of one session
MOST_PORTALS = 1_024  #: bound and not executed yet

_ENTRY_BYTES = 512  #: what a prepared statement costs besides its name and text


class Undecided(Exception):
    """What a name means depends on an answer that has not come yet."""


class Statement:
    """A prepared statement; `gone` when a name has none any more."""

    __slots__ = (
        "analysis", "batch", "columns", "end", "gone", "key", "offset", "oids", "previous",
        "running", "silent", "size", "text", "truncated",
    )  # fmt: skip

    def __init__(
        self, key: bytes, text: str, analysis: Analysis, oids: tuple[int, ...] = (),
        offset: int = 0, end: int = 0, truncated: bool = False, gone: bool = False,  # noqa: FBT001, FBT002 - hot
    ) -> None:  # fmt: skip
        self.key = key  #: its name, as the client wrote it
        self.text = text
        self.size = _ENTRY_BYTES + len(key) + len(text)  #: what it counts in the session's budget
        self.analysis = analysis
        self.oids = oids  #: types of its parameters, 0 where not known
        self.offset = offset  #: of its Parse in the client's half-stream
        self.end = end
        self.truncated = truncated
        self.gone = gone
        self.columns: Columns = ()
        self.silent = False  #: its Parse is held back, and no Operation has told of it yet
        self.previous: Statement | None = None
        self.batch = 0  #: in which its name was given to it
        self.running: Running | None = None  #: the Operation of its Parse, if that had one


class Portal:
    """A statement with values."""

    __slots__ = (
        "binds", "columns", "end", "executed", "key", "offset", "running", "silent", "statement",
    )  # fmt: skip

    def __init__(
        self, key: bytes, statement: Statement, binds: tuple[Any, ...], offset: int, end: int
    ) -> None:
        self.key = key  #: its name, as the client wrote it
        self.statement = statement
        self.binds = binds
        self.offset = offset  #: of its Bind in the client's half-stream
        self.end = end
        self.columns: Columns = ()
        self.silent = False  #: its Bind is held back, and no Operation has told of it yet
        self.executed = False
        self.running: Running | None = None  #: its Operation


class Copied:
    """CopyData of one operation: messages, and the bytes inside them."""

    __slots__ = ("direction", "down_bytes", "down_messages", "failed", "up_bytes", "up_messages")

    def __init__(self, direction: str) -> None:
        self.direction = direction  #: "in", "out" or "both"
        self.up_messages = self.up_bytes = self.down_messages = self.down_bytes = 0
        self.failed = ""  #: the client's own reason to give up (CopyFail)

    def detail(self) -> dict[str, Any]:
        """Return what a Result says of it."""
        found: dict[str, Any] = {"direction": self.direction}
        if self.direction != "out":
            found |= {"messages_up": self.up_messages, "bytes_up": self.up_bytes}
        if self.direction != "in":
            found |= {"messages_down": self.down_messages, "bytes_down": self.down_bytes}
        if self.failed:
            found["failed"] = self.failed
        return found


class Running:
    """An operation, and what is known of its result so far."""

    __slots__ = (
        "bytes", "columns", "copied", "detail", "done", "ended", "error", "names", "number",
        "portal", "rows", "since", "tag",
    )  # fmt: skip

    def __init__(self, number: int, since: int, portal: Portal | None = None) -> None:
        self.number = number
        self.since = since  #: when its last byte came, ns
        self.portal = portal
        self.ended = 0  #: when the last byte of its result came, ns
        self.tag = ""
        self.rows = 0
        self.bytes = 0
        self.columns: Columns | None = None
        self.copied: Copied | None = None
        self.names: tuple[Statement, ...] = ()  #: what SQL's PREPARE and DEALLOCATE do to names
        self.error: dict[str, str] | None = None  #: fields of its ErrorResponse
        self.done = False  #: its Result is written
        self.detail: dict[str, Any] | None = None


class Names:
    """What names mean now, and how texts are read."""

    __slots__ = (
        "_analyser", "_bytes", "_voided", "batch", "encoding", "full", "portals",
        "standard_strings", "statements",
    )  # fmt: skip

    def __init__(self, analyser: Analyser) -> None:
        self._analyser = analyser
        self._bytes = 0
        self.full = False  #: there was no room for a name, and a Gap says so
        self._voided: list[Statement] = []  #: undone when the Sync comes that ends the discarding
        self.batch = 0  #: number of the batch that the client sends now
        self.statements: dict[bytes, Statement] = {}
        self.portals: dict[bytes, Portal] = {}
        self.encoding: str | None = UTF8
        self.standard_strings = True  #: standard_conforming_strings: a backslash is a backslash

    def single(self, raw: bytes) -> tuple[str, Analysis] | None:
        """Return the text and analysis of what is known to be one statement; the quick way."""
        if self.encoding is UTF8 and self.standard_strings:
            try:
                text = raw.decode()
            except UnicodeDecodeError:
                return None
            found = self._analyser.single(text)
            if found is not None:
                return text, found
        return None

    def parts(self, raw: bytes) -> tuple[str, tuple[Part, ...], bool]:
        """Return (text, its statements, whether it was cut); parts count in bytes of UTF-8.

        What cannot be certain is not known: a text in another encoding than the one announced, one
        that was cut, and one with backslashes that may be escapes.
        """
        cut = len(raw) > MOST_TEXT_BYTES
        if cut:
            raw = whole_characters(raw[:MOST_TEXT_BYTES])
        text, certain = read(raw, self.encoding)
        if cut or not certain or (not self.standard_strings and "\\" in text):
            return text, (Part(0, len(text.encode()), NOT_KNOWN),), cut
        return text, self._analyser.parts(text), cut

    def meaning(self, key: bytes) -> Statement | None:
        """Return the statement that a name means now. Raises Undecided."""
        found = self.statements.get(key)
        if found is None:
            return None
        if found.previous is not None and found.batch != self.batch:
            raise Undecided
        return None if found.gone else found

    def define(self, statement: Statement) -> bool:
        """Let a name mean `statement` from here on; False when there is no room for it.

        Without room the name means nothing: better unknown than an older statement.
        """
        current = self.statements.get(statement.key)
        if not statement.gone and self._bytes + statement.size > MOST_NAMES_BYTES:
            if current is not None:
                del self.statements[statement.key]
                self._forget(current)
            return False
        statement.previous = current
        statement.batch = self.batch
        self.statements[statement.key] = statement
        self._bytes += statement.size
        return True

    def _forget(self, statement: Statement | None) -> None:
        """Give back the room of a chain of definitions."""
        while statement is not None:
            self._bytes -= statement.size
            previous, statement.previous = statement.previous, None
            statement = previous

    def drop(self, key: bytes) -> Statement | None:
        """Let a name mean nothing from here on; None when it meant nothing."""
        if key not in self.statements:
            return None
        statement = Statement(key, "", NOT_KNOWN, gone=True)
        self.define(statement)
        return statement

    def drop_all(self) -> tuple[Statement, ...]:
        """Let every name mean nothing from here on."""
        dropped = [self.drop(key) for key in list(self.statements)]
        return tuple(statement for statement in dropped if statement is not None)

    def confirm(self, statement: Statement) -> None:
        """The server did what `define` or `drop` assumed."""
        if statement.previous is not None:
            self._forget(statement.previous)
            statement.previous = None
        if statement.gone and self.statements.get(statement.key) is statement:
            del self.statements[statement.key]
            self._bytes -= statement.size

    def undo(self, statement: Statement) -> None:
        """The server did not do it."""
        current = self.statements.get(statement.key)
        if current is statement:
            if statement.previous is None:
                del self.statements[statement.key]
            else:
                self.statements[statement.key] = statement.previous
            self._bytes -= statement.size
            return
        while current is not None:
            if current.previous is statement:
                current.previous = statement.previous
                self._bytes -= statement.size
                return
            current = current.previous

    def confirm_all(self, statements: Iterable[Statement]) -> None:
        """Confirm several, in order."""
        for statement in statements:
            self.confirm(statement)

    def undo_all(self, statements: Iterable[Statement]) -> None:
        """Undo several, the last one first."""
        for statement in reversed(list(statements)):
            self.undo(statement)

    def void(self, statements: Iterable[Statement], *, later: bool) -> None:
        """The server discards these; `later`: until Sync, the client still means them."""
        if later:
            self._voided.extend(statements)
        else:
            self.undo_all(statements)

    def undo_voided(self) -> None:
        """The Sync came."""
        self.undo_all(self._voided)
        self._voided.clear()
