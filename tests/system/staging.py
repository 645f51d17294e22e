"""A real gate between real hosts for system tests: an `appliance.lab` lab with names of its own."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from itertools import count
from pathlib import Path

from appliance.lab import topology
from appliance.lab.place import Place
from appliance.lab.running import Lab
from capture.crypt import Keys
from capture.store import Store

_numbers = count()


def own_place():
    """Return a place that no other test, and not the lab, uses."""
    name = f"nt{os.getpid() % 100000:05d}{next(_numbers) % 100:02d}"
    return Place(
        prefix=name,
        folder=Path("/run") / name,
        disk=Path("/var/tmp") / name,
        memory=Path("/dev/shm") / name,
        management=False,
    )


def wait_for(condition, longest_s=20.0, what="condition"):
    """Return what `condition` gives as soon as it is true; AssertionError after `longest_s`."""
    until = time.monotonic() + longest_s
    while not (found := condition()):
        assert time.monotonic() < until, f"{what} did not come true in {longest_s} s"
        time.sleep(0.02)
    return found


def end(process):
    """End a process that may have ended, wait for it and close its pipes."""
    if process.poll() is None:
        process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class Stage(Lab):
    """A lab for one test or module; `up` and `down` are the fixture's business."""

    def __init__(self, place):
        super().__init__(place)
        self._spawned = []

    def spawn(self, *words, **options):
        """Start a program on a host; `down` ends it, whatever became of the test meanwhile."""
        process = super().spawn(*words, **options)
        self._spawned.append(process)
        return process

    def down(self):
        """End what was started here, and take the lab down."""
        for pid in self.pids("supervisor"):
            os.kill(pid, signal.SIGCONT)  # a test that failed may have stopped it
        try:
            super().down()
        finally:
            while self._spawned:
                end(self._spawned.pop())

    def narrows(self, *words, check=True):
        """Run the command line against this gate, in the gate's namespace."""
        argv = [sys.executable, "-m", "appliance", *words]
        environment = {**os.environ, "NARROWS_CONFIG": str(self.place.config)}
        done = topology.start(
            self.place.topology.namespace("gate"), argv, text=True, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            out, err = done.communicate(timeout=60)
        finally:
            end(done)
        assert not check or done.returncode == 0, f"{words}: {done.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(argv, done.returncode, out, err)

    def client(self, argv, *, account=None, check=True, longest_s=60.0, **options):
        """Run a program on the client host to its end."""
        process = self.spawn(
            "client", argv, account=account, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
        )  # fmt: skip
        try:
            out, err = process.communicate(timeout=longest_s)
        finally:
            end(process)
        assert not check or process.returncode == 0, f"{argv}: {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(argv, process.returncode, out, err)

    def on(self, role, function, *arguments):
        """Call a function inside a host's namespace: sockets it makes stay there."""
        return topology.run(self.place.topology.namespace(role), function, *arguments)

    def listen(self, address, port, *, backlog=128):
        """Return a listening socket on the server host."""

        def make():
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address, port))
            sock.listen(backlog)
            return sock

        return self.on("server", make)

    def connect(self, address, port, *, timeout_s=20.0):
        """Return a socket of the client host that is connected to the server host."""
        return self.on("client", socket.create_connection, (address, port), timeout_s)

    def sessions(self, *words):
        """Return what `narrows sessions list --json` says."""
        return json.loads(self.narrows("sessions", "list", "--json", *words).stdout)

    def shown(self, session):
        """Return what `narrows sessions show ID --json` says."""
        return json.loads(self.narrows("sessions", "show", session, "--json").stdout)

    @property
    def store(self):
        """Return the gate's evidence."""
        paths = self.config.paths
        return Store(paths.state, paths.run)

    @property
    def keys(self):
        """Return the gate's keys."""
        return Keys.load(self.config.paths.state)

    def pids(self, role):
        """Return the processes of a role."""
        return [process["pid"] for process in self.processes() if process["role"] == role]


def served(listener, serve, connections=1):
    """Accept `connections` times in a thread, calling `serve(socket)` each time; returns it."""

    def run():
        for _ in range(connections):
            sock, _ = listener.accept()
            with sock:
                serve(sock)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread
