"""The pcapng export: a session's packets, given to the program that writes them.

scapy is GPL-2.0-only. So it is used by a program of its own (`python -m capture.export.pcapng`),
which imports nothing of ours and which nothing of ours imports; this side feeds its standard input
and reads its standard output. The program lives no longer than whoever reads from it, and is
killed when it does not go on for `STALL_S`.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capture import plainjson
from capture.errors import ExportError
from capture.export.identity import lines
from capture.export.packets import packets, survey

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator

    from capture.index_query import Session
    from capture.reader import Reader

PROGRAM = Path(__file__).with_name("pcapng.py")
STALL_S = 60.0
PIECE_BYTES = 256 << 10
MOST_SAID = 4_096
_NOWHERE = ("0.0.0.0", 0)  #: stands for an address that is not recorded


def export(reader: Reader, sessions: Iterable[Session]) -> Generator[bytes, None, None]:
    """Yield a capture file with a section for each session; ExportError when it cannot be made."""
    return fed(_input(reader, sessions))


def _input(reader: Reader, sessions: Iterable[Session]) -> Iterator[bytes | memoryview]:
    """Yield what the program reads, see there."""
    for session in sessions:
        known = survey(reader.records(session.number))
        client, target = _ends(session)
        yield _line(
            section="\n".join(lines(session, known)), name=f"narrows-{session.name}",
            client=client, target=target,
        )  # fmt: skip
        for packet in packets(reader, session, known):
            yield _line(
                time=packet.time_ns, client=packet.from_client, flags=packet.flags,
                sequence=packet.sequence, acknowledged=packet.acknowledged,
                comments=packet.comments, size=len(packet.data),
            )  # fmt: skip
            if packet.data:
                yield packet.data
    yield _line(end=True)


def _line(**fields: Any) -> bytes:
    return plainjson.dumps(fields).encode() + b"\n"


def _ends(session: Session) -> list[tuple[str, int]]:
    """Return both addresses and ports, of one family."""
    found = []
    for text in (session.client, session.target):
        host, colon, port = text.rpartition(":")
        found.append((host.strip("[]"), int(port)) if colon else _NOWHERE)
    if any(":" in host for host, _ in found):
        found = [(host if ":" in host else f"::ffff:{host}", port) for host, port in found]
    return found


def fed(
    source: Iterator[bytes | memoryview], argv: tuple[str, ...] = (), stall_s: float = STALL_S
) -> Generator[bytes, None, None]:
    """Run the program (or another) on `source` and yield what it prints; ExportError when it fails
    or stalls. It is killed when the generator is closed.
    """
    process = subprocess.Popen(
        argv or (sys.executable, "-I", str(PROGRAM)), cwd="/", start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/nonexistent"},
    )  # fmt: skip
    try:
        pump = _Pump(process, source, stall_s)
        yield from pump.pieces()
        if process.wait(stall_s) != 0:
            raise ExportError(pump.why())
    except subprocess.TimeoutExpired as wrong:
        raise ExportError("the program that writes pcapng does not end") from wrong
    finally:
        if process.poll() is None:
            process.kill()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        process.wait()


class _Pump:
    """Moves bytes into and out of a process, whichever goes, on one thread."""

    def __init__(
        self, process: subprocess.Popen[bytes], source: Iterator[bytes | memoryview], stall_s: float
    ) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self._source, self._stall_s = source, stall_s
        self._process, self._in = process, process.stdin.fileno()
        self._out, self._said = process.stdout.fileno(), process.stderr.fileno()
        self._left = memoryview(b"")
        self._words = b""
        for fd in (self._in, self._out, self._said):
            os.set_blocking(fd, False)

    def why(self) -> str:
        """Return what the program said when it failed."""
        said = self._words.decode("utf-8", "backslashreplace").strip().splitlines()
        return said[-1] if said else f"the program ended with {self._process.returncode}"

    def pieces(self) -> Iterator[bytes]:
        """Yield what it prints, to its end."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._in, selectors.EVENT_WRITE)
            for fd in (self._out, self._said):
                selector.register(fd, selectors.EVENT_READ)
            moved = time.monotonic()
            while selector.get_map():
                for key, _ in selector.select(1.0):
                    piece, goes_on = self._move(key.fd)
                    if piece:
                        yield piece
                    if not goes_on:
                        selector.unregister(key.fd)
                    moved = time.monotonic()
                if time.monotonic() - moved > self._stall_s:
                    raise ExportError("the program that writes pcapng does not go on")

    def _move(self, fd: int) -> tuple[bytes, bool]:
        """Return (what was printed, whether there may be more)."""
        if fd == self._in:
            return b"", self._write()
        piece = os.read(fd, PIECE_BYTES)
        if fd == self._said:
            self._words = (self._words + piece)[:MOST_SAID]
            return b"", bool(piece)
        return piece, bool(piece)

    def _write(self) -> bool:
        if not self._left:
            self._left = memoryview(self._gathered())
        if self._left:
            try:
                self._left = self._left[os.write(self._in, self._left) :]
            except BlockingIOError:
                return True  # less room than one page; later
            except BrokenPipeError:
                return False  # it ended, and says why
            return True
        assert self._process.stdin is not None
        self._process.stdin.close()
        return False

    def _gathered(self) -> bytes:
        found: list[bytes | memoryview] = []
        size = 0
        for piece in self._source:
            found.append(piece)
            size += len(piece)
            if size >= PIECE_BYTES:
                break
        return b"".join(found)
