"""Compiles the BPF programs with BCC into the blob that `ebpf.loader` loads without BCC.

`./run` and the image build call `python -m ebpf.build --out FILE`; the loader calls it when no blob
fits. This is the only module that imports bcc. It never attaches anything and never loads a
program: BCC makes the maps (which needs CAP_BPF) and the verifier sees nothing here.

The blob is canonical JSON: bytecode with the map references and the tracepoint offsets taken out,
and where they belong. The same sources give the same bytes, on any kernel.

BCC needs kernel headers. Where the running kernel has none, those of Debian's cloud kernel serve
(package linux-headers-cloud-amd64): the programs are compiled against UAPI types and stable helpers
only; the offsets of kernel structs come from the running kernel's BTF when they are loaded.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import hashlib
import json
import os
import platform
import re
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

FORMAT: Final = 1
PROGRAMS: Final = Path(__file__).parent / "programs"
SOURCES: Final = ("process.bpf.c", "connect.bpf.c")

_TRACEPOINT, _SOCK_OPS, _SOCK_ADDR = 5, 13, 18
_INET4_CONNECT, _INET6_CONNECT, _CGROUP_SOCK_OPS = 10, 11, 3
_LOAD_64 = 0x18  # BPF_LD | BPF_DW | BPF_IMM, two instructions long
_LOAD_CLASS = 1  # BPF_LDX
_MAP_FD = 1  # BPF_PSEUDO_MAP_FD
_RINGBUF = 27


class BuildError(Exception):
    """The blob cannot be built; the message says what is missing and how to get it."""


@dataclass(frozen=True, slots=True)
class _Program:
    kind: int
    attach_type: int
    attach: str  # "cgroup" or "tracepoint:category/name"


_TABLE: Final = {
    "on_exec": _Program(_TRACEPOINT, 0, "tracepoint:sched/sched_process_exec"),
    "on_newtask": _Program(_TRACEPOINT, 0, "tracepoint:task/task_newtask"),
    "on_exit": _Program(_TRACEPOINT, 0, "tracepoint:sched/sched_process_exit"),
    "on_connect4": _Program(_SOCK_ADDR, _INET4_CONNECT, "cgroup"),
    "on_connect6": _Program(_SOCK_ADDR, _INET6_CONNECT, "cgroup"),
    "on_sockops": _Program(_SOCK_OPS, _CGROUP_SOCK_OPS, "cgroup"),
}
#: Placeholder offsets of the context structs in process.bpf.c, and the fields that they mean.
_PLACEHOLDERS: Final = {
    "on_exec": {0x4000: "filename"},
    "on_newtask": {0x4200: "pid", 0x4300: "clone_flags"},
}


def source_text(folder: Path = PROGRAMS) -> str:
    """Return the programs as one text; each of their own headers is put in once."""
    seen: set[str] = set()

    def expanded(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (folder / name).read_text(encoding="utf-8")
        return re.sub(r'^#include "([\w.]+)"\n', lambda m: expanded(m[1]), text, flags=re.MULTILINE)

    return "".join(expanded(name) for name in SOURCES)


def source_hash(folder: Path = PROGRAMS) -> str:
    """Return the digest that a blob carries of the sources it was built from."""
    return hashlib.sha256(f"{FORMAT}\n{source_text(folder)}".encode()).hexdigest()


def headers(release: str, modules: Path = Path("/lib/modules")) -> Path | None:
    """Return the module folder whose kernel headers compile the programs; None when there is none.

    The running kernel's own come first, then Debian's cloud kernel, then any.
    """
    if (modules / release / "build").exists():
        return modules / release
    found = [folder.parent for folder in modules.glob("*/build") if folder.exists()]
    return max(found, key=lambda folder: ("-cloud-" in folder.name, folder.name), default=None)


def compiled() -> dict[str, Any]:
    """Return the blob as a dict; BuildError when it cannot be built here."""
    release = platform.release()
    folder = headers(release)
    if folder is None:
        raise BuildError(
            f"no kernel headers for {release}: apt-get install linux-headers-cloud-amd64 "
            "(any version does: the programs are compiled against stable types only)"
        )
    module = _bcc_module(folder, own=folder.name == release)
    maps, names = _maps(module)
    programs = {name: _program(module, name, names) for name in _TABLE}
    return {
        "arch": platform.machine(),
        "format": FORMAT,
        "maps": maps,
        "programs": programs,
        "source": source_hash(),
    }


def _bcc_module(folder: Path, *, own: bool) -> Any:
    flags = ["-Wno-everything"]
    if not own:
        # Debian splits headers: the common half is the source tree, the other has what was
        # generated.
        common, generated = (
            (folder / "source").resolve(),
            (folder / "build").resolve(),
        )
        os.environ["BCC_KERNEL_SOURCE"] = str(common if common.exists() else generated)
        arch = (
            generated / "arch" / "x86"
            if platform.machine() == "x86_64"
            else generated / "arch" / "arm64"
        )
        flags += [
            f"-I{generated}/include",
            f"-I{arch}/include/generated",
            f"-I{arch}/include/generated/uapi",
            f"-I{generated}/include/generated/uapi",
        ]
    try:
        import bcc
    except ImportError as missing:
        raise BuildError("BCC is missing: apt-get install python3-bpfcc") from missing
    try:
        return bcc.BPF(text=source_text(), cflags=flags)
    except Exception as failed:
        raise BuildError(f"BCC cannot compile the programs: {failed}") from failed
    finally:
        os.environ.pop("BCC_KERNEL_SOURCE", None)


def _maps(module: Any) -> tuple[dict[str, dict[str, int]], dict[int, str]]:
    """Return the map definitions, and the names by the descriptors that this build happens to
    have.
    """
    from bcc import lib

    lib.bpf_table_name.restype = ctypes.c_char_p
    lib.bpf_table_name.argtypes = [ctypes.c_void_p, ctypes.c_ulonglong]
    maps: dict[str, dict[str, int]] = {}
    names: dict[int, str] = {}
    for index in range(lib.bpf_num_tables(module.module)):
        name = lib.bpf_table_name(module.module, index)
        kind = lib.bpf_table_type_id(module.module, index)
        sized = kind != _RINGBUF
        maps[name.decode()] = {
            "type": kind,
            "key": lib.bpf_table_key_size_id(module.module, index) if sized else 0,
            "value": lib.bpf_table_leaf_size_id(module.module, index) if sized else 0,
            "entries": lib.bpf_table_max_entries_id(module.module, index),
            "flags": lib.bpf_table_flags_id(module.module, index),
        }
        names[lib.bpf_table_fd(module.module, name)] = name.decode()
    return maps, names


def _program(module: Any, name: str, map_names: dict[int, str]) -> dict[str, Any]:
    what = _TABLE[name]
    code = bytearray(module.dump_func(name.encode()))
    if not code:
        raise BuildError(f"BCC made no code for {name}")
    placeholders = _PLACEHOLDERS.get(name, {})
    maps: list[tuple[int, str]] = []
    fields: list[tuple[int, str, int]] = []
    at = 0
    while at < len(code):
        operation, registers, offset, value = struct.unpack_from("<BBhi", code, at)
        if operation == _LOAD_64:
            if registers >> 4 == _MAP_FD:
                maps.append((at // 8, map_names[value]))
                struct.pack_into("<i", code, at + 4, 0)
            at += 8
        elif operation & 7 == _LOAD_CLASS and offset in placeholders:
            size = {0x00: 4, 0x08: 2, 0x10: 1, 0x18: 8}[operation & 0x18]
            fields.append((at // 8, placeholders[offset], size))
        at += 8
    missing = set(placeholders.values()) - {field for _, field, _ in fields}
    if missing:
        raise BuildError(f"{name}: clang hid the loads of {', '.join(sorted(missing))}")
    return {
        "attach": what.attach,
        "attach_type": what.attach_type,
        "code": base64.b64encode(bytes(code)).decode(),
        "fields": fields,
        "maps": maps,
        "type": what.kind,
    }


def build(out: Path) -> None:
    """Write the blob to `out` (0644), whole or not at all; BuildError when it cannot be built."""
    text = json.dumps(compiled(), sort_keys=True, indent=1)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(text + "\n", encoding="ascii")
    partial.replace(out)


def main(argv: list[str] | None = None) -> int:
    """Build the blob unless `--out` already holds one of these sources; exit code 1 says why
    not.
    """
    parser = argparse.ArgumentParser(
        prog="python -m ebpf.build", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--force", action="store_true", help="build even when it is up to date")
    given = parser.parse_args(argv)
    if not given.force and _is_current(given.out):
        return 0
    try:
        build(given.out)
    except BuildError as failed:
        print(f"ebpf.build: {failed}", file=sys.stderr)
        return 1
    return 0


def _is_current(out: Path) -> bool:
    try:
        blob = json.loads(out.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return False
    return isinstance(blob, dict) and (blob.get("source"), blob.get("arch")) == (
        source_hash(),
        platform.machine(),
    )


if __name__ == "__main__":
    raise SystemExit(main())
