"""Processes with a root of their own: overlays, chroots, mount and PID namespaces."""

import hashlib
import subprocess
import sys
import textwrap
import time

import pytest
from watching import compiled

from appliance.lab import cgroups

ID = "0123456789abcdef" * 4
INSTANT = "int main(void) { return 0; }\n"
#: What a runtime does: join the cgroup, take namespaces, change the root, execute.
RUNTIME = """
import ctypes, os, sys
procs, root, program, *flags = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
open(procs, "w").write("0")
if "namespaces" in flags:
    assert libc.unshare(0x20000 | 0x20000000) == 0  # mounts, process ids
if "private" in flags:
    assert libc.mount(b"none", b"/", b"", 0x4000 | (1 << 18), b"") == 0
    options = os.environ["OVERLAY"].encode()
    assert libc.mount(b"overlay", root.encode(), b"overlay", 0, options) == 0
child = os.fork()
if child == 0:
    os.chroot(root)
    os.chdir("/")
    os.execv(program, [program, "in", "a", "container"])
print(child)
os.waitpid(child, 0)
"""


class Image:
    """A program in the lower layer of an overlay."""

    def __init__(self, watched, folder, *, lower_on_tmpfs=False):
        self.merged = folder / "merged"
        self.lower = folder / "lower"
        self._mounted = []
        for path in (self.merged, self.lower, folder / "rw"):
            path.mkdir()
        if lower_on_tmpfs:
            self._mount("-t", "tmpfs", "none", self.lower)
        self._mount("-t", "tmpfs", "none", folder / "rw")  # an overlay cannot lie on an overlay
        for name in ("upper", "work"):
            (folder / "rw" / name).mkdir()
        if not lower_on_tmpfs:
            self.lower = folder / "rw" / "lower"
            self.lower.mkdir()
        self.program = compiled(self.lower, "app", INSTANT, "-static")
        self.digest = hashlib.sha256(self.program.read_bytes()).hexdigest()
        time.sleep(0.03)
        self.options = f"lowerdir={self.lower},upperdir={folder}/rw/upper,workdir={folder}/rw/work"
        self.cgroup = cgroups.make(watched.cgroup / f"docker-{ID}.scope")

    def mount(self):
        """As docker does: where the host sees it."""
        self._mount("-t", "overlay", "overlay", "-o", self.options, self.merged)
        return self

    def _mount(self, *words):
        subprocess.run(["mount", *map(str, words)], check=True)
        self._mounted.append(words[-1])

    def close(self):
        for path in reversed(self._mounted):
            subprocess.run(["umount", "-l", path], check=True)

    def run(self, watched, *flags):
        """Run the program in a container; return its process id on the host."""
        argv = [sys.executable, "-c", textwrap.dedent(RUNTIME), self.cgroup / "cgroup.procs"]
        outside = cgroups.make(cgroups.root() / f"{watched.name}o")
        try:
            process = watched.spawn(
                [*argv, self.merged, "/app", *flags], cgroup=outside, stdout=subprocess.PIPE,
                text=True, env={"OVERLAY": self.options},
            )  # fmt: skip
            out, _ = process.communicate()
            assert process.returncode == 0
        finally:
            cgroups.remove(outside)
        return int(out)


@pytest.fixture(params=[False, True], ids=["one-file-system", "several-file-systems"])
def image(request, watched, tmp_path):
    made = Image(watched, tmp_path, lower_on_tmpfs=request.param)
    yield made
    made.close()


@pytest.fixture
def spread_image(watched, tmp_path):
    made = Image(watched, tmp_path, lower_on_tmpfs=True)
    yield made
    made.close()


def described(watched, image, *flags):
    """Run the program; return its owner record."""
    watched.sensor.step(0)  # hears of mounts
    gate = watched.gate()
    image.run(watched, *flags)
    found = watched.until(lambda: [o for o in gate.owners() if o["comm"] == "app"])[-1]
    assert (found["container"], found["runtime"]) == (ID, "docker")
    assert found["argv"] == ["/app", "in", "a", "container"]
    return found


@pytest.mark.parametrize("flags", [(), ("namespaces",)], ids=["chroot", "namespaces"])
def test_a_program_of_a_container_image_is_named_and_hashed_though_it_is_gone(
    watched, tmp_path, flags
):
    image = Image(watched, tmp_path)
    try:
        found = described(watched, image.mount(), *flags)
    finally:
        image.close()
    assert (found["exe_sha256"], found["how"]) == (image.digest, "fanotify")
    assert found["exe"].endswith("/app")


def test_layers_on_several_file_systems_are_told_by_the_kernels_own_numbers(watched, spread_image):
    found = described(watched, spread_image.mount())
    assert (found["exe_sha256"], found["how"]) == (spread_image.digest, "fanotify")


def test_what_cannot_be_told_apart_has_no_digest_rather_than_a_wrong_one(watched, spread_image):
    """The same in a mount namespace of its own, whose mounts have no numbers here."""
    found = described(watched, spread_image.mount(), "namespaces")
    assert (found["exe"], found["exe_sha256"], found["how"]) == ("/app", "", "exec")


def test_a_mount_that_nobody_else_sees_has_no_digest_rather_than_a_wrong_one(watched, image):
    """As in a rootless container, and gone before anybody looks."""
    found = described(watched, image, "namespaces", "private")
    assert found["exe_sha256"] in {"", image.digest}
    assert found["how"] in {"exec", "fanotify"}
