"""Brings a lab up and takes it down: hosts, cgroups, redirect, processes.

The command line, the demo and system tests use it. `down` needs nothing but the names of the
place, so that it also cleans up after a crash; `up` begins with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from appliance import live
from appliance.config import load
from appliance.lab import cgroups, state, topology
from appliance.lab.place import UNASSIGNED, Place
from appliance.proxy import redirect
from appliance.web import certificate, tokens
from capture.errors import KeyFileError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from appliance.config import Config

READY_S = 30.0
ORDERLY_S = 40.0


class LabError(Exception):
    """The lab did not come up; the message says what a log says."""


class Lab:
    """One lab; nothing of it exists before `up`."""

    def __init__(self, place: Place | None = None) -> None:
        self.place = place or Place()
        self._supervisor: subprocess.Popen[Any] | None = None  #: when this process started it

    @property
    def config(self) -> Config:
        """Return the configuration in use."""
        return load(self.place.config)

    def up(self, given: str = "", *, gate: bool = True) -> None:
        """Make the hosts and, with `gate`, redirect and start everything; ready when it returns.

        `given` is the text of a configuration, or empty for the lab's own. Raises ConfigError,
        LabError, redirect.RedirectError.
        """
        self.down()
        for folder in (self.place.folder, self.place.disk):
            folder.mkdir(mode=0o755, parents=True)
        self.place.certificates.make()
        text = self.place.configuration(given)
        self.place.config.write_text(text, encoding="utf-8")
        config = load(self.place.config)
        try:
            self._make_hosts(config)
            self._trust(config)
            if gate:
                self._start(config)
            else:
                self._note(0)
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """End and remove everything that `up` makes; what is not there is not missed."""
        self.stop()
        cgroups.remove(self.place.cgroup)
        if self._supervisor is not None:
            self._supervisor.wait()
            self._supervisor = None
        topology.down(self.place.topology)
        for folder in (self.place.folder, self.place.disk, self.place.memory):
            shutil.rmtree(folder, ignore_errors=True)

    def stop(self) -> None:
        """End the processes in an orderly way, as far as their supervisor is there."""
        supervisor = next((p["pid"] for p in self.processes() if p["role"] == "supervisor"), None)
        if supervisor is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(supervisor, signal.SIGTERM)
        until = time.monotonic() + ORDERLY_S
        while time.monotonic() < until and self._alive(supervisor):
            self._reap()
            time.sleep(0.02)

    def _reap(self) -> None:
        if self._supervisor is not None and self._supervisor.poll() is not None:
            self._supervisor = None

    def status(self) -> dict[str, Any]:
        """Return {up, namespaces, processes: [{role, pid}], api}."""
        is_up = self.place.topology.exists()
        names = self.place.topology.namespaces if is_up else []
        api = self.api() if is_up else None
        return {"up": is_up, "namespaces": names, "processes": self.processes(), "api": api}

    def api(self) -> dict[str, str] | None:
        """Return {url, token, ca_file} of the review API, or None without one."""
        try:
            token = self.place.token.read_text(encoding="ascii").strip()
        except OSError:
            return None
        config = self.config
        ca_file, _ = certificate.files(config)
        url = f"https://{config.review.address}:{config.review.port}"
        return {"url": url, "token": token, "ca_file": str(ca_file)}

    def processes(self) -> list[dict[str, Any]]:
        """Return the processes that live, with their roles."""
        try:
            noted = json.loads((self.place.folder / "processes.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        return [process for process in noted if self._alive(process["pid"])]

    def spawn(
        self,
        role: str,
        argv: Sequence[str],
        *,
        account: str | None = None,
        group: str = "",
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """Start a program on a host; on the client as an account, elsewhere in cgroup `group`.

        What a client's programs must know to trust the lab is in `environment`.
        """
        return topology.start(
            self.place.topology.namespace(role),
            argv,
            cgroup=cgroups.make(self.cgroup(role, account, group)),
            **options,
        )

    @property
    def environment(self) -> dict[str, str]:
        """Return this process's environment, and the lab's trust: for programs of the client."""
        return {**os.environ, **self.place.certificates.environment}

    def cgroup(self, role: str, account: str | None = None, group: str = "") -> Path:
        """Return where a program belongs; KeyError for an unknown account."""
        if account is not None:
            return self.place.account_cgroup(self.config, account)
        if role == "client":
            return self.place.clients / UNASSIGNED
        return self.place.cgroup / (group or f"on-{role}")

    def apply_redirect(self) -> list[str]:
        """Apply the redirect in the gate's namespace; return what was done."""
        gate = self.place.topology.namespace("gate")
        done: list[str] = topology.run(gate, redirect.apply, self.config)
        return done

    def _trust(self, config: Config) -> None:
        try:
            self.place.certificates.trust(config)
        except (OSError, KeyFileError) as wrong:
            raise LabError(f"the gate's authority cannot be used: {wrong}") from wrong

    def _make_hosts(self, config: Config) -> None:
        topology.up(self.place.topology)
        cgroups.make(self.place.clients / UNASSIGNED)
        for account in config.account:
            cgroups.make(self.place.account_cgroup(config, account.name))

    def _start(self, config: Config) -> None:
        self._let_in(config)
        self.apply_redirect()  # first: from here on nothing passes without the gate
        gate = self.place.topology.namespace("gate")
        argv = [sys.executable, "-m", "appliance.lab.supervisor", str(self.place.folder), gate]
        argv += [str(self.place.cgroup), str(self.place.config)]
        with (self.place.folder / "supervisor.log").open("ab") as log:
            process = topology.start(
                None,
                argv,
                cgroup=cgroups.make(self.place.cgroup / "supervisor"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._supervisor = process
        self._note(process.pid)
        self._wait_ready(config, process)

    def _let_in(self, config: Config) -> None:
        """Make a token of the review API, for the demo and for whoever asks for the status."""
        text, token = tokens.make(tokens.Role.ADMIN, "lab")
        config.paths.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        tokens.Tokens(config.paths.state).add(token)
        self.place.token.touch(mode=0o600)
        self.place.token.write_text(text + "\n", encoding="ascii")

    def _wait_ready(self, config: Config, process: subprocess.Popen[Any]) -> None:
        until = time.monotonic() + READY_S
        workers = config.gate.workers or os.cpu_count() or 1
        while not self._ready(config, workers):
            if process.poll() is not None or time.monotonic() > until:
                raise LabError(f"the gate did not start:\n{self.logs()}")
            time.sleep(0.02)

    def _ready(self, config: Config, workers: int) -> bool:
        answers = []
        for path in live.workers(config.paths.run):
            with contextlib.suppress(OSError, ValueError):
                answers.append(live.ask(path, {"do": "stats"}))
        gate = len(answers) == workers and all(answer.get("sensor") for answer in answers)
        return gate and self._reviewed(config)

    def _reviewed(self, config: Config) -> bool:
        """Say whether the review API listens."""

        def connect() -> bool:
            family = socket.AF_INET6 if ":" in config.review.address else socket.AF_INET
            with socket.socket(family) as sock:
                return sock.connect_ex((config.review.address, config.review.port)) == 0

        answer: bool = topology.run(self.place.topology.namespace("gate"), connect)
        return answer

    def logs(self, most_bytes: int = 2000) -> str:
        """Return the ends of the processes' logs."""
        parts = []
        for path in sorted(self.place.folder.glob("*.log")):
            text = path.read_text(encoding="utf-8", errors="replace")[-most_bytes:]
            parts.append(f"--- {path.name}\n{text}")
        return "".join(parts)

    def _note(self, supervisor: int) -> None:
        gate = self.place.topology.namespace("gate")
        state.write(state.LabState(self.place.config, gate, supervisor, self.place.folder))

    def _alive(self, pid: int) -> bool:
        """Say whether a process of this lab lives: a reused number is in another cgroup."""
        return pid in cgroups.pids(self.place.cgroup)
