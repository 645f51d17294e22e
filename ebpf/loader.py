"""Loads the blob: maps, programs, links, rings and loss counters, with the standard library only.

`Programs.load` takes the blob that `./run` or the image built. Where it does not fit (other
architecture, other sources, none at all) and BCC is there, BCC compiles on the spot, in a process
of its own. Whatever is attached is attached by BPF links: when this process ends, however it ends,
nothing is left.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import platform
import re
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebpf import syscalls
from ebpf.btf import Types, TypesMissing
from ebpf.build import FORMAT, PROGRAMS, source_hash
from ebpf.events import (
    IDENT,
    PROCESS,
    RECORD,
    RECORD_HEAD,
    SKIPPED,
    Lost,
    Offsets,
    Process,
    Record,
    Settings,
    mapped,
)
from ebpf.ring import Ring

if TYPE_CHECKING:
    from collections.abc import Iterable
    from ipaddress import IPv4Network, IPv6Network

#: The members behind the fields of `Offsets`.
_MEMBERS = (
    ("task_struct", "mm"), ("task_struct", "signal"), ("signal_struct", "live"),
    ("mm_struct", "exe_file"), ("mm_struct", "arg_start"), ("mm_struct", "arg_end"),
    ("file", "f_inode"), ("inode", "i_ino"), ("inode", "i_sb"), ("super_block", "s_dev"),
)  # fmt: skip
_ZERO = struct.pack("=I", 0)


class LoadError(Exception):
    """The programs cannot be loaded here; the message says what is missing and what to do."""


@dataclass(frozen=True, slots=True)
class Blob:
    """What `ebpf.build` wrote."""

    maps: dict[str, dict[str, int]]
    programs: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Blob:
        """Read a blob; LoadError with the reason when it does not fit this machine or these
        sources.
        """
        try:
            tree = json.loads(path.read_text(encoding="ascii"))
            found = (tree["format"], tree["arch"])
            blob = cls(tree["maps"], tree["programs"])
            source = tree["source"]
        except (OSError, ValueError, KeyError, TypeError) as wrong:
            raise LoadError(f"no blob at {path}: {wrong!r}") from wrong
        if found != (FORMAT, platform.machine()):
            raise LoadError(f"{path} is a blob for {found}, not {(FORMAT, platform.machine())}")
        if PROGRAMS.exists() and source != source_hash():
            raise LoadError(f"{path} was built from other sources")
        return blob


def fitting(path: Path | None) -> Blob:
    """Return the blob at `path`, or one that BCC compiles on the spot; LoadError with both
    reasons.
    """
    reason = "no blob was named"
    if path is not None:
        try:
            return Blob.read(path)
        except LoadError as wrong:
            reason = str(wrong)
    with tempfile.TemporaryDirectory(prefix="narrows-blob-") as folder:
        out = Path(folder, "sensor.blob")
        command = [sys.executable, "-m", "ebpf.build", "--out", str(out)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1]
        )
        if done.returncode:
            said = done.stderr.strip() or f"exit code {done.returncode}"
            raise LoadError(f"{reason}; and BCC could not build one: {said}")
        return Blob.read(out)


class Programs:
    """The loaded programs and their maps; `close` detaches and frees everything."""

    def __init__(self, blob: Blob) -> None:
        self._fds = contextlib.ExitStack()
        self.maps: dict[str, int] = {}
        self.loaded: dict[str, int] = {}
        self.links: list[int] = []
        self._blob = blob

    @classmethod
    def load(cls, blob: Blob) -> Programs:
        """Make the maps and pass the programs through the verifier; nothing is attached yet."""
        programs = cls(blob)
        try:
            programs._make_maps()
            tracefs = syscalls.tracefs()
            try:
                for name, program in blob.programs.items():
                    programs._load(name, program, tracefs)
            finally:
                os.close(tracefs)
        except OSError as wrong:
            programs.close()
            raise LoadError(_explained(wrong)) from wrong
        except LoadError:
            programs.close()
            raise
        return programs

    def _own(self, fd: int) -> int:
        self._fds.callback(os.close, fd)
        return fd

    def _make_maps(self) -> None:
        for name, m in self._blob.maps.items():
            fd = syscalls.map_create(
                m["type"], m["key"], m["value"], m["entries"], m["flags"], name
            )
            self.maps[name] = self._own(fd)

    def _load(self, name: str, program: dict[str, Any], tracefs: int) -> None:
        code = bytearray(base64.b64decode(program["code"]))
        for index, map_name in program["maps"]:
            struct.pack_into("<i", code, index * 8 + 4, self.maps[map_name])
        if program["fields"]:
            _patch(code, program["fields"], _tracepoint_fields(tracefs, program["attach"]), name)
        try:
            fd = syscalls.program_load(program["type"], bytes(code), program["attach_type"], name)
        except syscalls.Refused as refused:
            raise LoadError(f"{refused}\n{refused.log}") from refused
        self.loaded[name] = self._own(fd)

    def configure(
        self,
        settings: Settings,
        prefixes: Iterable[IPv4Network | IPv6Network],
        skipped: Iterable[int] = (),
    ) -> None:
        """Give the programs their key, their handles' base, this kernel's offsets, and where the
        option goes; before `attach`.

        `skipped` are cgroup ids whose sockets are left alone: those of the gate.
        """
        syscalls.map_put(self.maps["settings"], _ZERO, settings.pack(kernel_offsets()))
        for prefix in prefixes:
            length = prefix.prefixlen + (96 if prefix.version == 4 else 0)
            address = mapped(prefix.network_address.packed)
            key = struct.pack("=I16s", length, address)
            syscalls.map_put(self.maps["prefixes"], key, b"\1")
        for identifier in skipped:
            syscalls.map_put(self.maps["skipped"], struct.pack("=Q", identifier), b"\1")

    def attach(self, cgroup: Path) -> None:
        """Attach everything: first what gives handles, then what uses them."""
        try:
            tracefs = syscalls.tracefs()
            directory = os.open(cgroup, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as wrong:
            raise LoadError(_explained(wrong)) from wrong
        try:
            for name, fd in self.loaded.items():
                program = self._blob.programs[name]
                if program["attach"] == "cgroup":
                    link = syscalls.link_create(fd, directory, program["attach_type"])
                else:
                    identifier = int(_tracepoint_file(tracefs, program["attach"], "id"))
                    event = self._own(syscalls.tracepoint_open(identifier))
                    link = syscalls.link_create(fd, event, syscalls.BPF_PERF_EVENT)
                self.links.append(self._own(link))
        except OSError as wrong:
            raise LoadError(f"cannot attach {name}: {_explained(wrong)}") from wrong
        finally:
            os.close(directory)
            os.close(tracefs)

    def ring(self, name: str) -> Ring:
        """Map one of the rings (`record_ring`, `connect_ring`); the caller closes it."""
        return Ring(self.maps[name], self._blob.maps[name]["entries"])

    def lost(self) -> dict[str, int]:
        """Return the loss counters since load, by name; `skipped` are runs that the kernel left
        out.
        """
        counts = {which.name.lower(): self._counter("lost", which.value) for which in Lost}
        with contextlib.suppress(OSError):
            counts["skipped"] = sum(syscalls.program_missed(fd) for fd in self.loaded.values())
        return counts

    def _counter(self, name: str, index: int) -> int:
        value = syscalls.map_get(self.maps[name], struct.pack("=I", index), 8)
        return int.from_bytes(value or b"", sys.byteorder)

    def process(self, pid: int) -> Process | None:
        """Return what the kernel keeps of a process."""
        value = syscalls.map_get(self.maps["processes"], struct.pack("=I", pid), PROCESS.size)
        return Process.parse(value) if value else None

    def add_process(self, pid: int, process: Process) -> bool:
        """Give a process a handle unless it has one; says whether it was given."""
        key = struct.pack("=I", pid)
        try:
            syscalls.map_put(self.maps["processes"], key, process.pack(), syscalls.NOEXIST)
        except FileExistsError:
            return False
        return True

    def skip_process(self, pid: int) -> None:
        """Leave the sockets of a process alone from now on, until it runs another program."""
        key = struct.pack("=I", pid)
        process = self.process(pid) or Process(0, 0, 0, 0, 0)
        changed = process._replace(flags=process.flags | SKIPPED)
        syscalls.map_put(self.maps["processes"], key, changed.pack())

    def connects(self, cookie: bytes) -> bool:
        """Say whether a socket that was noted at `connect` is not established yet."""
        return syscalls.map_get(self.maps["sockets"], cookie, IDENT.size) is not None

    def record(self, handle: int) -> Record | None:
        """Return what the kernel recorded of a handle, also when the process is gone."""
        key = struct.pack("=Q", handle)
        for name, size in (("records", RECORD.size), ("renamed", RECORD_HEAD.size)):
            value = syscalls.map_get(self.maps[name], key, size)
            if value:
                return Record.parse(value)
        return None

    def close(self) -> None:
        """Detach and free everything."""
        self._fds.close()
        self.links.clear()
        self.loaded.clear()


def kernel_offsets() -> Offsets:
    """Return where the running kernel keeps what the programs follow; LoadError without BTF."""
    try:
        types = Types()
        return Offsets(*[types.offset(name, member) for name, member in _MEMBERS])
    except TypesMissing as missing:
        raise LoadError(f"{missing}: boot a kernel with CONFIG_DEBUG_INFO_BTF=y") from missing


def _tracepoint_file(tracefs: int, attach: str, name: str) -> str:
    path = f"events/{attach.partition(':')[2]}/{name}"
    with open(path, encoding="ascii", opener=lambda p, f: os.open(p, f, dir_fd=tracefs)) as file:
        return file.read()


def _tracepoint_fields(tracefs: int, attach: str) -> dict[str, tuple[int, int]]:
    """Return offset and size of each field of a tracepoint on this kernel."""
    text = _tracepoint_file(tracefs, attach, "format")
    pattern = r"(\w+)(?:\[\w*\])?;\toffset:(\d+);\tsize:(\d+)"
    return {m[1]: (int(m[2]), int(m[3])) for m in re.finditer(pattern, text)}


def _patch(
    code: bytearray,
    places: list[tuple[int, str, int]],
    fields: dict[str, tuple[int, int]],
    name: str,
) -> None:
    for index, field, size in places:
        offset, actual = fields.get(field, (0, 0))
        if actual != size:
            raise LoadError(
                f"{name}: this kernel's field {field} has {actual} bytes, not {size}: "
                "the programs must be adapted to it"
            )
        struct.pack_into("<h", code, index * 8 + 2, offset)


def _explained(wrong: OSError) -> str:
    hint = {
        errno.EPERM: "run as root, or with CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN",
        errno.EACCES: "run as root, or with CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN",
        errno.ENOSYS: "this kernel has no bpf() call for us",
        errno.ENODEV: "mount tracefs: mount -t tracefs nodev /sys/kernel/tracing",
        errno.ENOMEM: "raise the memory limit (RLIMIT_MEMLOCK on kernels before 5.11)",
    }.get(wrong.errno or 0, "`narrows doctor` says what this kernel lacks")
    return f"{wrong} ({hint})"
