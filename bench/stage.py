"""The bench's stage: one lab of its own, with every peer running, and a switch between the paths.

One trio of namespaces serves all paths, so that client, server and wires are the same; what changes
between runs is where the redirect leads: to the gate's listener, to a haproxy's, or nowhere
(direct). pgbouncer is reached at the gate host's own address. Each program runs in a cgroup of its
own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from appliance.config import Config, load
from appliance.lab import cgroups, topology
from appliance.proxy import redirect

HERE = Path(__file__).parent
PEERS = {"haproxy": 15011, "haproxy-256k": 15012}
LOAD_PORT = 7000

CONFIGURATION = """
[paths]
state = "{state}"
run = "{run}"
[gate]
workers = 1
listen_port = {port}
[evidence]
segment_bytes = 268435456
[redirect]
clients = ["192.0.2.0/24", "2001:db8:1::/64"]
bypass = ["192.0.2.1/32"]
[[route]]
name = "all"
"""


class Stage:
    """A context manager; everything it starts and makes is gone after it."""

    def __init__(self) -> None:
        self.name = f"nb{os.getpid()}"
        self.topology = topology.Topology(self.name)
        self.work = Path(tempfile.mkdtemp(prefix="narrows-bench-", dir="/var/tmp"))
        self.run = Path(tempfile.mkdtemp(prefix="narrows-bench-", dir="/dev/shm"))
        self.cgroup = cgroups.root() / self.name
        self._programs: list[subprocess.Popen[Any]] = []
        self._configs: dict[str, Config] = {}

    def __enter__(self) -> Self:
        try:
            self._build_load()
            topology.up(self.topology)
            self._start("load", "server", [str(self.load), "server", "0.0.0.0", str(LOAD_PORT)])
            for path, port in {"gate": 15001, **PEERS}.items():
                self._configs[path] = self._configure(path, port)
            self.start_gate()
            self._start_haproxies()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for program in reversed(self._programs):
            with contextlib.suppress(ProcessLookupError):
                program.send_signal(signal.SIGTERM)
        for program in self._programs:
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.wait(10)
        cgroups.remove(self.cgroup)
        for program in self._programs:
            program.wait()
        topology.down(self.topology)
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.rmtree(self.run, ignore_errors=True)

    @property
    def load(self) -> Path:
        """Return the load generator."""
        return self.work / "load"

    @property
    def state(self) -> Path:
        """Return the state directory of the gate under measurement."""
        return self.work / "state"

    def group(self, name: str) -> Path:
        """Return a program's cgroup."""
        return cgroups.make(self.cgroup / name)

    def use(self, path: str) -> None:
        """Lead the client's connections through `path`: gate, a haproxy, or "direct"."""
        if path in self._configs:
            topology.run(self.topology.namespace("gate"), redirect.apply, self._configs[path])
        else:
            topology.run(self.topology.namespace("gate"), redirect.undo)

    def client(
        self, argv: list[str], *, environment: dict[str, str] | None = None, longest_s: float = 120
    ) -> str:
        """Run a client program to its end and return what it printed; RuntimeError when it
        failed.
        """
        program = topology.start(
            self.topology.namespace("client"), argv, cgroup=self.group("client"), text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip
        try:
            out, err = program.communicate(timeout=longest_s)
        finally:
            if program.poll() is None:
                program.kill()
                program.wait()
        if program.returncode:
            raise RuntimeError(f"{argv[0]} failed: {err.strip()[-400:]}")
        return str(out)

    def open_client(self, argv: list[str]) -> subprocess.Popen[Any]:
        """Start a client program that is told to end by the end of its input."""
        return topology.start(
            self.topology.namespace("client"), argv, cgroup=self.group("client"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def _build_load(self) -> None:
        subprocess.run(["gcc", "-O2", "-o", str(self.load), str(HERE / "load.c")], check=True)

    def _configure(self, path: str, port: int) -> Config:
        file = self.work / f"{path}.toml"
        file.write_text(CONFIGURATION.format(state=self.state, run=self.run, port=port))
        return load(file)

    def start_gate(self) -> None:
        """Start one gate worker and the seal."""
        config = str(self.work / "gate.toml")
        narrows = [sys.executable, "-m", "appliance"]
        self._start(
            "gate", "gate", [*narrows, "serve", "gate", "--worker", "0", "--config", config]
        )
        self._start("seal", "gate", [*narrows, "serve", "seal", "--config", config])
        self._wait_for((self.run / "gate-0.sock").exists, "the gate")

    def _start_haproxies(self) -> None:
        for path, port in PEERS.items():
            text = (HERE / "peers" / "haproxy.cfg").read_text()
            size = 262144 if path.endswith("256k") else 16384
            file = self.work / f"{path}.cfg"
            file.write_text(text.replace("BUFSIZE", str(size)).replace("PORT", str(port)))
            self._start(path, "gate", ["haproxy", "-db", "-q", "-f", str(file)])

    def start_postgresql(self) -> Path:
        """Start PostgreSQL in the server's namespace and pgbouncer in the gate's; return the
        server's socket folder.
        """
        folder = self.work / "postgresql"
        folder.mkdir()
        shutil.chown(folder, "postgres")
        self.work.chmod(0o755)
        binaries = max(Path("/usr/lib/postgresql").glob("*/bin"))
        data = folder / "data"
        become = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]
        subprocess.run(
            [*become, str(binaries / "initdb"), "-D", str(data), "-A", "trust", "-N", "-U", "postgres"],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        (data / "pg_hba.conf").write_text("local all all trust\nhost all all all trust\n")
        options = ["-c", "listen_addresses=*", "-c", f"unix_socket_directories={folder}", "-c", "max_connections=200",
                   "-c", "shared_buffers=256MB", "-c", "fsync=off"]  # fmt: skip
        self._start(
            "postgresql", "server", [*become, str(binaries / "postgres"), "-D", str(data), *options]
        )
        self._wait_for(lambda: self._psql_answers(folder), "PostgreSQL")
        subprocess.run(
            ["pgbench", "-h", str(folder), "-U", "postgres", "-i", "-s", "10", "-q", "postgres"],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._start_pgbouncer()
        return folder

    def _psql_answers(self, folder: Path) -> bool:
        argv = ["psql", "-h", str(folder), "-U", "postgres", "-c", "select 1"]
        return subprocess.run(argv, capture_output=True, check=False).returncode == 0

    def _start_pgbouncer(self) -> None:
        folder = self.work / "pgbouncer"
        folder.mkdir()
        folder.chmod(0o777)
        users = folder / "users"
        users.write_text('"postgres" ""\n')
        text = (HERE / "peers" / "pgbouncer.ini").read_text()
        for word, value in {
            "SERVER": topology.SERVER4, "LISTEN": topology.GATE_CLIENT4, "USERS": str(users),
            "LOG": str(folder / "log"), "PIDFILE": str(folder / "pid"),
        }.items():  # fmt: skip
            text = text.replace(word, value)
        (folder / "ini").write_text(text)
        self._start("pgbouncer", "gate", ["pgbouncer", "-q", "-u", "nobody", str(folder / "ini")])
        time.sleep(0.5)

    def _start(self, group: str, role: str, argv: list[str]) -> None:
        log = (self.work / f"{group}.log").open("ab")
        with log:
            self._programs.append(
                topology.start(
                    self.topology.namespace(role),
                    argv,
                    cgroup=self.group(group),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )  # fmt: skip
            )

    def _wait_for(self, ready: Any, what: str) -> None:
        until = time.monotonic() + 20
        while not ready():
            dead = [p.args for p in self._programs if p.poll() is not None]
            if dead or time.monotonic() > until:
                logs = "".join(
                    f.read_text(errors="replace")[-2000:] for f in self.work.glob("*.log")
                )
                raise RuntimeError(f"{what} did not start; ended: {dead}\n{logs}")
            time.sleep(0.05)
