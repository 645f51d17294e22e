"""The gate's end of the sensor's unix socket: owners and connect events in, questions out.

Runs on the gate's loop and connects again by itself. Messages are a u32 length, a u8 type and a body; `ebpf.events` names
the types. What a sensor said stays valid when it goes away: a handle means the same exec for ever.
"""

from __future__ import annotations

import json
import logging
import socket
import struct
import time
from typing import TYPE_CHECKING, Any

from ebpf import events

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from appliance.attribution.join import Loop
    from ebpf.table import OwnerTable

log = logging.getLogger("narrows.sensor-link")

RETRY_S = 0.5
MOST_BYTES = 1 << 20
_HEAD = struct.Struct("<IB")
_PEER = struct.Struct("3i")


class SensorLink:
    """Feeds an OwnerTable from one sensor."""

    def __init__(
        self, loop: Loop, path: Path, table: OwnerTable, moved: Callable[[], None]
    ) -> None:
        """`moved` is called after messages were taken in."""
        self._loop, self._path, self._table, self._moved = loop, path, table, moved
        self._sock: socket.socket | None = None
        self._buffer = bytearray()
        self.keys: list[bytes] = []
        self.covers: list[str] = []
        self.lost = 0  #: events that the sensor lost, by its own count
        self.connected = False  #: a HELLO came on the present connection
        self._connect()

    def ask(self, handle: int) -> None:
        """Ask what a handle means; the answer comes as an owner record."""
        if self._sock is not None:
            try:
                self._sock.send(_HEAD.pack(9, events.ASK) + struct.pack("<Q", handle))
            except OSError:
                self._drop()

    def close(self) -> None:
        """End the link for good."""
        if self._sock is not None:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
            self._sock = None
        self._path = None  # type: ignore[assignment]

    def _connect(self) -> None:
        if self._path is None:
            return
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(str(self._path))
            _, uid, _ = _PEER.unpack(
                sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
            )
            if uid != 0:
                raise PermissionError(f"the sensor's socket belongs to uid {uid}")
        except OSError as wrong:
            sock.close()
            log.debug("no sensor yet: %s", wrong)
            self._loop.call_later(RETRY_S, self._connect)
            return
        sock.setblocking(False)
        self._sock = sock
        self._buffer.clear()
        self._loop.add_reader(sock.fileno(), self._readable)

    def _drop(self) -> None:
        if self._sock is not None:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
            self._sock = None
            self.connected = False
            self._loop.call_later(RETRY_S, self._connect)

    def drain(self) -> None:
        """Take in what has arrived, without waiting for the loop."""
        if self._sock is not None:
            self._readable()

    def _readable(self) -> None:
        assert self._sock is not None
        try:
            data = self._sock.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop()
            return
        self._buffer += data
        at, buffer = 0, self._buffer
        while len(buffer) - at >= _HEAD.size:
            length, kind = _HEAD.unpack_from(buffer, at)
            if not 1 <= length <= MOST_BYTES:
                log.error("the sensor sent a message of %d bytes", length)
                self._drop()
                return
            if len(buffer) - at < 4 + length:
                break
            self._take(kind, bytes(buffer[at + 5 : at + 4 + length]))
            at += 4 + length
        del buffer[:at]
        self._moved()

    def _take(self, kind: int, body: bytes) -> None:
        now = time.monotonic_ns()
        try:
            if kind == events.CONNECT:
                event = events.Connect.unpack(body)
                self._table.add_connect(
                    event.saddr,
                    event.sport,
                    event.daddr,
                    event.dport,
                    event.handle,
                    event.cgroup_id,
                    event.ts,
                    now,
                )
            elif kind == events.OWNER:
                owner: dict[str, Any] = json.loads(body)
                self._table.add_owner(int(owner["handle"], 16), owner, now)
            elif kind == events.HELLO:
                hello = json.loads(body)
                fresh = [bytes.fromhex(key) for key in hello["mac_keys"]]
                self.keys = (fresh + [key for key in self.keys if key not in fresh])[:8]
                self.covers = list(hello["covers"])
                self.connected = True
            elif kind == events.LOST:
                self.lost = sum(json.loads(body).values())
        except (ValueError, KeyError, TypeError, struct.error) as wrong:
            log.error("the sensor sent what cannot be read: %s", wrong)
