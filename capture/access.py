"""The Access record of a read: who read what, in the evidence before anything is shown (ADR 5).

The command line opens an `AccessLog` for every command that reads, whether or not the gate and the
seal run. Opening it also recovers what dead writers left, so that the answer includes it. When a
record cannot be made durable, EvidenceError is raised and the caller shows nothing; on a full disk
the space that writers hold back for readers is used first (`capture.reserve`).
"""

from __future__ import annotations

import os
import pwd
import time
from typing import TYPE_CHECKING, Self

from capture.errors import EvidenceError
from capture.records import Access, Decision
from capture.segment import SegmentWriter
from capture.settings import SMALL

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    from capture.crypt import Keys
    from capture.store import Store

#: Sessions that one record names at most; more of them are several records.
MOST_OBJECTS = 1_000
MOST_QUERY = 4_096
_UNSET = 0xFFFFFFFF
_LOGIN_UID = "/proc/self/loginuid"


class AccessLog:
    """Writes Access records in a stream of its own; a context manager."""

    def __init__(self, store: Store, keys: Keys) -> None:
        """Open the stream; EvidenceError when it cannot be written."""
        try:
            self._writer = SegmentWriter(store, keys, "cli", role="cli", settings=SMALL)
        except OSError as refused:
            raise EvidenceError(f"evidence cannot be written: {refused.strerror}") from refused

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.close("read")

    def record(
        self, action: str, query: str, objects: Sequence[str] = (), outcome: str = "allowed"
    ) -> None:
        """Record a read and wait until it is durable; EvidenceError when it cannot be."""
        who, asked = actor(), query[:MOST_QUERY]
        for start in range(0, len(objects) or 1, MOST_OBJECTS):
            named = tuple(objects[start : start + MOST_OBJECTS])
            record = Access(who, action, asked, named, outcome)
            self._writer.record(0, record, time.time_ns())
        self._writer.wait_durable()

    def decide(self, action: str, reason: str) -> None:
        """Record that a person did something to the appliance, durably; EvidenceError when that
        cannot be: then it is not to be done.
        """
        self._writer.record(0, Decision(actor(), action, reason, "done"), time.time_ns())
        self._writer.wait_durable()


def actor(login_uid: Path | str = _LOGIN_UID) -> str:
    """Return who runs this process: "uid:0(root) login:1000(alice) sudo:1000(alice)".

    The uid is the kernel's word, and so is the login uid, which survives su and sudo; what sudo
    left in the environment is the caller's.
    """
    words = [person_of(os.getuid(), login_uid)]
    sudo, name = os.environ.get("SUDO_UID", ""), os.environ.get("SUDO_USER", "")
    if sudo or name:
        claimed = f"sudo:{sudo[:20]}({name[:64]})"
        words.append(claimed.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))
    return " ".join(words)


def person_of(uid: int, login_uid: Path | str) -> str:
    """Return what the kernel says of a process: "uid:0(root) login:1000(alice)"."""
    words = [f"uid:{_person(uid)}"]
    try:
        with open(login_uid, encoding="ascii") as file:
            login = int(file.read())
    except (OSError, ValueError):
        login = _UNSET  # a kernel without audit
    if login != _UNSET:
        words.append(f"login:{_person(login)}")
    return " ".join(words)


def _person(uid: int) -> str:
    try:
        return f"{uid}({pwd.getpwuid(uid).pw_name})"
    except KeyError:
        return str(uid)
