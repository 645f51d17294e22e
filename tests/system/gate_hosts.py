"""Gate workers between real hosts, without sensor, seal and supervisor.

For tests of the data path that start, limit and kill workers themselves, and read what they
recorded straight from the segments.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from appliance import live
from appliance.config import load
from appliance.lab import cgroups, topology
from appliance.proxy import redirect
from capture.crypt import Keys
from capture.errors import FormatError
from capture.frames import FIRST_RECORD, walk
from capture.records import TYPES, decode
from capture.segfile import BLOCK
from capture.segment import SegmentWriter
from capture.segments import open_segment
from capture.settings import SMALL
from capture.store import Store

SERVER4, SERVER6 = topology.SERVER4, topology.SERVER6
SEAL = -1
MOST_KEPT_BYTES = 16 << 20
_numbers = count()

CONFIGURATION = """
[paths]
state = "{state}"
run = "{run}"
[gate]
workers = {workers}
{gate}
[evidence]
{evidence}
[redirect]
clients = ["192.0.2.0/24", "2001:db8:1::/64"]
[[route]]
name = "all"
{route}
"""


def until(true, longest_s=20.0, what="it"):
    """Return what `true` gives as soon as it is true."""
    end = time.monotonic() + longest_s
    while not (found := true()):
        assert time.monotonic() < end, f"{what} did not come true in {longest_s} s"
        time.sleep(0.01)
    return found


@dataclass
class Recorded:
    """What the evidence has of one session."""

    number: int
    records: list[dict[str, Any]] = field(default_factory=list)
    up: bytearray = field(default_factory=bytearray)
    down: bytearray = field(default_factory=bytearray)
    sizes: list[int] = field(default_factory=lambda: [0, 0, 0, 0])  #: by kind of frame
    missing: list[int] = field(default_factory=lambda: [0, 0])  #: bytes up and down
    digests: list[Any] = field(default_factory=lambda: [hashlib.sha256() for _ in range(4)])

    def record(self, name):
        """Return the one record of a type, or None."""
        found = [record for record in self.records if record["record"] == name]
        assert len(found) < 2, found
        return found[0] if found else None

    @property
    def open(self):
        return self.record("SessionOpen")

    @property
    def close(self):
        return self.record("SessionClose")


class Gate:
    """Three hosts and gate workers; a context manager that leaves nothing behind."""

    def __init__(self, *, workers=1, gate="", evidence="", route="", disk=None):
        self.workers = workers
        self.topology = topology.Topology(f"nd{os.getpid() % 100000:05d}{next(_numbers) % 100:02d}")
        self.folder = Path(tempfile.mkdtemp(prefix="narrows-gate-", dir="/var/tmp"))
        self.run = Path(tempfile.mkdtemp(prefix="narrows-gate-", dir="/dev/shm"))
        self.state = (disk or self.folder) / "state"
        self.cgroup = cgroups.root() / self.topology.prefix
        self.file = self.folder / "narrows.toml"
        self.file.write_text(
            CONFIGURATION.format(
                state=self.state, run=self.run, workers=workers, gate=gate, route=route,
                evidence=evidence,
            )
        )  # fmt: skip
        self.processes: dict[int, subprocess.Popen] = {}
        self.most_kept_bytes = MOST_KEPT_BYTES  #: of each half-stream
        self._keys: Keys | None = None
        self._read: dict[int, tuple[int, int]] = {}
        self._sessions: dict[int, Recorded] = {}

    def __enter__(self):
        try:
            topology.up(self.topology)
            self.on("gate", redirect.apply, load(self.file))
            for number in range(self.workers):
                self.start(number)
            for number in range(self.workers):
                self.wait_ready(number)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        cgroups.remove(self.cgroup)
        for process in self.processes.values():
            process.wait()
        topology.down(self.topology)
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.run, ignore_errors=True)

    # -- processes

    def start(self, number=0, *, descriptors=0):
        """Start a worker, with so many descriptors at most."""
        limit = []
        if descriptors:
            limit = ["prlimit", f"--nofile={descriptors}"]
        argv = [*limit, sys.executable, "-m", "appliance", "serve", "gate"]
        argv += ["--worker", str(number), "--config", str(self.file)]
        with self.log(number).open("ab") as log:
            self.processes[number] = topology.start(
                self.topology.namespace("gate"), argv, cgroup=cgroups.make(self.cgroup / "gate"),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def start_seal(self):
        """Start the seal; its number is SEAL."""
        argv = [sys.executable, "-m", "appliance", "serve", "seal", "--config", str(self.file)]
        with self.log(SEAL).open("ab") as log:
            self.processes[SEAL] = topology.start(
                self.topology.namespace("gate"), argv, cgroup=cgroups.make(self.cgroup / "seal"),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def log(self, number=0):
        return self.folder / f"process-{number}.log"

    def wait_ready(self, number=0):
        def ready():
            process = self.processes[number]
            assert process.poll() is None, self.log(number).read_text()[-3000:]
            with contextlib.suppress(OSError):
                return self.stats(number)["pid"] == process.pid

        until(ready, what="a gate worker")

    def stats(self, number=0):
        return live.ask(self.run / f"gate-{number}.sock", {"do": "stats"})

    def sessions(self, number=0):
        return live.ask(self.run / f"gate-{number}.sock", {"do": "list"})["sessions"]

    def kill(self, number=0):
        """Kill a worker with SIGKILL."""
        self.processes[number].kill()
        self.processes[number].wait()

    def stop(self, number=0, longest_s=30):
        """End a worker in an orderly way; return its exit code."""
        self.processes[number].send_signal(signal.SIGTERM)
        return self.processes[number].wait(longest_s)

    def cpu_s(self):
        """Return the CPU seconds of the workers so far."""
        times = 0.0
        for process in self.processes.values():
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            times += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return times

    def memory_kib(self, number=0):
        """Return the private memory of a worker."""
        status = Path(f"/proc/{self.processes[number].pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if "RssAnon" in line)

    # -- sockets

    def on(self, role, function, *arguments):
        return topology.run(self.topology.namespace(role), function, *arguments)

    def listen(self, port, address=SERVER4, *, backlog=4096, receive_bytes=0):
        """Return a listening socket on the server."""

        def make():
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if receive_bytes:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
            sock.bind((address, port))
            sock.listen(backlog)
            sock.settimeout(20)
            return sock

        return self.on("server", make)

    def connect(self, port, address=SERVER4, *, receive_bytes=0, timeout_s=20):
        """Return a connected socket of the client."""

        def make():
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            sock = socket.socket(family, socket.SOCK_STREAM)
            if receive_bytes:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
            sock.settimeout(timeout_s)
            try:
                sock.connect((address, port))
            except OSError:
                sock.close()
                raise
            return sock

        return self.on("client", make)

    def greet(self, port, address=SERVER4):
        """Connect, and return the first byte that comes; the reset of a refused connection may
        come within `connect` as well.
        """
        with self.connect(port, address) as sock:
            return sock.recv(1)

    def pair(self, port, address=SERVER4, **options):
        """Return both ends of one session: (client's socket, server's socket)."""
        with self.listen(port, address) as listener:
            near = self.connect(port, address, **options)
            far, _ = listener.accept()
        far.settimeout(20)
        return near, far

    # -- evidence

    @property
    def store(self):
        return Store(self.state, self.run)

    def recover(self):
        """Complete what dead workers left, as the next start of anything would."""
        SegmentWriter(
            self.store, Keys.load(self.state), "test", role="test", settings=SMALL
        ).close()  # fmt: skip

    def recorded(self):
        """Return {number: Recorded} of every session so far; 0 is the workers themselves.

        What was read once is not read again, so that polling costs little.
        """
        if self._keys is None:
            self._keys = Keys.load(self.state)
        for generation in self.store.all_generations():
            number, offset = self._read.get(generation, (0, BLOCK))
            with open_segment(self.store, generation, self._keys) as reader:
                for commit in reader.commits(number, offset):
                    try:
                        plaintext = reader.plaintext(commit)
                    except FormatError:
                        break  # torn, or being written now
                    self._take(plaintext, reader.header.incarnation)
                    self._read[generation] = (commit.number + 1, commit.offset + commit.total_bytes)
        return self._sessions

    def _take(self, plaintext, incarnation):
        for kind, number, _, offset, payload, _ in walk(plaintext, incarnation):
            session = self._sessions.get(number)
            if session is None:
                session = self._sessions[number] = Recorded(number)
            if kind >= FIRST_RECORD:
                session.records.append(decode(kind, payload))
                continue
            if kind < 3 and offset != (size := session.sizes[kind - 1] + session.missing[kind - 1]):
                assert offset > size, "bytes twice"
                session.missing[kind - 1] += offset - size
            session.sizes[kind - 1] += len(payload)
            session.digests[kind - 1].update(payload)
            if kind < 3 and session.sizes[kind - 1] < self.most_kept_bytes:
                (session.up if kind == 1 else session.down).extend(payload)

    def closed(self, port, number=1, longest_s=10, *, missing=False):
        """Return the sessions to a port as soon as so many of them are closed in the evidence."""

        def ready():
            found = [s for s in self.recorded().values() if s.open]
            found = [s for s in found if s.open["target_port"] == port and s.close]
            assert missing or not any(any(s.missing) for s in found)
            return found if len(found) >= number else None

        return until(ready, longest_s, f"the end of {number} sessions to port {port}")

    def records(self, name):
        """Return every record of a type."""
        assert name in {kind.__name__ for kind in TYPES.values()}
        sessions = self.recorded().values()
        return [r for session in sessions for r in session.records if r["record"] == name]


def pattern(size, seed=1):
    """Yield `size` bytes in pieces whose period fits no chunk."""
    block = memoryview((hashlib.sha512(b"%d" % seed).digest() * 16_411)[: (1 << 20) + 7])
    while size > 0:
        yield block[:size]
        size -= len(block)


def digest(size, seed=1):
    """Return the SHA-256 of a pattern."""
    total = hashlib.sha256()
    for piece in pattern(size, seed):
        total.update(piece)
    return total.hexdigest()


class Reader(threading.Thread):
    """Reads a socket to its end in a thread; `result()` is (bytes, SHA-256)."""

    def __init__(self, sock):
        super().__init__(daemon=True)
        self._sock, self._total, self._size = sock, hashlib.sha256(), 0
        self._error = None
        self.start()

    def run(self):
        buffer = bytearray(1 << 20)
        try:
            while length := self._sock.recv_into(buffer):
                self._total.update(memoryview(buffer)[:length])
                self._size += length
        except OSError as wrong:
            self._error = wrong

    def result(self, longest_s=60):
        self.join(longest_s)
        assert not self.is_alive(), f"no end after {self._size} bytes"
        if self._error is not None:
            raise self._error
        return self.taken()

    def taken(self):
        """Return (bytes, SHA-256) of what came so far."""
        return self._size, self._total.hexdigest()


@contextlib.contextmanager
def small_disk(size_bytes):
    """Mount a file system of `size_bytes` that takes O_DIRECT, and yield where."""
    mount = tempfile.mkdtemp(prefix="narrows-disk-", dir="/var/tmp")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", mount], check=True)
    try:
        yield Path(mount)
    finally:
        subprocess.run(["umount", "-l", mount], check=True)
        Path(mount).rmdir()


def raise_descriptors():
    """Let this process have as many descriptors as it may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
