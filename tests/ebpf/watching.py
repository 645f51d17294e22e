"""A real sensor in this process, over a cgroup and a network namespace of its own."""

import json
import os
import socket
import subprocess
import sys
import time
from ipaddress import ip_network
from itertools import count
from pathlib import Path

from pyroute2 import NetNS, netns

from appliance.lab import cgroups, topology
from ebpf import events
from ebpf.events import Message
from ebpf.sensor import Sensor, SensorSettings

BLOB = Path(__file__).parents[2] / "build" / "sensor.blob"
HERE = "198.51.100.10"  # an address of the namespace's loopback interface, outside 127/8
HERE6 = "2001:db8:2::10"
PREFIXES = (ip_network("198.51.100.0/24"), ip_network("2001:db8:2::/64"))
_numbers = count()


class Gate:
    """A gate worker's end of the sensor's socket; `sensor` works while it waits."""

    def __init__(self, path, sensor):
        self._sensor = sensor
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(str(path))
        self._socket.setblocking(False)
        self._messages = events.Messages()
        self.heard = []

    def read(self):
        """Take in what is there; return everything heard so far."""
        try:
            while data := self._socket.recv(1 << 16):
                self.heard += self._messages.feed(data)
        except BlockingIOError:
            pass
        return self.heard

    def bodies(self, kind):
        return [body for found, body in self.read() if found is kind]

    def owners(self):
        return [json.loads(body) for body in self.bodies(Message.OWNER)]

    def owner(self, handle):
        """Return the latest owner record of a handle."""
        return next((o for o in reversed(self.owners()) if o["handle"] == f"{handle:016x}"), None)

    def connects(self):
        return [events.Connect.parse(body) for body in self.bodies(Message.CONNECT)]

    def losses(self):
        return [json.loads(body) for body in self.bodies(Message.LOST)]

    def ask(self, handle):
        self._socket.send(events.ask(handle))

    def send(self, data):
        self._socket.sendall(data)

    def close(self):
        self._socket.close()


class Watched:
    """The cgroup, the namespace, and the sensor that `start` made over them."""

    def __init__(self, folder):
        self.name = f"nt{os.getpid() % 100000}e{next(_numbers)}"
        self.folder = folder
        self.cgroup = cgroups.make(cgroups.root() / self.name)
        self.sensor = None
        self._gates = []
        self._spawned = []
        netns.create(self.name)
        with NetNS(self.name) as ip:
            lo = ip.link_lookup(ifname="lo")[0]
            ip.link("set", index=lo, state="up")
            ip.addr("add", index=lo, address=HERE, prefixlen=32)
            ip.addr("add", index=lo, address=HERE6, prefixlen=128, flags=2)

    def start(self, **settings):
        given = {
            "cgroup": self.cgroup, "socket": self.folder / "run" / "sensor.sock", "blob": BLOB,
            "prefixes": PREFIXES, "host": "client",
        }  # fmt: skip
        self.settings = SensorSettings(**given | settings)
        self.sensor = Sensor(self.settings)
        return self.sensor

    def stop(self):
        for gate in self._gates:
            gate.close()
        self._gates.clear()
        if self.sensor is not None:
            self.sensor.close()
            self.sensor = None

    def close(self):
        self.stop()
        cgroups.remove(self.cgroup)
        for process in self._spawned:  # those too that were moved into another cgroup
            process.kill()
            process.wait()
            for pipe in filter(None, (process.stdin, process.stdout, process.stderr)):
                pipe.close()
        netns.remove(self.name)

    def gate(self):
        """Return a new client of the sensor, after its HELLO."""
        made = Gate(self.settings.socket, self.sensor)
        self._gates.append(made)
        self.until(lambda: made.bodies(Message.HELLO))
        return made

    def until(self, condition, longest_s=20.0):
        """Let the sensor work until `condition` holds; return what it gave."""
        end = time.monotonic() + longest_s
        while not (found := condition()):
            assert time.monotonic() < end, "it did not come true"
            if self.sensor is not None:
                self.sensor.step(0.02)
        return found

    def spawn(self, argv, *, cgroup=None, **options):
        """Start a program inside the cgroup and the namespace."""
        group = self.cgroup if cgroup is None else cgroup
        process = topology.start(self.name, list(map(str, argv)), cgroup=group, **options)
        self._spawned.append(process)
        return process

    def run(self, argv, *, check=True, **options):
        """Run a program to its end while the sensor works; return (pid, exit code)."""
        process = self.spawn(argv, **options)
        self.until(lambda: process.poll() is not None)
        assert not check or process.returncode == 0
        return process.pid, process.returncode

    def python(self, code, *words, **options):
        return self.spawn([sys.executable, "-c", code, *words], **options)

    def listen(self, address=HERE):
        """Return a listening socket of the namespace."""

        def make():
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.bind((address, 0))
            sock.listen(4096)
            return sock

        return topology.run(self.name, make)


def compiled(folder, name, code, *flags):
    """Return the path of a C program made from `code`."""
    source = folder / f"{name}.c"
    source.write_text(code)
    subprocess.run(["gcc", "-O2", *flags, "-o", folder / name, source], check=True)
    return folder / name
