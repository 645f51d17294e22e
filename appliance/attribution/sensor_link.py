"""The gate's end of the sensor's unix socket: owners and connect events in, questions out.

Runs on the gate's loop and connects again by itself, every 0.1 s. The messages are those of
`ebpf.events`; HELLO is the first on every connection, and a sensor may send it again when its keys
change. What came in is put into the `OwnerTable`, and noted in `news` for whoever waits for it. It
never answers who a session belongs to.

What a sensor said stays valid when it goes away: a handle means the same exec for ever, and a SYN
that was made under an older key may be accepted after the newer key was announced. So keys are kept
across sensor restarts, the newest first, as long as the host has not booted anew.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import socket
import struct
import time
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import orjson

from appliance.wire.argvsecrets import blanked
from appliance.wire.httpsecrets import Secrets
from ebpf import events
from ebpf.events import Message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from appliance.config import Network
    from ebpf.table import OwnerTable

log = logging.getLogger("narrows.sensor-link")

RETRY_S = 0.1
#: How long after the start, or after a sensor went away, its (next) HELLO is still expected.
SETTLE_S = 1.0
GREET_S = 0.002
KEY_BYTES = 16
MOST_KEYS = 8
_READ_BYTES = 1 << 16
#: Losses that may be of a connect event.
_CONNECTS = ("connect_ring", "cookies", "skipped", "queue")
#: SYNs that had no room for the option: their event tells the same.
_NOT_AN_EVENT = "options"
_PEER = struct.Struct("3i")


class Loop(Protocol):
    """What attribution asks of an event loop; the gate's and asyncio's offer it."""

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> Any:
        """Call once after `delay` seconds; the answer has `cancel`."""
        ...

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> Any:
        """Call whenever `fd` is readable."""
        ...

    def remove_reader(self, fd: Any) -> Any:
        """Stop."""
        ...


class News(NamedTuple):
    """What came in since it was last asked for."""

    handles: set[int]  #: owners that are known now
    unknown: set[int]  #: handles that the sensor does not know
    connects: set[bytes]  #: 4-tuples (`ebpf.events.four_tuple`)
    hello: bool  #: keys and covered clients may have changed


class SensorLink:
    """Feeds an `OwnerTable` from one sensor."""

    def __init__(
        self,
        loop: Loop,
        path: Path,
        table: OwnerTable,
        moved: Callable[[], None],
        covers: Iterable[Network] = (),
    ) -> None:
        """Connect, now or as soon as the sensor is there; `moved` is called after messages came in.

        `covers` are clients that have a sensor by configuration, whether or not it ever said so.
        """
        self._loop, self._path, self._table, self._moved = loop, path, table, moved
        self._configured = tuple(covers)
        self._sock: socket.socket | None = None
        self._messages = events.Messages()
        self._secrets = Secrets()
        self._timer: Any = None
        self._host: tuple[Any, Any] | None = None
        self._away_since = time.monotonic()
        self._news = News(set(), set(), set(), hello=False)
        self._losses = 0
        self.keys: list[bytes] = []  #: 16 bytes each, newest first
        self.covers: tuple[Network, ...] = self._configured
        self.lost = 0  #: events that this sensor lost, by its own count
        self.connected = False  #: a HELLO came on the present connection
        self.pid = 0  #: process that listens at the other end; 0 without a connection
        self._connect()

    @property
    def settling(self) -> bool:
        """Say whether no sensor is connected, but one may be at any moment."""
        return not self.connected and time.monotonic() - self._away_since < SETTLE_S

    async def greet(self, longest_s: float = SETTLE_S) -> None:
        """Wait for the HELLO of a sensor that is there; without one return at once."""
        until = time.monotonic() + longest_s
        while self._sock is not None and not self.connected:
            if time.monotonic() > until:
                return
            await asyncio.sleep(GREET_S)

    def ask(self, handle: int) -> None:
        """Ask what a handle means; OWNER or UNKNOWN answers. Nothing happens without a sensor."""
        if self._sock is None:
            return
        try:
            sent = self._sock.send(events.ask(handle))
        except BlockingIOError:
            return  # the sensor is far behind; its answer would come too late anyway
        except OSError as wrong:
            self._drop(str(wrong))
            return
        if sent != len(events.ask(handle)):
            self._drop("a question was sent in part")

    def drain(self) -> None:
        """Take in everything that has arrived, without waiting for the loop."""
        while self._sock is not None and self._readable():
            pass

    def news(self) -> News:
        """Return what came in since the last call."""
        found, self._news = self._news, News(set(), set(), set(), hello=False)
        return found

    def close(self) -> None:
        """End the link for good."""
        self._disconnect()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _connect(self) -> None:
        self._timer = None
        try:
            sock = self._connected_socket()
        except OSError as wrong:
            log.debug("no sensor: %s", wrong)
            self._timer = self._loop.call_later(RETRY_S, self._connect)
            return
        self._sock = sock
        self._messages = events.Messages()
        self._secrets = Secrets()
        self._loop.add_reader(sock.fileno(), self._readable)

    def _connected_socket(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.connect(str(self._path))
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        except BaseException:
            sock.close()
            raise
        pid, uid, _ = _PEER.unpack(credentials)
        if uid not in {0, os.geteuid()}:
            sock.close()
            raise PermissionError(f"the sensor's socket belongs to uid {uid}")
        self.pid = pid
        return sock

    def _disconnect(self) -> None:
        if self._sock is not None:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
            self._sock = None
            self.pid = 0
        if self.connected:
            self.connected = False
            self._away_since = time.monotonic()
            # Nobody tells what connects from now on, and an older event would stand for it.
            self._table.forget_connects()

    def _drop(self, why: str) -> None:
        log.warning("the sensor is gone: %s", why)
        self._disconnect()
        if self._timer is None:
            self._timer = self._loop.call_later(RETRY_S, self._connect)

    def _readable(self) -> bool:
        """Take in one read; say whether there may be more."""
        assert self._sock is not None
        try:
            data = self._sock.recv(_READ_BYTES)
            if not data:
                self._drop("it closed the connection")
                return False
            now = time.monotonic_ns()
            for kind, body in self._messages.feed(data):
                self._take(kind, body, now)
        except BlockingIOError:
            return False
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as wrong:
            self._drop(f"{type(wrong).__name__}: {wrong}")
            return False
        self._moved()
        return len(data) == _READ_BYTES

    def _take(self, kind: Message, body: bytes, now: int) -> None:
        if kind is Message.HELLO:
            self._hello(orjson.loads(body))
        elif not self.connected:
            raise ValueError(f"{kind.name} came before HELLO")
        elif kind is Message.CONNECT:
            self._news.connects.add(self._table.add_connect(body, now))
        elif kind is Message.OWNER:
            owner = orjson.loads(body)
            owner["argv"] = blanked(owner["argv"], self._secrets)
            handle = int(owner["handle"], 16)
            self._table.add_owner(handle, owner, now)
            self._news.handles.add(handle)
        elif kind is Message.UNKNOWN:
            self._news.unknown.add(events.handle_of(body))
        elif kind is Message.LOST:
            self._lost(orjson.loads(body))

    def _hello(self, hello: dict[str, Any]) -> None:
        keys = [bytes.fromhex(key) for key in hello["mac_keys"]]
        if any(len(key) != KEY_BYTES for key in keys):
            raise ValueError("a MAC key has 16 bytes")
        said = [ipaddress.ip_network(text) for text in hello["covers"]]
        host = (hello["host_id"], hello["boot_id"])
        if host != self._host:
            self.keys, self._host = [], host
        self.keys = (keys + [key for key in self.keys if key not in keys])[:MOST_KEYS]
        self.covers = (*self._configured, *said)
        if not self.connected:
            self.connected = True
            self._losses = 0
            log.info("sensor of host %s is connected", hello["host_id"])
        self._news = self._news._replace(hello=True)

    def _lost(self, counters: dict[str, Any]) -> None:
        self.lost = sum(count for name, count in counters.items() if name != _NOT_AN_EVENT)
        connects = sum(counters.get(name, 0) for name in _CONNECTS)
        if connects > self._losses:
            # A connect event may be among them, and then an older one stands for the wrong process.
            self._table.forget_connects()
        self._losses = connects
