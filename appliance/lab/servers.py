"""The demo's real servers, started on the lab's server: PostgreSQL, nginx and Redis.

Each runs in a cgroup of its own and keeps its files in the lab's disk folder; all of it goes with
`Lab.down`. Tests use them too.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance.lab import topology
from appliance.lab.topology import SERVER4

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from appliance.lab.running import Lab

READY_S = 30.0
HTTP_PORT, HTTPS_PORT, REDIS_PORT = 80, 443, 6379
_AS_POSTGRES = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--")

_NGINX = """
daemon off;
worker_processes 1;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
  access_log off;
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  ssl_certificate {certificate}; ssl_certificate_key {key};
  ssl_protocols TLSv1.2 TLSv1.3;
  server {{
    listen {port}; listen [::]:{port}; listen {tls_port} ssl; listen [::]:{tls_port} ssl;
    root {folder}/www;
  }}
}}
"""


class ServerError(Exception):
    """A server did not start; the message has the end of its log."""


class Servers:
    """Starts servers on a lab's server host; `folder` is on disk and goes with the lab."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.folder = lab.place.disk / "servers"
        self.postgresql_socket = self.folder / "postgresql"

    def prepare(self) -> None:
        """Make the folder anew; servers that run as other users must be able to reach it."""
        self.remove()
        self.folder.mkdir(mode=0o755, parents=True)

    def remove(self) -> None:
        """Remove the files; the lab ends the processes."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def postgresql(self, sql: str = "", *, options: Sequence[str] = ()) -> None:
        """Start PostgreSQL, with passwords, with and without TLS on the network; run `sql` in it.

        `sql` runs on the server's own socket, in the database "shop", as the superuser.
        """
        folder = self.postgresql_socket
        folder.mkdir()
        shutil.chown(folder, "postgres")
        data = folder / "data"
        binaries = max(Path("/usr/lib/postgresql").glob("*/bin"))
        initdb = [str(binaries / "initdb"), "-D", str(data), "-A", "trust", "-N", "-U", "postgres"]
        _finish([*_AS_POSTGRES, *initdb])
        access = "local all all trust\nhost all all all scram-sha-256\n"
        (data / "pg_hba.conf").write_text(access, encoding="ascii")
        words = {"listen_addresses": "*", "unix_socket_directories": str(folder), "fsync": "off",
                 "dynamic_shared_memory_type": "mmap",  # nothing stays in /dev/shm
                 "ssl": "on", **self._certificate_for_postgresql(folder)}  # fmt: skip
        settings = [text for key, value in words.items() for text in ("-c", f"{key}={value}")]
        argv = [*_AS_POSTGRES, str(binaries / "postgres"), "-D", str(data), *settings, *options]
        self._start("postgresql", argv)
        self._wait("postgresql", lambda: self._psql("-c", "SELECT 1", database="postgres"))
        if sql:
            _finish(self._psql_argv("-c", "CREATE DATABASE shop", database="postgres"))
            _finish(self._psql_argv("-c", sql))

    def _certificate_for_postgresql(self, folder: Path) -> dict[str, str]:
        """Return the settings that name it; the server insists on a key of its own."""
        certificates = self._lab.place.certificates
        names = {"ssl_cert_file": certificates.server, "ssl_key_file": certificates.server_key}
        for setting, file in names.items():
            own = folder / setting
            own.touch(mode=0o600)
            own.write_bytes(file.read_bytes())
            shutil.chown(own, "postgres")
        return {setting: str(folder / setting) for setting in names}

    def nginx(self) -> None:
        """Start nginx with one page, over HTTP and HTTPS."""
        folder = self.folder / "nginx"
        (folder / "www").mkdir(parents=True)
        (folder / "www" / "index.html").write_text("orders: 500\n", encoding="utf-8")
        config = folder / "nginx.conf"
        files = self._lab.place.certificates
        text = _NGINX.format(folder=folder, port=HTTP_PORT, tls_port=HTTPS_PORT,
                             certificate=files.server, key=files.server_key)  # fmt: skip
        config.write_text(text, encoding="utf-8")
        self._start("nginx", ["nginx", "-e", str(folder / "error.log"), "-c", str(config)])
        self._wait("nginx", lambda: self._answers(HTTP_PORT))

    def redis(self) -> None:
        """Start Redis without persistence."""
        words = ["--bind", "*", "--port", str(REDIS_PORT), "--protected-mode", "no", "--save", ""]
        self._start("redis", ["redis-server", *words])
        self._wait("redis", lambda: self._answers(REDIS_PORT))

    def _psql_argv(self, *words: str, database: str = "shop") -> list[str]:
        where = ["-h", str(self.postgresql_socket), "-U", "postgres", "-d", database]
        return ["psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", *where, *words]

    def _psql(self, *words: str, database: str) -> bool:
        argv = self._psql_argv(*words, database=database)
        return subprocess.run(argv, capture_output=True, check=False).returncode == 0

    def _start(self, name: str, argv: Sequence[str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._lab.spawn(
                "server",
                argv,
                group=f"servers/{name}",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "LC_ALL": "C.UTF-8"},
            )

    def _answers(self, port: int) -> bool:
        def connect() -> bool:
            with socket.socket() as sock:
                return sock.connect_ex((SERVER4, port)) == 0

        answer: bool = topology.run(self._lab.place.topology.namespace("server"), connect)
        return answer

    def _wait(self, name: str, ready: Callable[[], Any]) -> None:
        until = time.monotonic() + READY_S
        while not ready():
            if time.monotonic() > until:
                log = (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")
                raise ServerError(f"{name} did not start:\n{log[-2000:]}")
            time.sleep(0.05)


def _finish(argv: Sequence[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd="/")
    if done.returncode:
        raise ServerError(f"{argv[0]} failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
