"""Mirrors of the C structs, and the messages on the sensor's socket.

The structs are declared once more in `ebpf/programs/sensor.h`, where static asserts hold the same
sizes. The sensor reads them from ring buffers and maps; the gate reads `Connect` and the messages
from the sensor's socket. Nothing here does I/O.

A message is a u32 (little endian) length of what follows the length, a u8 type and the body:

| type | from | body |
|---|---|---|
| HELLO | sensor | JSON {host_id, host, boot_id, epoch, mac_keys, covers, version}, always first |
| OWNER | sensor | JSON, an owner record |
| CONNECT | sensor | the C struct `connect_event`, 112 bytes |
| LOST | sensor | JSON, counters since the sensor started, plus what this client's queue dropped |
| ASK | gate | u64 handle; answered by OWNER or UNKNOWN |
| UNKNOWN | sensor | u64 handle |
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final, NamedTuple

#: Version of the socket protocol and of the structs.
VERSION: Final = 1

_MAPPED = bytes(10) + b"\xff\xff"

CONNECT: Final = struct.Struct("<5Q4I16s16s16sHHI")
RECORD: Final = struct.Struct("<5Q8I16s256s512s")
RECORD_HEAD: Final = struct.Struct("<5Q8I16s")
PROCESS: Final = struct.Struct("<3Q4I")
IDENT: Final = struct.Struct("<3Q4I16s")
SETTINGS: Final = struct.Struct("<4Q12I")

assert CONNECT.size == 112
assert RECORD.size == 856
assert RECORD_HEAD.size == 88
assert PROCESS.size == 40
assert IDENT.size == 56
assert SETTINGS.size == 80

#: `Process.flags`: sockets of this process are never noted, because it is a gate.
SKIPPED: Final = 1

_HOST_SHIFT = 48
_EPOCH_SHIFT = 36
_EPOCH_MASK = 0xFFF
_FALLBACK = 1 << 35
_GENERATION_SHIFT = 22
_NUMBER_MASK = _FALLBACK - 1
_PID_MASK = (1 << _GENERATION_SHIFT) - 1
_GENERATION_MASK = 0x1FFF


class Kind(IntEnum):
    """What a process record of the kernel says."""

    EXEC = 1  #: a program was started
    #: a process without a handle connected (older than the sensor, and not found by its scan)
    SEEN = 2
    MOVED = 3  #: a process connected from another cgroup, or as another user, than its handle says


class Lost(IntEnum):
    """Index in the map of counters; each counts events that did not reach their place."""

    CONNECT_RING = 0  #: connect events that did not fit into the ring
    RECORD_RING = 1  #: process records that did not fit into the ring (they can still be asked for)
    PROCESSES = 2  #: processes that did not fit into the process map
    RECORDS = 3  #: records that did not fit into the record map
    COOKIES = 4  #: connecting sockets that did not fit into the socket map
    OPTIONS = 5  #: SYNs without room for the option, or whose option could not be written


class Message(IntEnum):
    """Types of the messages on the sensor's socket."""

    HELLO = 1
    OWNER = 2
    CONNECT = 3
    LOST = 4
    ASK = 5
    UNKNOWN = 6


class Handle(NamedTuple):
    """The parts of a 64-bit handle: host 16 bit, epoch 12 bit, fallback 1 bit, number 35 bit.

    In the fallback form (a process whose exec the sensor did not see) `number` is a generation (13
    bit, 0 for the scan at start) and the process id (22 bit); else it counts executions.
    """

    host: int
    epoch: int
    fallback: bool
    number: int

    @classmethod
    def split(cls, handle: int) -> Handle:
        """Take a handle apart."""
        return cls(
            handle >> _HOST_SHIFT,
            handle >> _EPOCH_SHIFT & _EPOCH_MASK,
            bool(handle & _FALLBACK),
            handle & _NUMBER_MASK,
        )

    @property
    def joined(self) -> int:
        """Return the 64-bit form."""
        return base(self.host, self.epoch) | (_FALLBACK if self.fallback else 0) | self.number


def base(host: int, epoch: int) -> int:
    """Return the bits that all handles of one sensor start share."""
    return (host & 0xFFFF) << _HOST_SHIFT | (epoch & _EPOCH_MASK) << _EPOCH_SHIFT


def fallback(shared: int, pid: int, generation: int = 0) -> int:
    """Return the fallback handle of a process; `shared` comes from `base`."""
    generation &= _GENERATION_MASK
    return shared | _FALLBACK | generation << _GENERATION_SHIFT | (pid & _PID_MASK)


class Connect(NamedTuple):
    """One TCP connection attempt, noted before its SYN leaves (`struct connect_event`).

    Addresses are 16 bytes, IPv4 as ::ffff:a.b.c.d, also when an IPv6 socket was used; ports are
    numbers. `ts` is CLOCK_MONOTONIC; `tgid` and `tid` are those of the thread that called
    connect(), which for a fork without exec differ from the owner record's pid.
    """

    handle: int
    cgroup: int
    netns: int
    cookie: int
    ts: int
    tgid: int
    tid: int
    uid: int
    gid: int
    comm: bytes
    source: bytes
    target: bytes
    sport: int
    dport: int
    version: int

    @classmethod
    def parse(cls, data: bytes | memoryview) -> Connect:
        """Read a CONNECT body; struct.error when it is too short."""
        return cls(*CONNECT.unpack_from(data))

    def pack(self) -> bytes:
        """Return the body."""
        return CONNECT.pack(*self)

    @property
    def saddr(self) -> bytes:
        """Return the source address, 4 or 16 bytes, as `socket.inet_pton` gives it."""
        return unmapped(self.source)

    @property
    def daddr(self) -> bytes:
        """Return the destination address, 4 or 16 bytes."""
        return unmapped(self.target)


class Record(NamedTuple):
    """One process record (`struct record`); `path` and `argv` are empty in the short form.

    `inode` and `device` name the executable as the kernel does; both are 0 when there is none.
    """

    ts: int
    handle: int
    parent: int
    cgroup: int
    inode: int
    device: int
    kind: int
    tgid: int
    ptgid: int
    uid: int
    gid: int
    argv_bytes: int
    unused: int
    comm: bytes
    path: bytes = b""
    argv: bytes = b""

    @classmethod
    def parse(cls, data: bytes | memoryview) -> Record:
        """Read either form; struct.error when it is too short."""
        if len(data) < RECORD.size:
            return cls(*RECORD_HEAD.unpack_from(data))
        return cls(*RECORD.unpack_from(data))

    def pack(self) -> bytes:
        """Return the long form."""
        return RECORD.pack(*self)

    @property
    def arguments(self) -> list[str]:
        """Return argv; its last word is cut when `cut` is true."""
        if not self.argv_bytes or not self.argv:
            return []
        kept = self.argv[: self.argv_bytes]
        return [text(part) for part in kept.removesuffix(b"\0").split(b"\0")]

    @property
    def cut(self) -> bool:
        """Say whether the arguments were longer than the record keeps (512 bytes)."""
        return self.argv_bytes > len(self.argv) > 0


class Process(NamedTuple):
    """What the kernel keeps per process (`struct process`)."""

    handle: int
    started: int
    cgroup: int
    uid: int
    parent_pid: int
    flags: int = 0
    unused: int = 0

    @classmethod
    def parse(cls, data: bytes) -> Process:
        """Read a value of the process map."""
        return cls(*PROCESS.unpack(data))

    def pack(self) -> bytes:
        """Return the value of the process map."""
        return PROCESS.pack(*self)


class Offsets(NamedTuple):
    """Where members of this kernel's structs lie, in the order of `struct settings`."""

    task_mm: int
    task_signal: int
    signal_live: int
    mm_exe: int
    mm_arg_start: int
    mm_arg_end: int
    file_inode: int
    inode_number: int
    inode_super: int
    super_device: int


class Settings(NamedTuple):
    """What the programs are told at start (`struct settings`)."""

    key0: int
    key1: int
    base: int
    cgroup: int
    level: int
    give_up: int

    def pack(self, offsets: Offsets) -> bytes:
        """Return the value of the settings map."""
        return SETTINGS.pack(*self, *offsets)


def text(data: bytes) -> str:
    """Return kernel bytes up to the first NUL as text; what is not UTF-8 becomes a hex escape."""
    return data.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def mapped(address: bytes) -> bytes:
    """Return a packed IPv4 or IPv6 address in its 16-byte form."""
    return _MAPPED + address if len(address) == 4 else address


def unmapped(address: bytes) -> bytes:
    """Return the 4-byte form of a mapped IPv4 address; other addresses as they are."""
    return address[12:] if len(address) == 16 and address.startswith(_MAPPED) else address


_HEAD = struct.Struct("<IB")
_MESSAGES: Final = {int(kind): kind for kind in Message}
_HANDLE = struct.Struct("<Q")
#: Longest message; an owner record is bounded far below it.
LONGEST: Final = 1 << 20


def message(kind: Message, body: bytes) -> bytes:
    """Return a whole message."""
    return _HEAD.pack(len(body) + 1, kind) + body


def ask(handle: int) -> bytes:
    """Return an ASK message."""
    return message(Message.ASK, _HANDLE.pack(handle))


def unknown(handle: int) -> bytes:
    """Return an UNKNOWN message."""
    return message(Message.UNKNOWN, _HANDLE.pack(handle))


def handle_of(body: bytes) -> int:
    """Return the handle in an ASK or UNKNOWN body; struct.error when it has another length."""
    number: int = _HANDLE.unpack(body)[0]
    return number


_PORTS = struct.Struct("<HH")
_FOUR_TUPLE = slice(72, 108)


def four_tuple(saddr: bytes, sport: int, daddr: bytes, dport: int) -> bytes:
    """Return the ends of a connection as they lie in `struct connect_event`; packed addresses."""
    return mapped(saddr) + mapped(daddr) + _PORTS.pack(sport, dport)


def four_tuple_of(event: bytes) -> bytes:
    """Return the ends of the connection in a CONNECT body; ValueError when it is no such body."""
    if len(event) != CONNECT.size:
        raise ValueError(f"connect event of {len(event)} bytes")
    return event[_FOUR_TUPLE]


class Messages:
    """Cuts a stream into (type, body); ValueError when the peer does not speak this protocol."""

    def __init__(self, longest: int = LONGEST) -> None:
        self._rest = b""
        self._longest = longest

    def feed(self, data: bytes) -> list[tuple[Message, bytes]]:
        """Add what was received and return the messages that are whole now."""
        if self._rest:
            data = self._rest + data
        found: list[tuple[Message, bytes]] = []
        at, size = 0, len(data)
        while size - at >= _HEAD.size:
            length, kind = _HEAD.unpack_from(data, at)
            if not 1 <= length <= self._longest or kind not in _MESSAGES:
                raise ValueError(f"message of {length} bytes and type {kind}")
            end = at + 4 + length
            if end > size:
                break
            found.append((_MESSAGES[kind], data[at + _HEAD.size : end]))
            at = end
        self._rest = data[at:]
        return found
