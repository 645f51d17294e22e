"""Owner records of real processes, by the real programs in the kernel."""

import ctypes
import hashlib
import os
import shutil
import struct
import sys
import textwrap
import time
from pathlib import Path

from watching import compiled

from appliance.lab import cgroups
from ebpf import events, syscalls
from ebpf.events import Handle
from ebpf.owners import Owner, Owners

INSTANT = "int main(void) { return 0; }\n"
CONNECT = """
import socket, sys, os, time
def connect(port=int(sys.argv[1]), address="198.51.100.10"):
    s = socket.socket()
    s.connect((address, port))
    return s
"""


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def made(folder, name="instant", code=INSTANT, *flags):
    """Return a program that nobody changed for a while: a digest needs that."""
    path = compiled(folder, name, code, *(flags or ("-static",)))
    time.sleep(0.03)
    return path


def named(gate, **facts):
    """Return owners with these facts."""
    return [o for o in gate.owners() if all(o[name] == value for name, value in facts.items())]


def settled(watched, gate, **facts):
    """Return the one owner with these facts, when it has its digest."""
    found = watched.until(lambda: [o for o in named(gate, **facts) if o["exe_sha256"]])
    return found[-1]


def test_a_process_that_lives_less_than_a_millisecond_is_fully_described(watched, tmp_path):
    program = made(tmp_path)
    gate = watched.gate()
    began = time.time_ns()
    for number in range(50):
        process = watched.spawn([program, f"n{number}", ""])
        process.wait()  # gone before the sensor gets its turn
        owner = settled(watched, gate, pid=process.pid)
        assert began < owner.pop("started_ns") < time.time_ns()
        assert not Handle.split(int(owner.pop("handle"), 16)).fallback
        assert owner.pop("parents")[0] == {
            "pid": os.getpid(),
            "exe": os.path.realpath(sys.executable),
        }
        assert owner == {
            "host": "client", "pid": process.pid, "exe": str(program), "argv_cut": False,
            "exe_sha256": sha256(program), "argv": [str(program), f"n{number}", ""],
            "uid": 0, "gid": 0, "comm": "instant", "cgroup": f"/{watched.name}",
            "cgroup_id": watched.cgroup.stat().st_ino, "unit": "", "container": "", "runtime": "",
            "pod": "", "how": "fanotify",
        }  # fmt: skip


def test_a_script_is_its_interpreter_with_the_script_in_its_arguments(watched, tmp_path):
    script = tmp_path / "job"
    script.write_text("#!/bin/sh -e\nexit 0\n")
    script.chmod(0o755)
    gate = watched.gate()
    pid, _ = watched.run([script, "x"])
    owner = settled(watched, gate, pid=pid)
    assert owner["exe"] == os.path.realpath("/bin/sh")
    assert owner["exe_sha256"] == sha256("/bin/sh")
    assert owner["argv"] == ["/bin/sh", "-e", str(script), "x"]
    assert owner["comm"] == "job"


def test_an_exec_that_fails_does_not_lend_its_file_to_the_next(watched, tmp_path):
    """The kernel opens a file before it finds the arguments too long."""
    other = made(tmp_path, "other")
    code = f"""
        import os
        for program in ("/usr/bin/env", "/bin/sh"):
            try:
                os.execv(program, [program, "x" * (1 << 20)])
            except OSError:
                pass
        os.execv({str(other)!r}, ["env"])
    """
    gate = watched.gate()
    process = watched.python(textwrap.dedent(code))
    process.wait()
    owner = settled(watched, gate, pid=process.pid, argv=["env"])
    assert (owner["exe"], owner["exe_sha256"]) == (str(other), sha256(other))
    assert owner["how"] == "fanotify"


def test_a_program_that_was_replaced_after_its_exec_lends_nothing_to_its_successor(
    watched, tmp_path
):
    first, second = made(tmp_path, "one"), made(tmp_path, "two", INSTANT.replace("0", "1"))
    path = tmp_path / "program"
    shutil.copy2(first, path)
    time.sleep(0.03)
    gate = watched.gate()
    process = watched.spawn([path])
    process.wait()
    os.replace(second, path)
    (owner,) = watched.until(lambda: named(gate, pid=process.pid))
    # The removal changed its ctime; a change of its content would look the same.
    assert (owner["exe"], owner["exe_sha256"]) == (f"{path} (deleted)", "")
    assert owner["how"] == "fanotify"


def test_a_program_that_was_overwritten_in_place_has_no_digest(watched, tmp_path):
    program, other = made(tmp_path), made(tmp_path, "other", INSTANT.replace("0", "1"))
    gate = watched.gate()
    process = watched.spawn([program])
    process.wait()
    before = program.stat()
    program.write_bytes(other.read_bytes())
    os.utime(program, ns=(before.st_atime_ns, before.st_mtime_ns))
    (owner,) = watched.until(lambda: named(gate, pid=process.pid))
    for _ in range(20):
        watched.sensor.step(0.01)
    assert {o["exe_sha256"] for o in named(gate, pid=process.pid)} == {""}
    assert owner["exe"] == str(program)


def test_a_program_that_runs_is_hashed_though_its_file_is_gone(watched, tmp_path):
    program = made(tmp_path, "sleeper", "#include <unistd.h>\nint main(void) { pause(); }\n")
    digest = sha256(program)
    process = watched.spawn([program])
    program.unlink()
    gate = watched.gate()
    try:
        watched.until(lambda: watched.sensor._census.owners.get(handle(watched, process.pid)))
        gate.ask(handle(watched, process.pid))
        owner = settled(watched, gate, pid=process.pid)
    finally:
        process.kill()
        process.wait()
    assert owner["exe_sha256"] == digest
    assert owner["exe"] == f"{program} (deleted)"


def handle(watched, pid):
    return watched.sensor._programs.process(pid).handle


def test_long_and_odd_arguments_are_kept_as_far_as_they_go(watched):
    gate = watched.gate()
    pid, _ = watched.run(["/bin/true", "ä", b"\xff".decode("utf-8", "surrogateescape"), "y" * 600])
    owner = settled(watched, gate, pid=pid)
    kept = len("/bin/true\0") + len("ä\0".encode()) + len("\xff\0") - 0
    assert owner["argv"] == ["/bin/true", "ä", "\\xff", "y" * (512 - kept)]
    assert owner["argv_cut"]


def test_a_thousand_short_processes_at_once_are_all_named(watched, tmp_path):
    program = made(tmp_path, "burst", """
        #include <spawn.h>
        #include <stdio.h>
        #include <string.h>
        #include <sys/wait.h>
        int main(int argc, char **argv) {
            if (argc > 1) return 0;
            for (int i = 0; i < 1000; i++) {
                char word[16], *words[] = {"child", word, 0}, *none[] = {0};
                pid_t pid;
                sprintf(word, "%d", i);
                if (posix_spawn(&pid, "/proc/self/exe", 0, 0, words, none)) return 1;
                printf("%d\\n", pid);
            }
            while (wait(0) > 0);
            return 0;
        }
    """)  # fmt: skip
    gate = watched.gate()
    out = tmp_path / "pids"
    with out.open("w") as file:
        watched.run([program], stdout=file)
    pids = [int(line) for line in out.read_text().split()]
    watched.until(lambda: len(gate.owners()) >= 1001)
    found = {o["pid"]: o for o in gate.owners()}
    for number, pid in enumerate(pids):
        assert found[pid]["argv"] == ["child", str(number)]
        assert found[pid]["exe"] == str(program)
        assert found[pid]["exe_sha256"] == sha256(program)
    assert not gate.losses()


def test_a_fork_shares_the_handle_of_its_program(watched):
    listener = watched.listen()
    port = listener.getsockname()[1]
    gate = watched.gate()
    code = CONNECT + "connect()\nif os.fork() == 0: connect(); os._exit(0)\nos.wait()\n"
    process = watched.python(code, str(port))
    watched.until(lambda: process.poll() is not None)
    first, second = watched.until(lambda: gate.connects()[:2] if len(gate.connects()) > 1 else None)
    listener.close()
    assert first.handle == second.handle
    assert first.tgid == process.pid != second.tgid
    assert gate.owner(first.handle)["pid"] == process.pid


def test_an_exec_gets_a_handle_of_its_own_and_remembers_what_it_was(watched):
    gate = watched.gate()
    pid, _ = watched.run(["/bin/sh", "-c", "exec /bin/true"])
    shell = settled(watched, gate, pid=pid, comm="sh")
    true = settled(watched, gate, pid=pid, comm="true")
    assert shell["handle"] != true["handle"]
    assert true["parents"][0] == {"pid": pid, "exe": shell["exe"]}
    assert true["parents"][1:] == shell["parents"][:7]


def test_a_process_that_moves_to_another_cgroup_is_someone_else_from_then_on(watched):
    other = cgroups.make(watched.cgroup / "other")
    listener = watched.listen()
    gate = watched.gate()
    code = (
        CONNECT + f"connect()\nopen({str(other / 'cgroup.procs')!r}, 'w').write('0')\nconnect()\n"
    )
    process = watched.python(code, str(listener.getsockname()[1]))
    watched.until(lambda: process.poll() is not None)
    first, second = watched.until(lambda: gate.connects()[:2] if len(gate.connects()) > 1 else None)
    listener.close()
    before = settled(watched, gate, handle=f"{first.handle:016x}")
    after = settled(watched, gate, handle=f"{second.handle:016x}")
    assert (before["cgroup"], after["cgroup"]) == (f"/{watched.name}", f"/{watched.name}/other")
    same = ("pid", "exe", "exe_sha256", "argv", "how", "parents")
    assert {name: before[name] for name in same} == {name: after[name] for name in same}


def test_a_process_that_becomes_another_user_is_someone_else_from_then_on(watched):
    listener = watched.listen()
    gate = watched.gate()
    code = CONNECT + "connect()\nos.setgid(65534); os.setuid(65534)\nconnect()\n"
    process = watched.python(code, str(listener.getsockname()[1]))
    watched.until(lambda: process.poll() is not None)
    first, second = watched.until(lambda: gate.connects()[:2] if len(gate.connects()) > 1 else None)
    listener.close()
    assert first.handle != second.handle
    after = watched.until(lambda: gate.owner(second.handle))
    assert (gate.owner(first.handle)["uid"], after["uid"], after["gid"]) == (0, 65534, 65534)
    assert after["exe"] == os.path.realpath(sys.executable)


def test_a_process_that_moves_in_from_outside_is_known(watched):
    """Its exec was outside the sensor's cgroups: there is no record of it."""
    outside = cgroups.make(cgroups.root() / f"{watched.name}o")
    listener = watched.listen()
    gate = watched.gate()
    code = (
        CONNECT
        + f"""
open({str(watched.cgroup / "cgroup.procs")!r}, "w").write("0")
s = connect()
s.recv(1)
"""
    )
    try:
        process = watched.python(code, str(listener.getsockname()[1]), cgroup=outside)
        (event,) = watched.until(gate.connects)
        owner = settled(watched, gate, handle=f"{event.handle:016x}")
        process.kill()
        process.wait()
    finally:
        listener.close()
        cgroups.remove(outside)
    assert owner["pid"] == process.pid
    assert owner["argv"][:2] == [sys.executable, "-c"]
    assert owner["cgroup"] == f"/{watched.name}"
    assert owner["exe_sha256"] == sha256(sys.executable)


def test_processes_that_are_older_than_the_sensor_are_found(idle):
    listener = idle.listen()
    code = (
        CONNECT
        + "sys.stdin.readline()\nconnect()\nif os.fork() == 0: connect(); os._exit(0)\nos.wait()\n"
    )
    process = idle.python(code, str(listener.getsockname()[1]), stdin=-1, text=True)
    until = time.time() + 10
    while Path(f"/proc/{process.pid}/comm").read_text() != "python\n" and time.time() < until:
        time.sleep(0.01)
    idle.start()
    gate = idle.gate()
    process.stdin.write("go\n")
    process.stdin.close()
    idle.until(lambda: process.poll() is not None)
    first, second = idle.until(lambda: gate.connects()[:2] if len(gate.connects()) > 1 else None)
    listener.close()
    assert first.handle == second.handle
    split = Handle.split(first.handle)
    assert (split.fallback, split.number) == (True, process.pid)
    gate.ask(first.handle)
    owner = settled(idle, gate, handle=f"{first.handle:016x}")
    started = time.time_ns() - owner["started_ns"]
    assert 0 < started < 60_000_000_000
    assert (owner["pid"], owner["how"]) == (process.pid, "proc")
    assert owner["argv"][:2] == [sys.executable, "-c"]
    assert owner["exe_sha256"] == sha256(sys.executable)
    assert owner["cgroup"] == f"/{idle.name}"
    assert owner["parents"][0]["pid"] == os.getpid()


def test_a_thread_that_executes_and_threads_that_outlive_the_first_keep_their_names(watched):
    listener = watched.listen()
    gate = watched.gate()
    code = (
        CONNECT
        + """
import threading, ctypes
def later():
    time.sleep(0.2)  # the first thread is gone by now
    connect()
    os.execv("/bin/true", ["from-a-thread"])
threading.Thread(target=later).start()
connect()
ctypes.CDLL(None).pthread_exit(None)
"""
    )
    process = watched.python(code, str(listener.getsockname()[1]))
    watched.until(lambda: process.poll() is not None)
    first, second = watched.until(lambda: gate.connects()[:2] if len(gate.connects()) > 1 else None)
    listener.close()
    assert first.handle == second.handle
    assert first.tid != second.tid
    owner = settled(watched, gate, argv=["from-a-thread"])
    assert owner["pid"] == process.pid
    assert owner["parents"][0] == {"pid": process.pid, "exe": os.path.realpath(sys.executable)}


def forget(watched, pid):
    """Delete a process from the kernel's map."""
    key = ctypes.c_uint32(pid)
    processes = watched.sensor._programs.maps["processes"]
    syscalls._bpf(3, struct.pack("=IIQ", processes, 0, ctypes.addressof(key)))


def test_a_process_number_that_is_used_again_inherits_nothing(watched, tmp_path):
    """Forget the process: what it forks has no handle either, and is known by /proc."""
    listener = watched.listen()
    gate = watched.gate()
    code = (
        CONNECT + "sys.stdin.readline()\nif os.fork() == 0: s = connect(); s.recv(1)\nos.wait()\n"
    )
    process = watched.python(code, str(listener.getsockname()[1]), stdin=-1, text=True)
    watched.until(lambda: named(gate, pid=process.pid))
    forget(watched, process.pid)
    process.stdin.write("go\n")
    process.stdin.close()
    (event,) = watched.until(gate.connects)
    owner = settled(watched, gate, handle=f"{event.handle:016x}")
    listener.close()
    watched.until(lambda: process.poll() is not None)
    assert Handle.split(event.handle).fallback
    assert owner["pid"] == event.tgid != process.pid
    assert owner["parents"][0]["pid"] == process.pid


def test_ended_processes_leave_no_entry(watched, tmp_path):
    program = made(tmp_path)
    for _ in range(20):
        pid, _ = watched.run([program])
        watched.until(lambda pid=pid: watched.sensor._programs.process(pid) is None)


def test_an_owner_that_was_forgotten_is_made_again_from_the_kernels_record(watched, tmp_path):
    program = made(tmp_path)
    gate = watched.gate()
    pid, _ = watched.run([program])
    owner = settled(watched, gate, pid=pid)
    watched.sensor._census.owners = Owners()
    before = len(gate.owners())
    gate.ask(int(owner["handle"], 16))
    again = watched.until(lambda: gate.owners()[before:])[-1]
    assert again["how"] == "path"  # found under the path that it had before, by device and inode
    del again["how"], owner["how"], again["started_ns"], owner["started_ns"]
    del again["parents"], owner["parents"]  # its parent was forgotten, too
    assert again == owner


def test_a_handle_that_nobody_had_is_unknown(watched):
    gate = watched.gate()
    gate.ask(12345)
    (body,) = watched.until(lambda: gate.bodies(events.Message.UNKNOWN))
    assert events.handle_of(body) == 12345


def test_an_exec_outside_the_cgroups_is_not_told(watched):
    outside = cgroups.make(cgroups.root() / f"{watched.name}o")
    gate = watched.gate()
    try:
        watched.run(["/bin/true"], cgroup=outside)
        pid, _ = watched.run(["/bin/true"])
    finally:
        cgroups.remove(outside)
    settled(watched, gate, pid=pid)
    assert {o["pid"] for o in gate.owners()} == {pid}


def test_the_latest_used_owners_are_kept():
    def owner(handle):
        return Owner(handle, "", 0, 0, "", (), False, 0, 0, "", None, (), "none")

    owners = Owners(most=3)
    for handle in range(3):
        owners.put(owner(handle))
    assert owners.get(0) is not None
    owners.put(owner(3))
    assert [handle in owners for handle in range(4)] == [True, False, True, True]
    owners.put(owner(2))
    assert len(owners) == 3
