"""Bearer tokens of the review API: who may do what. Only their digests are kept.

The command line makes and revokes them; the API looks every request's token up, in the file as it
is at that moment, so that a revoked token is refused at once. A token is 256 random bits, so its
plain SHA-256 gives nothing away and needs no salt.

The file, STATE/review-tokens.json, mode 0600: {"tokens": [{id, name, role, sha256, created,
revoked}]}, times RFC 3339, `revoked` null while the token is good.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import stat
import time
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from capture.errors import EvidenceError, KeyFileError
from capture.ledger import sync_directory, write_file
from capture.moment import rfc3339

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FILE = "review-tokens.json"
PREFIX = "narrows_"  #: lets scanners for leaked secrets know one
MOST_NAME = 64


class Right(Enum):
    """What a request may need."""

    METADATA = "metadata"  #: who, when, where to, how much
    PAYLOAD = "payload"  #: what was said: statements, results, bytes, and searching in them
    KILL = "kill"
    AUDIT = "audit"  #: who read what


class Role(Enum):
    """What a token may do; each role may do what the one before it may."""

    VIEWER = "viewer"
    REVIEWER = "reviewer"
    RESPONDER = "responder"
    ADMIN = "admin"

    @property
    def rights(self) -> frozenset[Right]:
        """Return what the role may do."""
        return _RIGHTS[self]


_RIGHTS = {
    role: frozenset(list(Right)[:number])
    for number, role in enumerate(Role, 1)
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Token:
    """What is kept of a token."""

    id: str
    name: str
    role: Role
    sha256: str
    created: str
    revoked: str | None = None


class UnknownToken(Exception):
    """No token has this id or name, or it is revoked already."""


def make(role: Role, name: str = "") -> tuple[str, Token]:
    """Return a new token's text, which is kept nowhere, and what is to be kept of it.

    ValueError for a name that is too long or cannot be printed on one line.
    """
    if len(name) > MOST_NAME or not name.isprintable() or not name.isascii():
        raise ValueError(f"a name has at most {MOST_NAME} plain letters")
    text = PREFIX + secrets.token_urlsafe(32)
    return text, Token(secrets.token_hex(4), name, role, _digest(text), rfc3339(time.time_ns()))


class Tokens:
    """The tokens of one state directory."""

    def __init__(self, state: Path) -> None:
        self._path = state / FILE
        self._seen: tuple[int, int, int] | None = None
        self._good: dict[str, Token] = {}

    def add(self, token: Token) -> None:
        """Keep a token: from now on it is good."""
        with self._alone():
            self._write([*self.all(), token])

    def chosen(self, which: str) -> list[Token]:
        """Return the good token of this id, or all good ones of this name; UnknownToken when there
        is none.
        """
        good = [token for token in self.all() if token.revoked is None]
        found = [t for t in good if t.id == which] or [t for t in good if which and t.name == which]
        if not found:
            raise UnknownToken(which)
        return found

    def revoke(self, tokens: list[Token]) -> None:
        """Revoke tokens: from now on they are refused."""
        gone = {token.id for token in tokens}
        now = rfc3339(time.time_ns())
        with self._alone():
            kept = [
                replace(t, revoked=now) if t.id in gone and t.revoked is None else t
                for t in self.all()
            ]
            self._write(kept)

    def all(self) -> list[Token]:
        """Return every token, revoked ones too; KeyFileError when the file cannot be used."""
        try:
            with self._path.open("rb") as file:
                if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                    raise KeyFileError(f"{self._path} may be read by others; chmod 600 it")
                told = json.loads(file.read())
            return [Token(**{**entry, "role": Role(entry["role"])}) for entry in told["tokens"]]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError, KeyError) as wrong:
            raise KeyFileError(f"{self._path} cannot be used: {wrong}") from wrong

    def find(self, text: str) -> Token | None:
        """Return the good token with this text, or None. KeyFileError when the file cannot be
        used: then nobody is let in.
        """
        self._refresh()
        return self._good.get(_digest(text))

    def good(self, token: Token) -> bool:
        """Say whether a token that was found earlier is still good."""
        self._refresh()
        return self._good.get(token.sha256) == token

    def _refresh(self) -> None:
        try:
            found = self._path.stat()
            seen = (found.st_ino, found.st_mtime_ns, found.st_size)
        except FileNotFoundError:
            seen = (0, 0, 0)
        if seen != self._seen:
            self._seen, self._good = None, {}
            self._good = {token.sha256: token for token in self.all() if token.revoked is None}
            self._seen = seen

    def _write(self, tokens: list[Token]) -> None:
        told = [{**asdict(token), "role": token.role.value} for token in tokens]
        write_file(self._path, json.dumps({"tokens": told}, indent=1).encode() + b"\n")
        sync_directory(self._path.parent)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            lock = os.open(
                self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
        except OSError as wrong:
            raise EvidenceError(f"tokens cannot be kept: {wrong}") from wrong
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
