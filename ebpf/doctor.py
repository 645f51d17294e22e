"""What the sensor needs of a machine: what is there, why it is needed, and how to get it.

`narrows doctor` shows it. Every check tries the real thing, as the sensor will: types are read,
programs go through the verifier, fanotify groups are opened. Nothing is attached, and nothing
stays.
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ebpf import build, procfs, syscalls
from ebpf.host import MACHINE_ID
from ebpf.loader import Blob, LoadError, Programs, kernel_offsets

if TYPE_CHECKING:
    from collections.abc import Iterator

OLDEST: Final = (5, 15)
_LOCKDOWN = Path("/sys/kernel/security/lockdown")
_JIT = Path("/proc/sys/net/core/bpf_jit_enable")
_SYNCOOKIES = Path("/proc/sys/net/ipv4/tcp_syncookies")
_FILES = 65_536
#: Capabilities by their bits (include/uapi/linux/capability.h).
_CAPABILITIES: Final = {
    "CAP_DAC_READ_SEARCH": 2, "CAP_NET_ADMIN": 12, "CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21,
    "CAP_PERFMON": 38, "CAP_BPF": 39,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that is needed."""

    name: str
    ok: bool
    found: str  #: what is there
    why: str  #: what it is needed for
    do: str  #: how to get it; "" when it is there
    required: bool = True  #: false: something works less well without it


def checks(blob: Path | None = None) -> list[Check]:
    """Return everything, in the order in which it should be mended. `blob` are the compiled
    programs, where they are expected.
    """
    return [
        _privileges(),
        _process_ids(),
        _kernel(platform.release()),
        _lockdown(_LOCKDOWN),
        _types(),
        _cgroups(),
        _tracefs(),
        *_programs(blob),
        _fanotify(),
        _jit(_JIT),
        _cookies(_SYNCOOKIES),
        _machine_id(MACHINE_ID),
        _files(),
    ]


def _check(
    name: str, problem: str, found: str, why: str, do: str, *, required: bool = True
) -> Check:
    """Return a check that is fine when there is no `problem`."""
    return Check(name, not problem, problem or found, why, do if problem else "", required)


def _privileges() -> Check:
    held = next(
        int(line.split()[1], 16)
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        if line.startswith("CapEff:")
    )
    missing = [name for name, bit in _CAPABILITIES.items() if not held >> bit & 1]
    return _check(
        "privileges", f"missing: {', '.join(missing)}" if missing else "", "all capabilities",
        "BPF programs are loaded, and other users' processes and cgroups are read", "run as root",
    )  # fmt: skip


def _process_ids() -> Check:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    numbers = status.partition("NSpid:")[2].partition("\n")[0].split()
    return _check(
        "process ids", "this is a PID namespace" if len(numbers) > 1 else "", "those of the host",
        "the kernel's records name processes by the host's ids",
        "run on the host, or with its PID namespace (docker run --pid=host)",
    )  # fmt: skip


def _kernel(release: str) -> Check:
    parts = release.replace("-", ".").split(".")
    version = tuple(int(part) for part in parts[:2] if part.isdecimal())
    return _check(
        "kernel", "" if version >= OLDEST else f"{release} is too old", release,
        "BPF links to tracepoints came with 5.15, options in the SYN with 5.10",
        "boot Linux 5.15 or later",
    )  # fmt: skip


def _lockdown(path: Path) -> Check:
    state = _value(path).partition("[")[2].partition("]")[0] or "none"
    return _check(
        "lockdown", state if state == "confidentiality" else "", state,
        "in confidentiality mode BPF programs may not read which file a process runs",
        "boot with lockdown=integrity, or without",
    )  # fmt: skip


def _types() -> Check:
    problem = ""
    try:
        kernel_offsets()
    except LoadError as wrong:
        problem = str(wrong).partition(":")[0]
    return _check(
        "kernel types", problem, "BTF, with every member that the programs follow",
        "the programs follow this kernel's own structs to a process' executable and arguments",
        "boot a kernel with CONFIG_DEBUG_INFO_BTF=y",
    )  # fmt: skip


def _cgroups() -> Check:
    found, problem = "", ""
    try:
        mount = procfs.cgroup_mount()
        found = str(mount)
        if mount.stat().st_ino != 1:
            problem = f"{mount} is not the root of the hierarchy: this is a cgroup namespace"
    except OSError as wrong:
        problem = str(wrong)
    return _check(
        "cgroup v2", problem, found, "the programs are attached to a cgroup, and ids name cgroups",
        "run in the host's cgroup namespace; mkdir -p /sys/fs/cgroup/unified && "
        "mount -t cgroup2 none /sys/fs/cgroup/unified",
    )  # fmt: skip


def _tracefs() -> Check:
    problem = ""
    try:
        os.close(syscalls.tracefs())
    except OSError as wrong:
        problem = str(wrong)
    return _check(
        "tracefs", problem, "can be read", "tracepoints say when programs start and end",
        "boot a kernel with CONFIG_TRACING=y, or mount -t tracefs nodev /sys/kernel/tracing",
    )  # fmt: skip


def _programs(path: Path | None) -> Iterator[Check]:
    """The blob, what could make one, and the verifier's word on it."""
    blob, problem = None, "no blob is configured"
    if path is not None:
        try:
            blob, problem = Blob.read(path), ""
        except LoadError as wrong:
            problem = str(wrong)
    yield _check(
        "compiled programs", problem, str(path), "the sensor starts in 0.1 s, without a compiler",
        "python -m ebpf.build --out FILE (./run setup does it)", required=False,
    )  # fmt: skip
    compiler = _compiler()
    headers = build.headers(platform.release())
    own = headers is not None and headers.name == platform.release()
    needed = blob is None
    yield _check(
        "BCC", compiler, "can be imported", "compiles the programs where no blob fits",
        "apt-get install python3-bpfcc", required=needed,
    )  # fmt: skip
    yield _check(
        "kernel headers", "" if headers else "none",
        f"{headers} ({'of this kernel' if own else 'of another kernel: good for compiling only'})",
        "BCC compiles against their stable types; offsets always come from the running kernel",
        "apt-get install linux-headers-cloud-amd64 (any version does)", required=needed,
    )  # fmt: skip
    if blob is not None:
        yield _verified(blob)


def _compiler() -> str:
    """Return why BCC cannot be used; asked in a process of its own, because it stays loaded."""
    done = subprocess.run(
        [sys.executable, "-c", "import bcc"], capture_output=True, text=True, check=False
    )
    lines = done.stderr.strip().splitlines()
    return (lines[-1] if lines else "it cannot be imported") if done.returncode else ""


def _verified(blob: Blob) -> Check:
    problem = ""
    try:
        Programs.load(blob).close()
    except LoadError as wrong:
        problem = str(wrong)
    return _check(
        "verifier", problem, f"takes all {len(blob.programs)} programs",
        "maps, helpers and tracepoint fields must be those that the programs use",
        "see above; else report this with the kernel's version",
    )  # fmt: skip


def _fanotify() -> Check:
    problem = ""
    try:
        group = syscalls.fanotify_init()
        try:
            syscalls.fanotify_mark(group, "/")
        finally:
            os.close(group)
    except OSError as wrong:
        problem = str(wrong)
    return _check(
        "fanotify", problem, "tells what is opened to be executed",
        "without it, executables of processes that are gone at once have no digest",
        "boot a kernel with CONFIG_FANOTIFY=y, and run as root", required=False,
    )  # fmt: skip


def _jit(path: Path) -> Check:
    value = _value(path)
    return _check(
        "BPF compiler", "interpreted" if value == "0" else "", "on",
        "interpreted programs make every connection several times slower",
        f"echo 1 > {path}", required=False,
    )  # fmt: skip


def _cookies(path: Path) -> Check:
    value = _value(path)
    return _check(
        "SYN cookies", "for every connection" if value == "2" else "", "not by default",
        "a SYN that a cookie answers is not kept: its identity is known from the event only",
        "sysctl net.ipv4.tcp_syncookies=1", required=False,
    )  # fmt: skip


def _machine_id(path: Path) -> Check:
    found = _value(path)
    return _check(
        "machine id", "" if found else "none", "there",
        "handles of different hosts differ by it", "systemd-machine-id-setup", required=False,
    )  # fmt: skip


def _files() -> Check:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= hard < _FILES
    return _check(
        "open files", f"{hard} at most" if few else "", f"{hard} at most" if hard > 0 else "any",
        "a session takes two, a file that is being hashed one", f"ulimit -Hn {_FILES}",
        required=False,
    )  # fmt: skip


def _value(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
