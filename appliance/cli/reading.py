"""What every command that reads evidence does first: record the read, then bring the index up to
date.

A read that cannot be recorded is refused before anything of it is shown (ADR 5). The index is
filled by the command itself, from the last commit that the seal indexed to the last one on disk, so
that a listing holds what is on disk now, also when the seal is behind or down; what it adds is
written into the index and need not be done again. On a disk that takes no changes a copy in memory
is filled instead.
"""

from __future__ import annotations

import sqlite3
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from appliance.cli import settings
from appliance.cli.outcome import NOT_FOUND, REFUSED, UNAVAILABLE, USAGE, Refusal
from appliance.cli.printable import printable
from capture import index_query, plainjson
from capture.access import AccessLog
from capture.crypt import Keys
from capture.errors import EvidenceError
from capture.index import IndexUnusable
from capture.index_fill import current
from capture.reader import Reader
from capture.store import Store

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from appliance.config import Config
    from capture.index import Index
    from capture.index_query import Session

_NOT_ASKED = frozenset({"run", "config", "json"})


@dataclass(frozen=True, slots=True)
class Evidence:
    """The evidence that a command reads; nothing was read yet."""

    config: Config
    store: Store
    keys: Keys
    words: argparse.Namespace
    log: AccessLog

    def record(
        self, action: str, sessions: Sequence[Session] = (), outcome: str = "allowed"
    ) -> None:
        """Record the read; Refusal when that cannot be done."""
        names = [session.name for session in sessions]
        try:
            self.log.record(action, query(self.words), names, outcome)
        except EvidenceError as wrong:
            raise refusal(wrong) from wrong

    @contextmanager
    def index(self) -> Iterator[Index]:
        """Give the index, up to date; Refusal when it cannot be used."""
        try:
            with current(self.store, self.keys) as index:
                yield index
        except (IndexUnusable, sqlite3.Error) as wrong:
            hint = "narrows evidence reindex makes it anew"
            raise Refusal(f"the index cannot be used: {wrong}", hint) from wrong

    def reader(self, index: Index) -> Reader:
        """Return a reader of sessions."""
        return Reader(self.store, self.keys, index)

    def named(self, index: Index, action: str, names: Sequence[str]) -> list[Session]:
        """Return the sessions of these ids or unique beginnings of ids.

        Refusal when one is not known; that is recorded too.
        """
        found = []
        for name in names:
            numbers = index_query.named(index, name)
            if len(numbers) != 1:
                self.record(action, outcome="not-found")
                shown = printable(name)
                if numbers:
                    hint = "give more of its letters"
                    raise Refusal(f"more than one session begins with {shown}", hint, code=USAGE)
                hint = "narrows sessions list shows them"
                raise Refusal(f"no session is called {shown}", hint, code=NOT_FOUND)
            session = index_query.session(index, numbers[0])
            assert session is not None, "it was found a moment ago"
            found.append(session)
        return found


@contextmanager
def evidence(words: argparse.Namespace) -> Iterator[Evidence]:
    """Open the evidence that the words mean, ready to record; Refusal when that is impossible."""
    config = settings.chosen(words)
    store = Store(config.paths.state, config.paths.run)
    try:
        keys = Keys.load(store.state)
    except (OSError, EvidenceError) as wrong:
        hint = "run as root on the appliance, or name its configuration with --config"
        raise Refusal(f"the evidence cannot be opened: {wrong}", hint, code=UNAVAILABLE) from wrong
    try:
        log = AccessLog(store, keys)
    except EvidenceError as wrong:
        raise refusal(wrong) from wrong
    with log:
        yield Evidence(config, store, keys, words, log)


def query(words: argparse.Namespace) -> str:
    """Return what was asked for, as the Access record says it."""
    given: dict[str, Any] = {}
    for name, value in vars(words).items():
        if name not in _NOT_ASKED and value not in (None, False, [], ""):
            given[name] = value if isinstance(value, int | str | list) else str(value)
    return plainjson.dumps(given)


def refusal(wrong: EvidenceError) -> Refusal:
    """Return what a command ends with when its read cannot be recorded."""
    hint = "nothing was read; make space on the disk of the state directory"
    return Refusal(f"the read cannot be recorded: {wrong}", hint, code=REFUSED)


def tell_damage(reader: Reader) -> bool:
    """Say on stderr what could not be read; return whether there was anything."""
    for damage in reader.damage:
        print(
            f"narrows: segment {damage.generation:08x} at {damage.offset}:"
            f" {printable(damage.reason)}",
            file=sys.stderr,
        )
    return bool(reader.damage)
