"""The blob in the kernel: what fits, what is refused, and with which words."""

import base64
import json
import os
import platform
import socket
import struct
import subprocess
import sys
from ipaddress import ip_network

import pytest
from watching import BLOB

from ebpf import events, loader, syscalls
from ebpf.events import Process, Settings
from ebpf.loader import Blob, LoadError, Programs

SETTINGS = Settings(1, 2, events.base(3, 4), 1, 0, 1)


def changed(folder, **top):
    """Return a blob with other values at its top."""
    path = folder / "changed.blob"
    path.write_text(json.dumps(json.loads(BLOB.read_text()) | top))
    return path


@pytest.fixture
def programs():
    made = Programs.load(Blob.read(BLOB))
    yield made
    made.close()


@pytest.mark.parametrize(
    ("top", "reason"),
    [
        ({"arch": "s390x"}, "is a blob for"),
        ({"format": 0}, "is a blob for"),
        ({"source": "0" * 64}, "built from other sources"),
        ({"maps": None}, None),
    ],
)
def test_a_blob_for_something_else_is_refused_with_the_reason(tmp_path, top, reason):
    if reason is None:
        path = tmp_path / "cut.blob"
        path.write_text(BLOB.read_text()[:1000])
        reason = "no blob at"
    else:
        path = changed(tmp_path, **top)
    with pytest.raises(LoadError, match=reason):
        Blob.read(path)


def test_maps_have_the_sizes_of_the_structs():
    blob = Blob.read(BLOB)
    sizes = {name: (m["key"], m["value"]) for name, m in blob.maps.items()}
    assert sizes["settings"] == (4, events.SETTINGS.size)
    assert sizes["processes"] == (4, events.PROCESS.size)
    assert sizes["records"] == (8, events.RECORD.size)
    assert sizes["renamed"] == (8, events.RECORD_HEAD.size)
    assert sizes["sockets"] == (8, events.IDENT.size)
    assert sizes["prefixes"] == (20, 1)
    assert sizes["lost"] == (4, 8)


def test_the_programs_pass_the_verifier_and_leave_nothing_behind(programs):
    assert set(programs.loaded) == {
        "on_exec", "on_newtask", "on_exit", "on_connect4", "on_connect6", "on_sockops",
    }  # fmt: skip
    assert set(programs.lost().values()) == {0}
    before = len(os.listdir("/proc/self/fd"))
    Programs.load(Blob.read(BLOB)).close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_refused_program_says_what_the_verifier_said(tmp_path):
    blob = json.loads(BLOB.read_text())
    code = base64.b64decode(blob["programs"]["on_exit"]["code"])
    loop = struct.pack("<BBhi", 0x05, 0, -1, 0)  # a jump to itself: nobody comes past it
    blob["programs"]["on_exit"]["code"] = base64.b64encode(loop + code).decode()
    blob["programs"]["on_exit"]["maps"] = [
        [index + 1, name] for index, name in blob["programs"]["on_exit"]["maps"]
    ]
    (tmp_path / "loop.blob").write_text(json.dumps(blob))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(LoadError, match=r"program on_exit: .*\n.*unreachable insn 1"):
        Programs.load(Blob.read(tmp_path / "loop.blob"))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_tracepoint_whose_field_has_another_size_is_refused(tmp_path):
    blob = json.loads(BLOB.read_text())
    for field in blob["programs"]["on_newtask"]["fields"]:
        field[2] = 2
    (tmp_path / "odd.blob").write_text(json.dumps(blob))
    with pytest.raises(LoadError, match=r"on_newtask: this kernel's field \w+ has \d bytes, not 2"):
        Programs.load(Blob.read(tmp_path / "odd.blob"))


def test_the_offsets_of_tracepoint_fields_are_those_of_this_kernel():
    tracefs = syscalls.tracefs()
    fields = loader._tracepoint_fields(tracefs, "tracepoint:sched/sched_process_exec")
    os.close(tracefs)
    assert fields["filename"][1] == fields["pid"][1] == 4
    assert fields["pid"][0] != fields["old_pid"][0]


def test_settings_prefixes_and_skipped_cgroups_reach_the_maps(programs):
    networks = [ip_network("198.51.100.0/24"), ip_network("2001:db8::/32")]
    programs.configure(SETTINGS, networks, [77])
    stored = syscalls.map_get(programs.maps["settings"], bytes(4), events.SETTINGS.size)
    assert events.SETTINGS.unpack(stored)[:6] == tuple(SETTINGS)
    assert all(events.SETTINGS.unpack(stored)[6:])

    def finds(text):
        family = socket.AF_INET6 if ":" in text else socket.AF_INET
        address = events.mapped(socket.inet_pton(family, text))
        key = struct.pack("=I16s", 128, address)
        return syscalls.map_get(programs.maps["prefixes"], key, 1) is not None

    assert [finds(a) for a in ("198.51.100.7", "198.51.101.7", "2001:db8:9::1", "2001:db9::")] == [
        True, False, True, False,
    ]  # fmt: skip
    assert syscalls.map_get(programs.maps["skipped"], struct.pack("=Q", 77), 1) == b"\1"
    assert syscalls.map_get(programs.maps["skipped"], struct.pack("=Q", 78), 1) is None


def test_a_process_is_given_a_handle_once(programs):
    first = Process(5, 6, 7, 8, 9)
    assert programs.process(4_000_000) is None
    assert programs.add_process(4_000_000, first)
    assert not programs.add_process(4_000_000, first._replace(handle=6))
    assert programs.process(4_000_000) == first


def test_a_skipped_process_keeps_its_handle(programs):
    programs.add_process(4_000_000, Process(5, 6, 7, 8, 9))
    programs.skip_process(4_000_000)
    assert programs.process(4_000_000) == Process(5, 6, 7, 8, 9, events.SKIPPED)
    programs.skip_process(4_000_001)
    assert programs.process(4_000_001).flags == events.SKIPPED


def test_a_record_that_the_kernel_does_not_have_is_none(programs):
    assert programs.record(1) is None


def test_a_cgroup_that_cannot_be_attached_to_is_named(programs, tmp_path):
    with pytest.raises(LoadError, match="cannot attach on_"):
        programs.attach(tmp_path)
    with pytest.raises(LoadError, match="No such file"):
        programs.attach(tmp_path / "absent")


def test_the_count_of_skipped_runs_is_the_kernels():
    """Against bpf_prog_info as bpftool would read it: a program that never ran missed nothing."""
    programs = Programs.load(Blob.read(BLOB))
    assert [syscalls.program_missed(fd) for fd in programs.loaded.values()] == [0] * 6
    programs.close()


def test_without_privileges_the_error_says_which_are_needed():
    code = (
        "from pathlib import Path; import sys\n"
        "from ebpf.loader import *\n"
        f"blob = Blob.read(Path({str(BLOB)!r}))\n"
        "try: Programs.load(blob)\n"
        "except LoadError as wrong: print(wrong)"
    )
    command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=BLOB.parents[1])
    assert "CAP_BPF" in done.stdout


def test_the_architecture_is_this_one():
    assert json.loads(BLOB.read_text())["arch"] == platform.machine()
