"""Running sessions: what each gate worker's control socket answers, and how other processes ask.

A worker listens on `run/gate-N.sock`; one JSON object a line, asked and answered. Only root may
ask. The command line and the review API use the functions at the end. Killing a session is a
Decision record in the evidence. Its actor is what the kernel says of the process that asks; for
whom a process asks, as the review API does for a token, is its own word, and stands before that:
"token:ID(NAME) peer:ADDRESS via uid:0(root)".
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, Protocol

from capture import index_query
from capture.access import person_of
from capture.frames import session_name, session_number
from capture.index_query import Session, State, endpoint
from capture.moment import rfc3339
from capture.session_json import SessionObject, session_object

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from capture.index import Index

log = logging.getLogger("narrows.live")

MOST_BYTES = 1 << 16
MOST_ACTOR = 1_000
_PEER = struct.Struct("3i")


class AlreadyRuns(Exception):
    """Another process is this gate worker."""


@contextlib.contextmanager
def alone(run: Path, number: int) -> Iterator[None]:
    """Be gate worker `number` of the run directory, or raise AlreadyRuns.

    Two of one number would take each other's control socket, and sessions that nobody can see or
    kill would be left. The lock goes with its process, however that ends.
    """
    fd = os.open(run / f"gate-{number}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRuns(f"gate worker {number} runs already in {run}") from None
        yield
    finally:
        os.close(fd)


class Sessions(Protocol):
    """What the control socket needs of a worker."""

    def list_sessions(self) -> list[dict[str, Any]]:
        """Return the running sessions."""
        ...

    def kill(self, session: int, actor: str, reason: str) -> bool:
        """End a session; False when it is not here."""
        ...

    def stats(self) -> dict[str, Any]:
        """Return the worker's counters."""
        ...


class ControlSocket:
    """The serving side, on the worker's own loop."""

    def __init__(self, sessions: Sessions, path: Path) -> None:
        self._sessions, self._path = sessions, path
        self._server: asyncio.AbstractServer | None = None

    async def start(self) -> None:
        """Listen."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        self._server = await asyncio.start_unix_server(
            self._serve, str(self._path), limit=MOST_BYTES
        )
        os.chmod(self._path, 0o600)

    async def stop(self) -> None:
        """Stop listening and remove the socket."""
        if self._server is not None:
            self._server.close()
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            sock = writer.get_extra_info("socket")
            pid, uid, _ = _PEER.unpack(
                sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
            )
            if uid != 0:
                log.warning("uid %d asked on the control socket", uid)
                return
            peer = person_of(uid, f"/proc/{pid}/loginuid")
            while line := await asyncio.wait_for(reader.readline(), 30):
                writer.write(json.dumps(self._answer(line, peer)).encode() + b"\n")
                await writer.drain()
        except (OSError, ValueError, TimeoutError) as wrong:
            log.info("control connection ended: %s", wrong)
        finally:
            writer.close()

    def _answer(self, line: bytes, peer: str) -> dict[str, Any]:
        try:
            question = json.loads(line)
            match question.get("do"):
                case "list":
                    return {"sessions": self._sessions.list_sessions()}
                case "kill":
                    number = session_number(str(question["session"]))
                    reason = str(question.get("reason", ""))
                    done = self._sessions.kill(number, _actor(question, peer), reason)
                    return {"done": done}
                case "stats":
                    return self._sessions.stats()
        except (ValueError, KeyError, AttributeError) as wrong:
            return {"error": f"cannot be understood: {wrong}"}
        return {"error": "unknown question"}


def _actor(question: dict[str, Any], peer: str) -> str:
    """Return who acts; ValueError when a process asks for somebody that no token names."""
    if "for" not in question:
        return peer
    whom = str(question["for"])
    if not whom.startswith("token:"):
        raise ValueError("one can ask for a token only")
    return f"{whom[:MOST_ACTOR]} via {peer}"


def ask(path: Path, question: dict[str, Any], *, timeout_s: float = 5.0) -> dict[str, Any]:
    """Ask one worker; OSError when it does not answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        sock.connect(str(path))
        sock.sendall(json.dumps(question).encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            piece = sock.recv(1 << 16)
            if not piece:
                raise ConnectionResetError("the gate ended the control connection")
            answer += piece
    found: dict[str, Any] = json.loads(answer)
    return found


class RunningObject(SessionObject):
    """A session that runs now, as its worker counts it; `unsent`: bytes that a slow peer has not
    taken.
    """

    unsent: int


def running_object(index: Index, told: dict[str, Any]) -> RunningObject:
    """Return the session object with the worker's own counts; the index may not know it yet."""
    known = index_query.session(index, session_number(told["id"])) or _unindexed(told)
    return {
        **session_object(known),
        "client": endpoint(*told["client"]),
        "target": endpoint(*told["target"]),
        "protocol": told["protocol"] or None,
        "route": told["route"],
        "started": rfc3339(told["started"]),
        "state": "running",
        "operations": told["operations"],
        "bytes_up": told["bytes_up"],
        "bytes_down": told["bytes_down"],
        "unsent": told["unsent"],
    }


def _unindexed(told: dict[str, Any]) -> Session:
    return Session(
        number=session_number(told["id"]), started=told["started"], ended=None,
        state=State.RUNNING, client="", target="", route=None, worker=None,
        account=told.get("service_account"), assurance=None, how=None, unknown=None, owner=None,
        protocol=None, bytes_up=0, bytes_down=0, operations=0, denied=0, errors=0, hidden=0,
        gaps=0, alarms=0, reason=None, ended_by=None,
    )  # fmt: skip


def workers(run: Path) -> list[Path]:
    """Return the control sockets that are there."""
    return sorted(run.glob("gate-*.sock"))


def ask_all(run: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return what the workers say of their sessions, and why each silent one did not answer."""
    found: list[dict[str, Any]] = []
    silent: dict[str, str] = {}
    for path in workers(run):
        try:
            found += ask(path, {"do": "list"})["sessions"]
        except (OSError, ValueError, KeyError) as wrong:
            silent[path.name] = str(wrong)
    return found, silent


def kill(run: Path, session: int, reason: str, whom: str = "") -> bool:
    """End a session wherever it runs; False when no worker has it. `whom` is the token for which
    this process asks.
    """
    question = {"do": "kill", "session": session_name(session), "reason": reason}
    if whom:
        question["for"] = whom
    for path in workers(run):
        with contextlib.suppress(OSError):
            if ask(path, question).get("done"):
                return True
    return False
