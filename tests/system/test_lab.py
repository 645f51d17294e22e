import json
import os
import signal
import ssl
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from staging import Stage, own_place, served, wait_for

from appliance.lab import cgroups
from appliance.lab.topology import SERVER4, SERVER6
from appliance.proxy.tls import Authority

pytestmark = pytest.mark.system


def leftovers(place):
    """Return what of a place is still there."""
    found = [str(p) for p in (place.folder, place.disk, place.memory, place.cgroup) if p.exists()]
    found += [n for n in place.topology.namespaces if Path("/run/netns", n).exists()]
    return found


def test_a_lab_that_is_up_says_who_runs(stage):
    status = stage.status()
    assert status["up"]
    assert status["namespaces"] == stage.place.topology.namespaces
    roles = sorted(process["role"] for process in status["processes"])
    workers = ["gate"] * (os.cpu_count() or 1)
    assert roles == sorted([*workers, "review", "seal", "sensor", "supervisor"])


@pytest.mark.parametrize("address", [SERVER4, SERVER6])
@pytest.mark.parametrize("port", [22, 8080, 64999])
def test_any_port_passes_through_the_gate_and_is_recorded(stage, address, port):
    with stage.listen(address, port) as listener:
        thread = served(listener, lambda sock: sock.sendall(sock.recv(100).upper()))
        with stage.connect(address, port) as client:
            client.sendall(b"hello")
            assert client.recv(100) == b"HELLO"
        thread.join(10)
    target = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"

    def recorded():
        return [s for s in stage.sessions() if s["target"] == target and s["state"] == "closed"]

    session = wait_for(recorded, what="the session's record")[0]
    assert (session["bytes_up"], session["bytes_down"]) == (5, 5)
    assert session["protocol"] == "opaque"


def test_a_program_of_an_account_is_attributed_to_it(stage):
    with stage.listen(SERVER4, 7070) as listener:
        served(listener, lambda sock: sock.recv(1))
        script = f"import socket; socket.create_connection(('{SERVER4}', 7070)).send(b'x')"
        stage.client([sys.executable, "-c", script], account="backup-job")

    def recorded():
        return [s for s in stage.sessions() if s["target"].endswith(":7070")]

    session = wait_for(recorded, what="the session's record")[0]
    assert session["service_account"] == "backup-job"
    assert session["assurance"] == "kernel"
    assert session["owner"]["exe"] == os.path.realpath(sys.executable)


def test_a_program_without_an_account_is_unknown_and_says_why(stage):
    with stage.listen(SERVER4, 7071) as listener:
        served(listener, lambda sock: sock.recv(1))
        script = f"import socket; socket.create_connection(('{SERVER4}', 7071)).send(b'x')"
        stage.client([sys.executable, "-c", script])

    def recorded():
        return [s for s in stage.sessions() if s["target"].endswith(":7071")]

    session = wait_for(recorded, what="the session's record")[0]
    assert session["service_account"] is None
    assert session["unknown_reason"] == "no-account"
    assert session["owner"]["pid"]


def test_an_unknown_account_is_a_key_error_that_names_it(stage):
    with pytest.raises(KeyError, match="nobody"):
        stage.cgroup("client", "nobody")


def test_processes_that_die_are_started_again(make_stage):
    stage = make_stage()
    for role in ("gate", "seal", "sensor", "review"):
        before = stage.pids(role)
        os.kill(before[0], signal.SIGKILL)
        wait_for(lambda role=role, before=before: len(stage.pids(role)) == len(before)
                 and stage.pids(role) != before, what=f"a new {role}")  # fmt: skip


def test_down_leaves_nothing_behind_even_after_a_crash():
    stage = Stage(own_place())
    try:
        stage.up()
        for process in stage.processes():
            os.kill(process["pid"], signal.SIGKILL)
        stage.up()
        assert len(stage.processes()) >= 4
        os.kill(stage.pids("supervisor")[0], signal.SIGKILL)
        assert leftovers(stage.place)
    finally:
        stage.down()
    assert not leftovers(stage.place)
    links = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert stage.place.prefix not in links.stdout


def test_without_a_gate_the_hosts_are_routed_directly(make_stage):
    stage = make_stage(gate=False)
    assert stage.processes() == []
    with stage.listen(SERVER4, 9000) as listener:
        served(listener, lambda sock: sock.sendall(b"direct"))
        with stage.connect(SERVER4, 9000) as client:
            assert client.recv(10) == b"direct"


def test_another_configuration_keeps_the_rest_of_the_labs(make_stage):
    stage = make_stage('[[route]]\nname = "mine"\ndurability = "fsync"\n')
    assert stage.config.route[0].durability == "fsync"
    assert stage.config.account[0].name == "ci-deployer"


def answer_over_tls(stage, port, files):
    """Return what curl gets from a HTTPS server on the server host with this certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)

    def serve(sock):
        try:
            with context.wrap_socket(sock, server_side=True) as tls:
                tls.recv(1000)
                tls.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
        except OSError:
            pass  # the gate refuses

    with stage.listen(SERVER4, port) as listener:
        thread = served(listener, serve)
        argv = ["curl", "-sS", "--fail", f"https://{SERVER4}:{port}/"]
        done = stage.client(argv, account="ci-deployer", check=False, env=stage.environment)
        thread.join(10)

    def ended():
        target = f"{SERVER4}:{port}"
        return [s for s in stage.sessions() if s["target"] == target and s["state"] == "closed"]

    (session,) = wait_for(ended, what="the session's record")
    return done, session


def test_tls_is_opened_and_the_labs_clients_trust_it(stage):
    files = stage.place.certificates
    done, session = answer_over_tls(stage, 8443, (files.server, files.server_key))
    assert (done.stdout, done.stderr) == ("hello", "")
    assert (session["protocol"], session["counts"]["operations"]) == ("http1", 1)


def test_a_server_that_the_labs_authority_does_not_know_is_refused(stage, tmp_path):
    stranger = Authority.in_folder(tmp_path, "stranger").leaf((SERVER4,))
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_bytes(stranger.chain)
    key.write_bytes(stranger.key)
    done, session = answer_over_tls(stage, 8444, (chain, key))
    assert done.returncode == 35  # curl's word for a handshake that failed
    assert session["close_reason"] == "tls"


def test_the_labs_keys_are_for_root_alone(stage):
    files = stage.place.certificates
    keys = [files.server_key, files.folder / "ca.key", stage.config.paths.state / "ca.key"]
    assert [stat.S_IMODE(key.stat().st_mode) for key in keys] == [0o600] * 3


def test_the_lab_finds_cgroup_v2_on_a_hybrid_machine():
    assert (cgroups.root() / "cgroup.controllers").exists()


NARROWS = (sys.executable, "-m", "appliance")


def narrows_lab(*words):
    argv = [*NARROWS, "lab", *words]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=110)


@pytest.fixture(scope="module")
def the_lab():
    """The lab of the command line itself; there is one on a machine."""
    if narrows_lab("status").returncode == 0:
        pytest.fail("the lab is up: ./run lab down")
    yield narrows_lab
    narrows_lab("down")


def test_the_command_line_runs_the_lab(the_lab, tmp_path):
    assert the_lab("exec", "--", "true").returncode == 3
    assert the_lab("up").returncode == 0
    status = json.loads(the_lab("status", "--json").stdout)
    assert status["up"]
    assert status["namespaces"] == ["narrows-client", "narrows-gate", "narrows-server"]
    api = status["api"]
    assert api["url"] == "https://203.0.113.1:8443"
    words = ["-H", f"Authorization: Bearer {api['token']}", f"{api['url']}/api/v1/sessions"]
    argv = ["curl", "-sS", "--fail", "--cacert", api["ca_file"], *words]
    assert json.loads(subprocess.check_output(argv, text=True)) == {"items": [], "next": None}
    unknown = the_lab("exec", "--as", "nobody", "--", "true")
    assert unknown.returncode == 2
    assert "ci-deployer, backup-job, report-job" in unknown.stderr
    assert the_lab("exec", "--as", "ci-deployer", "--", "sh", "-c", "exit 7").returncode == 7
    trusted = the_lab("exec", "--", "sh", "-c", 'cat "$SSL_CERT_FILE"').stdout
    assert trusted.count("BEGIN CERTIFICATE") == 2
    assert subprocess.check_output([*NARROWS, "ca", "export"], text=True) in trusted
    here = the_lab("exec", "--", "cat", "/proc/self/cgroup").stdout
    assert "/narrows/clients/unassigned" in here
    bad = tmp_path / "bad.toml"
    bad.write_text("[gate]\nworker = 3\n")
    refused = the_lab("up", "--config", str(bad))
    assert refused.returncode == 78
    assert "did you mean 'workers'" in refused.stderr
    assert the_lab("down").returncode == 0
    assert json.loads(the_lab("status", "--json").stdout) == {
        "up": False, "namespaces": [], "processes": [], "api": None,
    }  # fmt: skip
