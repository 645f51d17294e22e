"""The system calls that Python has no functions for, by ctypes: bpf, perf events, fanotify,
tracefs.

Each raises OSError as `os` functions do. Callers own the descriptors that are returned; all of them
are close-on-exec. Numbers are for x86-64 and arm64, the structs are those of the UAPI headers.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from pathlib import Path
from typing import Final

_NUMBERS: Final = {
    "x86_64": {"bpf": 321, "perf_event_open": 298},
    "aarch64": {"bpf": 280, "perf_event_open": 241},
}
#: The same on every architecture that Linux added after 2018.
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_FSCONFIG_CMD_CREATE = 6

_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _PROG_LOAD = 0, 1, 2, 5
_OBJ_GET_INFO, _LINK_CREATE = 15, 28
_ATTRIBUTES = 152
_VERIFIER_LOG = 1 << 20

ANY, NOEXIST = 0, 1
BPF_PERF_EVENT = 41

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class Refused(OSError):
    """The kernel's verifier refused a program; `log` is the end of what it said."""

    def __init__(self, number: int, name: str, log: str) -> None:
        super().__init__(number, f"program {name}: {os.strerror(number)}")
        self.log = log


def _number(name: str) -> int:
    machine = platform.machine()
    try:
        return _NUMBERS[machine][name]
    except KeyError:
        raise OSError(errno.ENOSYS, f"no system call numbers for {machine}") from None


def _call(number: int, *arguments: object) -> int:
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _bpf(command: int, attributes: bytes) -> int:
    buffer = ctypes.create_string_buffer(attributes.ljust(_ATTRIBUTES, b"\0"), _ATTRIBUTES)
    return _call(_number("bpf"), command, buffer, _ATTRIBUTES)


def _address(buffer: ctypes.Array[ctypes.c_char]) -> int:
    return ctypes.addressof(buffer)


def _buffer(data: bytes) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(data, len(data))


def map_create(kind: int, key: int, value: int, entries: int, flags: int, name: str) -> int:
    """Make a map; the name is cut to the kernel's 15 characters."""
    label = name.encode()[:15]
    return _bpf(
        _MAP_CREATE, struct.pack("=IIIIIII16s", kind, key, value, entries, flags, 0, 0, label)
    )


def map_get(fd: int, key: bytes, size: int) -> bytes | None:
    """Return the value of `size` bytes under `key`, None when there is none."""
    k, v = _buffer(key), ctypes.create_string_buffer(size)
    try:
        _bpf(_MAP_LOOKUP, struct.pack("=IIQQQ", fd, 0, _address(k), _address(v), 0))
    except FileNotFoundError:
        return None
    return v.raw


def map_put(fd: int, key: bytes, value: bytes, flags: int = ANY) -> None:
    """Store a value; with NOEXIST, FileExistsError when the key is there."""
    k, v = _buffer(key), _buffer(value)
    _bpf(_MAP_UPDATE, struct.pack("=IIQQQ", fd, 0, _address(k), _address(v), flags))


def program_load(kind: int, code: bytes, attach_type: int, name: str) -> int:
    """Load a program; `Refused` with the verifier's words when it does not pass."""
    instructions, licence = _buffer(code), _buffer(b"GPL\0")
    count, label = len(code) // 8, name.encode()[:15]

    def attributes(level: int, size: int, address: int) -> bytes:
        return struct.pack(
            "=IIQQIIQII16sII", kind, count, _address(instructions), _address(licence),
            level, size, address, 0, 0, label, 0, attach_type,
        )  # fmt: skip

    try:
        return _bpf(_PROG_LOAD, attributes(0, 0, 0))
    except OSError as first:
        log = ctypes.create_string_buffer(_VERIFIER_LOG)
        try:
            return _bpf(_PROG_LOAD, attributes(1, _VERIFIER_LOG, _address(log)))
        except OSError:
            said = log.value.decode("ascii", "replace")
        raise Refused(first.errno or errno.EINVAL, name, said[-2000:]) from first


def link_create(program: int, target: int, attach_type: int) -> int:
    """Attach by a BPF link: other programs stay attached, and it ends with the descriptor."""
    return _bpf(_LINK_CREATE, struct.pack("=IIII", program, target, attach_type, 0))


def program_missed(program: int) -> int:
    """Return how often the kernel skipped a program because another one ran on that processor."""
    info = ctypes.create_string_buffer(232)
    _bpf(_OBJ_GET_INFO, struct.pack("=IIQ", program, 232, _address(info)))
    missed: int = struct.unpack_from("=Q", info.raw, 208)[0]
    return missed


def tracepoint_open(identifier: int) -> int:
    """Open a tracepoint as a perf event on every process."""
    attributes = struct.pack("=IIQQQQQ", 2, 112, identifier, 0, 0, 0, 0)
    buffer = ctypes.create_string_buffer(attributes.ljust(112, b"\0"), 112)
    close_on_exec = 8
    return _call(_number("perf_event_open"), buffer, -1, 0, -1, ctypes.c_ulong(close_on_exec))


def tracefs() -> int:
    """Return a directory descriptor of tracefs, from where it is mounted or from a private mount.

    The private one is in nobody's mount table and ends with the descriptor.
    """
    for path in ("/sys/kernel/tracing", "/sys/kernel/debug/tracing"):
        if Path(path, "events").exists():
            return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    context = _call(_FSOPEN, b"tracefs", 1)
    try:
        _call(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _call(_FSMOUNT, context, 1, 0)
    finally:
        os.close(context)


FAN_OPEN_EXEC: Final = 0x1000
FAN_Q_OVERFLOW: Final = 0x4000
_FAN_NONBLOCK_CLOEXEC = 0x3
_FAN_MARK_ADD, _FAN_MARK_FILESYSTEM = 0x1, 0x100


def fanotify_init() -> int:
    """Open a notification group: events only, never permission requests, non-blocking."""
    result: int = _libc.fanotify_init(
        _FAN_NONBLOCK_CLOEXEC, os.O_RDONLY | os.O_CLOEXEC | os.O_NOATIME
    )
    return _checked(result)


def fanotify_mark(group: int, path: str) -> None:
    """Ask for FAN_OPEN_EXEC of the whole file system that `path` is on."""
    flags = _FAN_MARK_ADD | _FAN_MARK_FILESYSTEM
    at_cwd = -100
    name = os.fsencode(path)
    _checked(_libc.fanotify_mark(group, flags, ctypes.c_uint64(FAN_OPEN_EXEC), at_cwd, name))


def open_cgroup(mount: int, identifier: int) -> int:
    """Open the cgroup with this id (kernfs file handle); OSError when it is gone."""
    kernfs = 0xFE
    handle = _buffer(struct.pack("=IiQ", 8, kernfs, identifier))
    return _checked(_libc.open_by_handle_at(mount, handle, os.O_RDONLY | os.O_CLOEXEC))


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
