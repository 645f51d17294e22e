"""Files that were opened to be executed, as the kernel hands them out."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from ebpf import opens
from ebpf.hashing import FileKey
from ebpf.opens import ExecOpens


@pytest.fixture
def group():
    made = ExecOpens()
    yield made
    made.close()


def anything(fd):
    return FileKey.of(fd)


def run(*argv):
    process = subprocess.Popen(argv)
    process.wait()
    return process.pid


def paths(group, pid):
    """Return what a process opened, in order; nothing of it is left."""
    found = []
    while (opened := group.take(pid, anything)) is not None:
        found.append(str(Path(f"/proc/self/fd/{opened.fd}").readlink()))
        os.close(opened.fd)
    return found


def test_a_process_that_is_gone_has_its_files_in_order(group, tmp_path):
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    pid = run(script)
    group.drain()
    found = paths(group, pid)
    assert found[:2] == [str(script), os.path.realpath("/bin/sh")]
    assert "ld" in found[2]
    assert paths(group, pid) == []


@pytest.mark.parametrize(("wanted", "left"), [("/bin/sh", 2), ("/bin/true", 0)])
def test_what_comes_before_the_wanted_file_is_closed_and_what_comes_after_stays(
    group, wanted, left
):
    inode = Path(wanted).stat().st_ino

    def is_wanted(fd):
        return FileKey.of(fd) if os.fstat(fd).st_ino == inode else None

    before = len(os.listdir("/proc/self/fd"))
    pid = run("/bin/sh", "-c", "exec /bin/true")  # opens sh, its loader, and true
    group.drain()
    found = group.take(pid, is_wanted)
    assert found.key.inode == inode
    os.close(found.fd)
    assert len(paths(group, pid)) == left
    while group.expire():  # others on this machine execute as well
        time.sleep(0.02)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_nobody_takes_is_closed_after_a_while(group):
    before = len(os.listdir("/proc/self/fd"))
    run("/bin/true")
    group.drain()
    assert len(os.listdir("/proc/self/fd")) > before
    due = group.expire()
    assert 0 < due - time.monotonic_ns() <= opens.KEEP_NS
    end = time.monotonic() + 10
    while group.expire():
        assert time.monotonic() < end
        time.sleep(0.02)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_system_that_is_mounted_later_is_seen_too(group, tmp_path):
    mount = tmp_path / "later"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", mount], check=True)
    try:
        shutil.copy2("/bin/true", mount / "program")
        group.mark_mounts()
        pid = run(mount / "program")
        group.drain()
        assert paths(group, pid)[0] == str(mount / "program")
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


def test_a_flood_that_nobody_takes_is_bounded(group, monkeypatch):
    monkeypatch.setattr(opens, "_MOST", 10)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        run("/bin/true")
    group.drain()
    group.expire()
    assert len(os.listdir("/proc/self/fd")) <= before + 10


def test_closing_closes_everything():
    before = len(os.listdir("/proc/self/fd"))
    group = ExecOpens()
    run("/bin/true")
    group.drain()
    group.close()
    assert len(os.listdir("/proc/self/fd")) == before
