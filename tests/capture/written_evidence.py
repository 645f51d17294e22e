"""What the writer's tests share: a place for evidence, and what lies in it, read without the
writer.

Also a program (`python written_evidence.py STATE RUN`): it forks writers that are there to be
killed. Each line of its input starts one and is answered with its process id:

    write COUNTER SEED   publish frames without end; frame `n` is `frame(SEED, n)`. After each one
                         COUNTER, a file of 8 bytes, says how many were published so far
    recover              start a writer and end it
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import NamedTuple

from capture.crypt import Keys
from capture.frames import walk
from capture.records import decode
from capture.segment import SegmentWriter
from capture.settings import SMALL, WriterSettings
from capture.store import Store
from capture.tail import SegmentReader

#: Small enough that chunks and segments turn over many times a second.
TINY = WriterSettings(
    chunk_bytes=64 << 10, chunk_count=4, segment_bytes=256 << 10, commit_s=0.002,
    reserve_bytes=0, spare_bytes=0,
)  # fmt: skip
FIRST_RECORD = 16


class Frame(NamedTuple):
    kind: int
    session: int
    time_ns: int
    offset: int
    payload: bytes


class Place:
    """State and run directories of one appliance, and what is in them."""

    def __init__(self, state: Path, run: Path) -> None:
        self.store = Store(state, run)
        self.store.prepare()
        self.keys = Keys.load_or_create(state)

    def writer(self, settings: WriterSettings = TINY, stream: str = "test") -> SegmentWriter:
        return SegmentWriter(self.store, self.keys, stream, role="test", settings=settings)

    def recover(self) -> None:
        self.writer(SMALL, "recover").close()

    def incarnations(self) -> dict[int, list[int]]:
        """Return the segments of each incarnation."""
        found: dict[int, list[int]] = {}
        for generation in self.store.generations():
            with SegmentReader(self.store.segment(generation)) as reader:
                found.setdefault(reader.header.incarnation, []).append(generation)
        return found

    def frames(self, incarnation: int) -> list[Frame]:
        """Return every frame of an incarnation; each stream position must be there exactly once."""
        pieces = []
        for generation in self.incarnations().get(incarnation, []):
            with SegmentReader(self.store.segment(generation), self.keys) as reader:
                for commit in reader.commits():
                    with contextlib.suppress(Exception):  # a torn commit: its frames are elsewhere
                        pieces.append((commit.base, reader.plaintext(commit)))
        pieces.sort(key=lambda piece: piece[0])
        position, found = 0, []
        for base, plaintext in pieces:
            assert base == position, f"frames at {base} follow frames that end at {position}"
            walked = [Frame(*frame[:4], bytes(frame[4])) for frame in walk(plaintext, incarnation)]
            assert sum(32 + (len(f.payload) + 7 & ~7) for f in walked) == len(plaintext)
            found += walked
            position += len(plaintext)
        return found

    def records(self, name: str) -> list[dict]:
        """Return every record of a type, of all incarnations."""
        found = []
        for incarnation in self.incarnations():
            for frame in self.frames(incarnation):
                if frame.kind >= FIRST_RECORD:
                    record = decode(frame.kind, frame.payload)
                    if record["record"] == name:
                        found.append(record)
        return found


@contextlib.contextmanager
def place(disk: Path | None = None):
    """Make a place on disk and in memory, and remove it."""
    state = Path(tempfile.mkdtemp(prefix="narrows-test-", dir=disk or "/var/tmp"))
    run = Path(tempfile.mkdtemp(prefix="narrows-test-", dir="/dev/shm"))
    try:
        yield Place(state, run)
    finally:
        shutil.rmtree(state, ignore_errors=True)
        shutil.rmtree(run, ignore_errors=True)


@contextlib.contextmanager
def small_disk(size_bytes: int):
    """Mount a file system of `size_bytes` that takes O_DIRECT, and yield where."""
    mount = tempfile.mkdtemp(prefix="narrows-disk-", dir="/var/tmp")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", mount], check=True)
    try:
        yield Path(mount)
    finally:
        subprocess.run(["umount", "-l", mount], check=True)
        os.rmdir(mount)


def frame(seed: int, number: int) -> tuple[int, bytes]:
    """Return session and payload of frame `number`: mostly small, now and then large."""
    dice = zlib.crc32(b"%d/%d" % (seed, number))
    length = dice % 200 if dice & 0x700 else dice % 20_000
    return 1 + dice % 7, (b"%d/%d " % (seed, number) * (length // 3 + 1))[:length]


class Writers:
    """Starts processes that write or recover, to be killed with `kill`."""

    def __init__(self, where: Place) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(where.store.state), str(where.store.run)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip

    def start(self, what: str) -> int:
        self._process.stdin.write(what + "\n")
        return int(self._process.stdout.readline())

    def kill(self, pid: int) -> None:
        """Kill one, if it has not ended by itself, and wait until it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        self._process.stdin.write(f"wait {pid}\n")
        self._process.stdout.readline()

    def close(self) -> None:
        self._process.stdin.close()
        assert self._process.wait(10) == 0
        self._process.stdout.close()


@contextlib.contextmanager
def writers(where: Place):
    found = Writers(where)
    try:
        yield found
    finally:
        found.close()


class Counter:
    """A number that a writer leaves behind, in memory that outlives it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(8))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 8)

    @property
    def value(self) -> int:
        return int.from_bytes(self._memory, "little")

    def wait(self, least: int, longest_s: float = 20) -> None:
        until = time.monotonic() + longest_s
        while self.value < least:
            assert time.monotonic() < until, "the writer does not write"
            time.sleep(0.0005)


def _write(where: Place, counter: Path, seed: int) -> None:
    with counter.open("r+b") as file:
        published = memoryview(mmap.mmap(file.fileno(), 8)).cast("Q")
    writer = where.writer()
    number = 0
    while True:
        session, payload = frame(seed, number)
        area = writer.reserve(max(len(payload), 1)) if number & 1 else None
        if area is not None and len(area) >= len(payload):  # as the relay does it
            area[: len(payload)] = payload
            writer.publish(1, session, number, len(payload), number)
        else:
            writer.append(2, session, payload, number, number)
        number += 1
        published[0] = number


def _child(where: Place, words: list[str]) -> None:
    if words[0] == "write":
        _write(where, Path(words[1]), int(words[2]))
    else:
        where.recover()


def main(state: str, run: str) -> None:
    where = Place(Path(state), Path(run))
    for line in sys.stdin:
        words = line.split()
        if words[0] == "wait":
            os.waitpid(int(words[1]), 0)
            print("gone", flush=True)
            continue
        pid = os.fork()
        if not pid:
            try:
                _child(where, words)
            finally:
                os._exit(0)
        print(pid, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
