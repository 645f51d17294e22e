"""The bench's stage: a lab of its own with the whole appliance, its peers beside it, and a switch
between the paths.

One trio of namespaces serves all paths, so that client, server and wires are the same; what changes
between runs is where the redirect leads: to the gate's listener, to a haproxy's, or nowhere
(direct). pgbouncer is reached at the gate host's own address. Each program runs in a cgroup of its
own. All names are fixed, so that the next run removes what a killed one left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from appliance import live
from appliance.config import Config, Paths, load
from appliance.lab import cgroups, topology
from appliance.lab.place import Place
from appliance.lab.running import Lab
from appliance.proxy import redirect
from appliance.proxy.tls.authority import Authority
from bench.capture_check import Sent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from capture.store import Store

HERE = Path(__file__).parent
NAME = "narrows-bench"
ACCOUNT = "ci-deployer"  #: of the lab's configuration: what the clients run as
#: One worker; TLS is opened, and the server's certificate verified.
GATE = """
[gate]
workers = 1

[[route]]
name = "everything"
tls = "intercept"
tls_verify = "pinned"
tls_ca = "{ca}"
"""
PEERS = {"haproxy": 15011, "haproxy-256k": 15012}
LOAD_PORT, PG_PORT, PGBOUNCER_PORT = 7000, 5432, 6432
READY_S = 20.0
EARLY_DEMUX = Path("/proc/sys/net/ipv4/tcp_early_demux")  #: of the calling thread's namespace
_AS_POSTGRES = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--")


class StageError(Exception):
    """The stage cannot be built; the message says why."""


class Stage:
    """A context manager; everything it starts and makes is gone after it."""

    def __init__(self) -> None:
        self.place = Place(
            prefix="nbench",
            folder=Path("/run") / NAME,
            disk=Path("/var/tmp") / NAME,
            memory=Path("/dev/shm") / NAME,
            management=False,
        )
        self.lab = Lab(self.place)
        self.certificates = Path("/run") / f"{NAME}-tls"  #: the servers' authority: ca.pem
        self.authority: Authority
        self.sent = Sent()  #: through the gate, by all works
        self._configs: dict[str, Config] = {}
        self._programs: dict[str, tuple[str, Sequence[str], subprocess.Popen[Any]]] = {}

    def __enter__(self) -> Self:
        self._lock = os.open(f"/run/{NAME}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise StageError("another bench is running on this machine") from None
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _build(self) -> None:
        shutil.rmtree(self.certificates, ignore_errors=True)
        made = Config(Paths(self.certificates, self.certificates))
        self.authority = Authority.load_or_create(made)
        self.lab.up(GATE.format(ca=self.certificates / "ca.pem"))
        argv = ["gcc", "-O2", "-o", str(self.load), str(HERE / "load.c")]
        subprocess.run(argv, check=True)
        self.start("load", "server", [str(self.load), "server", "0.0.0.0", str(LOAD_PORT)])
        self._configs["gate"] = self.lab.config
        for path, port in PEERS.items():
            self._start_haproxy(path, port)
        self.use("direct")
        self.wait_for(lambda: self.accepts("server", topology.SERVER4, LOAD_PORT), "the server")
        for path in PEERS:
            self.use(path)
            self.wait_for(lambda: self.accepts("client", topology.SERVER4, LOAD_PORT), path)

    def __exit__(self, *_: object) -> None:
        try:
            self.lab.down()  # ends every process by its cgroup, in whatever state they are
            for _role, _argv, process in self._programs.values():
                process.wait()
            shutil.rmtree(self.certificates, ignore_errors=True)
            Path(f"/run/{NAME}.lock").unlink(missing_ok=True)
        finally:
            os.close(self._lock)

    @property
    def load(self) -> Path:
        """Return the load generator."""
        return self.place.disk / "load"

    @property
    def store(self) -> Store:
        """Return the evidence of the gate under measurement."""
        from capture.store import Store

        return Store(self.lab.config.paths.state, self.lab.config.paths.run)

    @property
    def behind(self) -> tuple[Path, ...]:
        """Return the cgroups of what works for the gate worker, and after it."""
        return self.group("seal"), self.group("review"), self.group("sensor")

    def group(self, name: str) -> Path:
        """Return a program's cgroup."""
        return cgroups.make(self.place.cgroup / name)

    def use(self, path: str) -> None:
        """Lead the client's connections through `path`: gate, a haproxy, or nowhere."""
        gate = self.place.topology.namespace("gate")
        if path in self._configs:
            topology.run(gate, redirect.apply, self._configs[path])
        else:
            topology.run(gate, redirect.undo)
        # A proxy leaves TIME_WAIT sockets with the client's address behind. The kernel's early
        # look-up finds them for a routed packet of the same ports, and ip_forward drops a packet
        # that belongs to a local socket: with it, some direct connections would never open.
        topology.run(gate, EARLY_DEMUX.write_text, str(int(path in self._configs)))

    def client(
        self, argv: list[str], *, environment: dict[str, str] | None = None, longest_s: float = 60
    ) -> str:
        """Run a client program to its end and return what it printed; RuntimeError when it
        failed.
        """
        program = self.lab.spawn(
            "client", argv, account=ACCOUNT, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | (environment or {}),
        )  # fmt: skip
        try:
            out, err = program.communicate(timeout=longest_s)
        finally:
            if program.poll() is None:
                program.kill()
                program.wait()
        if program.returncode:
            raise RuntimeError(f"{argv[0]} failed: {err.strip()[-400:]}\n{self.lab.logs()}")
        return str(out)

    def open_client(self, argv: list[str]) -> subprocess.Popen[Any]:
        """Start a client program that is told to end by the end of its input."""
        return self.lab.spawn(
            "client", argv, account=ACCOUNT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def restart(self, path: str) -> None:
        """End the program of a path and start it anew: its memory is what it is after a start."""
        if path == "gate":
            (old,) = cgroups.pids(self.group("gate"))
            os.kill(old, signal.SIGTERM)
            self.wait_for(lambda: self._gate_answers(old), "the gate")
            return
        role, argv, process = self._programs[path]
        process.terminate()
        process.wait(10)
        self.start(path, role, argv)
        self.wait_for(lambda: self.accepts("client", topology.SERVER4, LOAD_PORT), path)

    def _gate_answers(self, old: int) -> bool:
        for path in live.workers(self.lab.config.paths.run):
            with contextlib.suppress(OSError, ValueError):
                stats = live.ask(path, {"do": "stats"})
                return bool(stats["pid"] != old and stats["sensor"])
        return False

    def lead(self, path: str, port: int) -> None:
        """Let `use(path)` lead the client's connections to a listener on the gate host."""
        file = self.place.folder / f"{path}.toml"
        words = f"[gate]\nworkers = 1\nlisten_port = {port}\n"
        file.write_text(self.place.configuration(words), encoding="utf-8")
        self._configs[path] = load(file)

    def _start_haproxy(self, path: str, port: int) -> None:
        text = (HERE / "peers" / "haproxy.cfg").read_text(encoding="utf-8")
        size = 262144 if path.endswith("256k") else 16384
        self.start_haproxy(path, port, text.replace("BUFSIZE", str(size)))

    def start_haproxy(self, path: str, port: int, text: str) -> None:
        """Start a haproxy with this configuration, where PORT is its listener, on the gate host."""
        self.lead(path, port)
        file = self.place.disk / f"{path}.cfg"
        file.write_text(text.replace("PORT", str(port)), encoding="utf-8")
        self.start(path, "gate", ["haproxy", "-db", "-q", "-f", str(file)])

    def start_postgresql(self) -> None:
        """Start PostgreSQL on the server host with pgbench's tables; once."""
        if "postgresql" in self._programs:
            return
        folder = self.place.disk / "postgresql"
        folder.mkdir()
        shutil.chown(folder, "postgres")
        binaries = max(Path("/usr/lib/postgresql").glob("*/bin"))
        data = folder / "data"
        initdb = [str(binaries / "initdb"), "-D", str(data), "-A", "trust", "-N", "-U", "postgres"]
        subprocess.run([*_AS_POSTGRES, *initdb], check=True, stdout=subprocess.DEVNULL, cwd="/")
        (data / "pg_hba.conf").write_text("local all all trust\nhost all all all trust\n")
        words = {"listen_addresses": "*", "unix_socket_directories": str(folder), "fsync": "off",
                 "max_connections": "1100", "shared_buffers": "256MB",
                 "dynamic_shared_memory_type": "mmap"}  # fmt: skip  # nothing stays in /dev/shm
        options = [word for key, value in words.items() for word in ("-c", f"{key}={value}")]
        argv = [*_AS_POSTGRES, str(binaries / "postgres"), "-D", str(data), *options]
        self.start("postgresql", "server", argv)
        where = ["-h", str(folder), "-U", "postgres", "postgres"]
        self.wait_for(lambda: _succeeds(["psql", "-c", "select 1", *where]), "PostgreSQL")
        subprocess.run(["pgbench", "-i", "-s", "10", "-q", *where], check=True, capture_output=True)

    def start_pgbouncer(self) -> None:
        """Start pgbouncer on the gate host."""
        folder = self.place.disk / "pgbouncer"
        folder.mkdir()
        folder.chmod(0o777)
        users = folder / "users"
        users.write_text('"postgres" ""\n')
        text = (HERE / "peers" / "pgbouncer.ini").read_text(encoding="utf-8")
        for word, value in {
            "SERVER": topology.SERVER4, "LISTEN": topology.GATE_CLIENT4, "USERS": str(users),
            "LOG": str(folder / "log"), "PIDFILE": str(folder / "pid"),
        }.items():  # fmt: skip
            text = text.replace(word, value)
        (folder / "ini").write_text(text)
        argv = ["pgbouncer", "-q", "-u", "nobody", str(folder / "ini")]
        self.start("pgbouncer", "gate", argv)
        self.wait_for(
            lambda: self.accepts("gate", topology.GATE_CLIENT4, PGBOUNCER_PORT), "pgbouncer"
        )

    def accepts(self, role: str, host: str, port: int) -> bool:
        """Say whether a connection from a host to `host` is accepted."""

        def connect() -> bool:
            import socket

            with socket.socket() as sock:
                sock.settimeout(2)
                return sock.connect_ex((host, port)) == 0

        answer: bool = topology.run(self.place.topology.namespace(role), connect)
        return answer

    def start(self, name: str, role: str, argv: Sequence[str]) -> None:
        """Start a program on a host, in a cgroup of its own; the stage ends it."""
        with (self.place.folder / f"{name}.log").open("ab") as log:
            process = topology.start(
                self.place.topology.namespace(role), argv, cgroup=self.group(name),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self._programs[name] = (role, argv, process)

    def wait_for(self, ready: Callable[[], bool], what: str) -> None:
        """Wait until `ready` says so; StageError when `what` takes too long."""
        until = time.monotonic() + READY_S
        while not ready():
            if time.monotonic() > until:
                raise StageError(f"{what} did not start\n{self.lab.logs()}")
            time.sleep(0.05)


def _succeeds(argv: Sequence[str]) -> bool:
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0
