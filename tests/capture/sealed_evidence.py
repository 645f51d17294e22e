"""What the tests of seal and verifier share: evidence on disk, and processes that write and seal.

Also a program, for processes that are there to be killed:

    python sealed_evidence.py write STATE RUN SEED    sessions without end; a line for each closed
    python sealed_evidence.py seal STATE RUN PACE     a seal; a line when it is ready
    python sealed_evidence.py rewrite STATE RUN PACE  the same, which rewrites what is finished
"""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from capture.compression import decompress
from capture.crypt import Keys
from capture.ledger import Ledger, load_signer
from capture.records import (
    Access,
    Attributed,
    Decision,
    Gap,
    Heartbeat,
    Operation,
    Result,
    SessionClose,
    SessionOpen,
)
from capture.seal import Seal
from capture.sealed import RewriteSettings
from capture.segment import SegmentWriter
from capture.settings import WriterSettings
from capture.store import Store
from capture.verify import verify

TINY = WriterSettings(
    chunk_bytes=64 << 10, chunk_count=4, segment_bytes=256 << 10, commit_s=0.002, reserve_bytes=0
)
#: Packs of a few commits, at once.
REWRITE = RewriteSettings(after_s=-1, window_bytes=128 << 10, reserve_bytes=0)


class Evidence:
    """One appliance's directories."""

    def __init__(self, state: Path, run: Path) -> None:
        self.state, self.run = state, run
        self.store = Store(state, run)
        self.store.prepare()
        self.keys = Keys.load_or_create(state)

    def writer(self, stream="gate-0", **more) -> SegmentWriter:
        return SegmentWriter(
            self.store, self.keys, stream, role="gate", settings=TINY, config_sha256="ab" * 32,
            **more,
        )  # fmt: skip

    def seal(self, pace_s=0.05, rewrite=None) -> Seal:
        return Seal(self.store, self.keys, pace_s, rewrite)

    def sealed(self) -> None:
        """Seal everything that is on disk."""
        seal = self.seal()
        while seal.step():
            pass
        seal.step()  # a recovered incarnation is settled one step later
        seal.step()
        seal.close()

    def rewritten(self) -> None:
        """Seal everything that is on disk, until every segment is in packs and its file gone."""
        seal = self.seal(0.01, REWRITE)
        deadline = time.monotonic() + 60
        while self.store.generations() and time.monotonic() < deadline:
            seal.step()
        seal.close()
        assert not self.store.generations()

    def leaves(self) -> list[bytes]:
        return list(Ledger(self.store.ledger, load_signer(self.store)).entries())

    def verify(self, what="all", **more):
        return verify(self.state, what, **{"decompress": decompress, **more})

    def copy(self) -> Evidence:
        """Return a copy of the state directory, which the caller removes with this one."""
        state = self.state.with_name(f"{self.state.name}.copy{random.randrange(1 << 40):x}")
        shutil.copytree(self.state, state)
        return Evidence(state, self.run)

    @contextlib.contextmanager
    def process(self, job: str, word: str):
        """A process that writes or seals, and is ready; it is killed in the end."""
        command = [sys.executable, __file__, job, str(self.state), str(self.run), word]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            try:
                assert child.stdout.readline() == "ready\n"
                yield child
            finally:
                child.kill()


@contextlib.contextmanager
def evidence():
    """Make an empty place for evidence, and remove it and its copies."""
    state = Path(tempfile.mkdtemp(prefix="narrows-seal-", dir="/var/tmp"))
    run = Path(tempfile.mkdtemp(prefix="narrows-seal-", dir="/dev/shm"))
    try:
        yield Evidence(state, run)
    finally:
        for path in [run, *state.parent.glob(f"{state.name}*")]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def now() -> int:
    return time.time_ns()


def open_session(writer: SegmentWriter) -> int:
    session = writer.new_session()
    opened = SessionOpen("192.0.2.10", 4711, "198.51.100.10", 5432, "all", "write", "client", 0)
    writer.record(session, opened, now())
    writer.record(session, Attributed("backup", "kernel", "syn"), now())
    return session


def say(writer: SegmentWriter, session: int, up: int, down: int, at=(0, 0)) -> tuple[int, int]:
    """Write one operation with `up` bytes and its answer; return the half-streams' positions."""
    writer.record(session, Operation(1, "SELECT", "select 1", at[0], up), now())
    writer.append(1, session, random.randbytes(up), now(), at[0])
    writer.append(2, session, random.randbytes(down), now(), at[1])
    writer.record(session, Result(1, "ok", "SELECT 1", 1, down), now())
    return at[0] + up, at[1] + down


def close_session(writer: SegmentWriter, session: int, up: int, down: int, operations=1) -> None:
    writer.record(session, SessionClose("fin", "client", up, down, operations, now()), now())


def whole_session(writer: SegmentWriter, up=300, down=2000) -> int:
    session = open_session(writer)
    say(writer, session, up, down)
    close_session(writer, session, up, down)
    return session


def one_of_each(writer: SegmentWriter) -> None:
    """Write the records that stand outside of sessions and have leaves."""
    writer.record(0, Access("uid:0(root)", "list", "sessions list"), now())
    writer.record(0, Gap("route", "bypass", packets=3, bytes_up=180), now())
    writer.record(0, Heartbeat(0, 1, 2, 1, 0, 2, 0, 0), now())
    session = open_session(writer)
    writer.record(session, Decision("uid:0(root)", "kill", "test", "done"), now())
    writer.record(session, Gap("session", "parser", count=1), now())
    close_session(writer, session, 0, 0, 0)


def _write(place: Evidence, seed: str) -> None:
    """Write sessions of all sizes, several open at a time, until killed."""
    chance = random.Random(int(seed))
    writer = place.writer(f"gate-{seed[-1]}")
    print("ready", flush=True)
    running: list[list[int]] = []
    closed = 0
    while True:
        if len(running) < 8:
            running.append([open_session(writer), 0, 0, 0])
        session = chance.choice(running)
        up, down = say(writer, session[0], chance.randrange(400), chance.randrange(3000),
                       (session[1], session[2]))  # fmt: skip
        session[1:] = [up, down, session[3] + 1]
        if chance.random() < 0.3:
            running.remove(session)
            close_session(writer, *session)
            closed += 1
            print(closed, flush=True)
        time.sleep(0.001)


def _seal(place: Evidence, pace: str, rewrite: RewriteSettings | None = None) -> None:
    seal = place.seal(float(pace), rewrite)
    print("ready", flush=True)
    while True:
        if not seal.step():
            time.sleep(0.01)


if __name__ == "__main__":
    job, state, run, word = sys.argv[1:]
    jobs = {"write": _write, "seal": _seal, "rewrite": lambda *all: _seal(*all, REWRITE)}
    jobs[job](Evidence(Path(state), Path(run)), word)
