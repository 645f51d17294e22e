"""The sensor: says who owns the sockets of this host, to the gates, until SIGTERM.

`narrows sensor` runs it, as root, on every host whose processes are to be known. One thread waits
on one epoll: the rings of the BPF programs (`ebpf.loader`), the files that are opened to be
executed (`ebpf.opens`), the digests (`ebpf.hashing`, a thread of its own) and the gates
(`ebpf.serving`). All but the connects are on a second epoll within it, and can end a pause.
Nothing is polled: a host where nothing is executed or connected costs nothing.

Order is what joins depend on. Whatever woke the loop, it first notes how far the connect ring has
come, then the record ring, then takes all opens, the records and the connects up to there. So a
record finds the open of its file, and a connect its record; the gate gets OWNER before CONNECT
unless a digest is still being made.

It dies without traces: everything in the kernel hangs on its descriptors. docs/sensor.md says what
is hooked, what it costs, and where it may be wrong.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import resource
import secrets
import select
import signal
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from ebpf import events, procfs, syscalls
from ebpf.census import Census
from ebpf.cgroups import Cgroups
from ebpf.connecting import AGAIN_S, Connecting
from ebpf.events import Message, Record, Settings
from ebpf.hashing import Hasher
from ebpf.host import AlreadyRunning, Host, StartLock, this_host
from ebpf.loader import LoadError, Programs, fitting
from ebpf.opens import ExecOpens
from ebpf.serving import QUEUE_BYTES, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from ipaddress import IPv4Network, IPv6Network
    from pathlib import Path

    from ebpf.owners import Owner
    from ebpf.ring import Ring

log = logging.getLogger("narrows.sensor")

FAILED, UNAVAILABLE = 1, 69
BATCH = 64  # events that are taken before something is sent on
#: Pause after events: those that follow each other closely cost one wake-up together, of us and of
#: the gates. An event that comes alone is passed on at once. Connects are hardly ever waited for,
#: because the SYN says the same; executions are, and end the longer pause, as questions do.
NAP_S, CONNECTS_NAP_S = 0.0002, 0.001
COUNT_S = 0.05  # how soon losses are looked for after something happened
#: Losses that may be of a connect event.
_CONNECTS = ("connect_ring", "cookies", "skipped")
_CONNECT_HEAD = events.message(Message.CONNECT, bytes(events.CONNECT.size))[:5]
_WHO = struct.Struct("<Q")
_TGID = struct.Struct("<40xI")


_ENDING = (signal.SIGTERM, signal.SIGINT)


class _Closable(Protocol):
    def close(self) -> None: ...


_Part = TypeVar("_Part", bound=_Closable)


@dataclass(frozen=True, slots=True)
class SensorSettings:
    """What one sensor watches and whom it serves."""

    cgroup: Path  #: directory of the subtree whose processes are seen
    socket: Path  #: where gates connect; its directory is made when it is missing, 0700
    blob: Path | None = None  #: compiled programs; BCC makes them where none fits
    prefixes: tuple[IPv4Network | IPv6Network, ...] = ()  #: towards which SYNs carry the option
    covers: tuple[IPv4Network | IPv6Network, ...] = ()  #: client addresses it answers for
    host: str = ""  #: name in owner records; "" is the host name
    skipped: tuple[Path, ...] = ()  #: cgroups that are never noted
    give_up: int = 1  #: SYN retry from which on the option is left away
    queue_bytes: int = QUEUE_BYTES  #: what one slow gate may owe us
    realtime: bool = True  #: go before ordinary processes: every new session waits for the sensor


def run(settings: SensorSettings) -> int:
    """Run until SIGTERM or SIGINT; return the exit code: 69 when this machine lacks something."""
    _all_descriptors()
    gc.set_threshold(100_000, 50, 1000)  # owners are many, and nothing here makes cycles
    if settings.realtime:
        _go_first()
    try:
        sensor = Sensor(settings)
    except (LoadError, AlreadyRunning, OSError) as wrong:
        log.error("the sensor cannot start: %s", wrong)  # noqa: TRY400 - the reason is the message
        return UNAVAILABLE
    try:
        sensor.serve()
    finally:
        sensor.close()
    return 0


class Sensor:
    """One running sensor; `close` detaches and forgets everything."""

    def __init__(self, settings: SensorSettings) -> None:
        """Load, attach, scan and listen. Raises LoadError, AlreadyRunning or OSError."""
        self._closing = contextlib.ExitStack()
        try:
            self._start(settings)
        except BaseException:
            self._closing.close()
            raise

    def _start(self, settings: SensorSettings) -> None:
        began = time.monotonic()
        settings.socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = self._own(StartLock(settings.socket.with_name("sensor.epoch")))
        self._host = this_host(settings.host, lock.next_epoch())
        self._key = secrets.token_bytes(16)
        self._batch = bytearray()
        self._batched = 0
        self._stopping = False
        self._count_at = 0.0
        self._again_at = 0.0
        self._connects_lost = 0
        self._poll = self._own(select.epoll())
        self._urgent = self._own(select.epoll())
        self._named = False
        mount = procfs.cgroup_mount()
        within = settings.cgroup.resolve().relative_to(mount.resolve())
        base = events.base(self._host.number, self._host.epoch)
        self._programs = self._own(Programs.load(fitting(settings.blob)))
        self._configure(settings, base, len(within.parts))
        self._connecting = Connecting(self._programs.connects)
        self._records = self._own(self._programs.ring("record_ring"))
        self._connects = self._own(self._programs.ring("connect_ring"))
        self._opens = self._own(ExecOpens()) if _has_fanotify() else None
        self._hasher = self._own(Hasher())
        self._programs.attach(settings.cgroup)
        self._census = Census(
            self._programs, self._own(Cgroups(mount)), self._opens, self._hasher, self._host.name,
            base, f"/{within}" if within.parts else "/", self._publish,
        )  # fmt: skip
        hello = events.message(Message.HELLO, _hello(self._host, self._key, settings))
        self._server = self._own(
            Server(settings.socket, self._urgent, hello, self._asked, self._came,
                   settings.queue_bytes)
        )  # fmt: skip
        found = self._census.scan()
        self._watch()
        log.info(
            "watching %s, %d processes were there before; ready in %.0f ms",
            settings.cgroup, found, 1000 * (time.monotonic() - began),
        )  # fmt: skip

    def close(self) -> None:
        """Detach, disconnect and stop."""
        self._closing.close()

    def stop(self, *_: object) -> None:
        """End `serve` soon; may be called from a signal handler."""
        self._stopping = True

    def serve(self) -> None:
        """Work until `stop`, SIGTERM or SIGINT."""
        reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        handlers = [(number, signal.signal(number, self.stop)) for number in _ENDING]
        self._poll.register(reading, select.EPOLLIN)
        try:
            while not self._stopping:
                if self.step():
                    self._nap()
        finally:
            for number, handler in handlers:
                signal.signal(number, handler)
            signal.set_wakeup_fd(before)
            self._poll.unregister(reading)
            os.close(reading)
            os.close(writing)

    def step(self, longest_s: float = -1) -> int:
        """Wait until something happens, `longest_s` at most (-1: for ever), and take it in.

        Returns how much the kernel had to say.
        """
        timeout = self._wait_s()
        if longest_s >= 0:
            timeout = longest_s if timeout < 0 else min(timeout, longest_s)
        ready = self._poll.poll(timeout)
        taken = self._drain()
        if any(fd == self._urgent.fileno() for fd, _ in ready):
            for fd, what in self._urgent.poll(0):
                taken += self._handle(fd, what)
        self._census.expire(time.monotonic_ns())
        self._flush()
        return taken

    # -- start -------------------------------------------------------------------------------------

    def _own(self, part: _Part) -> _Part:
        self._closing.callback(part.close)
        return part

    def _configure(self, settings: SensorSettings, base: int, level: int) -> None:
        key0, key1 = struct.unpack("<QQ", self._key)
        told = Settings(key0, key1, base, settings.cgroup.stat().st_ino, level, settings.give_up)
        skipped = [path.stat().st_ino for path in settings.skipped]
        self._programs.configure(told, settings.prefixes, skipped)

    def _watch(self) -> None:
        for fd in (self._connects.fd, self._urgent.fileno()):
            self._poll.register(fd, select.EPOLLIN)
        for fd in (self._records.fd, self._hasher.wakeup_fd):
            self._urgent.register(fd, select.EPOLLIN)
        if self._opens is not None:
            self._urgent.register(self._opens.events_fd, select.EPOLLIN)
            self._urgent.register(self._opens.mounts_fd, select.EPOLLPRI)

    # -- the loop ----------------------------------------------------------------------------------

    def _nap(self) -> None:
        """Pause after events, because others follow: not at the expense of who waits for one."""
        if self._named:
            time.sleep(NAP_S)
        else:
            self._urgent.poll(CONNECTS_NAP_S)

    def _handle(self, fd: int, what: int) -> bool:
        """Take care of a descriptor; say whether more is likely to follow at once."""
        if self._server.ready(fd, what):
            return False
        if fd == self._hasher.wakeup_fd:
            self._hasher.finished()
        elif self._opens is not None and fd == self._opens.mounts_fd:
            self._opens.mark_mounts()
            self._census.files.forget_mounts()
        elif self._opens is not None and fd == self._opens.events_fd:
            self._opens.drain()
            return True  # the exec's record
        return False

    def _drain(self) -> int:
        """Take in everything that happened up to now, in the order that joins need; return how
        many events it was.
        """
        connects, records = self._connects.produced(), self._records.produced()
        taken = 0
        self._named = records != self._records.consumed()
        if self._named:
            if self._opens is not None:
                self._opens.drain()
            taken += self._take(self._records, self._record, records)
        if connects != self._connects.consumed():
            taken += self._take(self._connects, self._connect, connects)
        if taken and not self._count_at:
            self._count_at = time.monotonic() + COUNT_S
        return taken

    def _take(self, ring: Ring, use: Callable[[memoryview], None], until: int) -> int:
        """Read a ring up to a position; what comes of it goes to the gates piece by piece."""
        taken = 0
        while count := ring.drain(use, until=until, most=BATCH):
            taken += count
            self._flush()
        return taken

    def _flush(self) -> None:
        if self._batch:
            self._server.broadcast(self._batch, self._batched)
            self._batch.clear()
            self._batched = 0

    def _record(self, event: memoryview) -> None:
        self._census.take(Record.parse(event))

    def _connect(self, event: memoryview) -> None:
        (handle,) = _WHO.unpack_from(event)
        if handle not in self._census.owners:
            self._census.connected(handle, _TGID.unpack_from(event)[0])
        body = bytes(event)
        self._connecting.add(body)
        if not self._again_at:
            self._again_at = time.monotonic() + AGAIN_S
        self._batch += _CONNECT_HEAD
        self._batch += body
        self._batched += 1

    def _came(self, pid: int) -> list[bytes]:
        """A gate connected: leave its sockets alone, and return what it missed."""
        self._programs.skip_process(pid)
        return self._still_connecting()

    def _still_connecting(self) -> list[bytes]:
        self._losses()
        waiting = self._connecting.waiting(time.monotonic_ns())
        return [_CONNECT_HEAD + body for body in waiting]

    def _tell_again(self) -> None:
        """Gates forget connects that they could not use: tell those that still wait again."""
        told = self._still_connecting()
        if told:
            self._server.broadcast(b"".join(told), len(told))
        self._again_at = time.monotonic() + AGAIN_S if told else 0.0

    def _publish(self, owner: Owner) -> None:
        self._batch += events.message(Message.OWNER, owner.encoded())
        self._batched += 1

    def _asked(self, handle: int) -> Iterable[bytes]:
        """Answer a question; nothing when OWNER comes by itself."""
        self._drain()
        owner = self._census.owner(handle)
        if owner is not None:
            return [events.message(Message.OWNER, owner.encoded())]
        return [] if self._census.expected(handle) else [events.unknown(handle)]

    def _wait_s(self) -> float:
        """Do what is due; return how long nothing else is, -1 for ever."""
        now = time.monotonic()
        if self._count_at and self._count_at <= now:
            self._count_at = 0.0
            self._server.report(self._losses())
        if self._again_at and self._again_at <= now:
            self._tell_again()
        due = [self._count_at, self._again_at, self._census.due_ns / 1e9]
        if self._opens is not None:
            due.append(self._opens.expire() / 1e9)
        nearest = min(filter(None, due), default=0.0)
        return max(nearest - now, 0.0) if nearest else -1

    def _losses(self) -> dict[str, int]:
        """Return the counters; where a connect event was lost, older ones are not told again."""
        counters = self._programs.lost()
        connects = sum(counters.get(name, 0) for name in _CONNECTS)
        if connects > self._connects_lost:
            self._connects_lost = connects
            self._connecting.forget()
        counters["digests"] = self._hasher.refused
        counters["opens"] = self._opens.overflows if self._opens is not None else 0
        return counters


def _hello(host: Host, key: bytes, settings: SensorSettings) -> bytes:
    fields = {
        "host_id": host.number,
        "host": host.name,
        "boot_id": host.boot,
        "epoch": host.epoch,
        "mac_keys": [key.hex()],
        "covers": [str(network) for network in settings.covers],
        "version": events.VERSION,
    }
    return json.dumps(fields).encode()


def _has_fanotify() -> bool:
    """Say whether fanotify is there; the sensor does with less."""
    try:
        os.close(syscalls.fanotify_init())
    except OSError as wrong:
        log.warning("no fanotify (%s): digests only of processes that still run", wrong)
        return False
    return True


def _go_first() -> None:
    """Run before ordinary processes, or at least with more weight; the hashing thread does not.

    It cannot take a processor away for long: what it has to do was caused by an ordinary process
    that took several times longer (docs/sensor.md, OVERHEAD).
    """
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except OSError:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, -10)


def _all_descriptors() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
