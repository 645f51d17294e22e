"""The review API of a real gate: it lists real traffic, ends it, and outlives the gate."""

import json
import os
import signal
import subprocess
import time
from itertools import count

import pytest
from staging import wait_for

from appliance.lab.topology import SERVER4

pytestmark = pytest.mark.system
PORTS = count(6500)
API = "https://127.0.0.1:8443/api/v1"


class Curl:
    """curl in the gate's namespace, as an operator would run it."""

    def __init__(self, stage):
        self._stage = stage

    def __call__(self, path, *words, token=None):
        api = self._stage.status()["api"]
        argv = ["curl", "-sS", "--cacert", api["ca_file"], "-w", "\n%{http_code}", *words]
        argv += ["-H", f"Authorization: Bearer {token or api['token']}", API + path]
        done = self._stage.on("gate", lambda: subprocess.run(
            argv, capture_output=True, text=True, check=False, timeout=60
        ))  # fmt: skip
        assert done.returncode == 0, done.stderr
        body, _, status = done.stdout.rpartition("\n")
        return int(status), json.loads(body)

    def sessions(self, port):
        _, page = self("/sessions?target=" + f"{SERVER4}:{port}")
        return page["items"]


@pytest.fixture(scope="module")
def curl(stage):
    return Curl(stage)


def conversation(stage):
    port = next(PORTS)
    with stage.listen(SERVER4, port) as listener:
        client = stage.connect(SERVER4, port)
        client.sendall(b"hello\n")
        server, _ = listener.accept()
    server.settimeout(20)
    assert server.recv(100) == b"hello\n"
    return port, client, server


def test_the_status_of_the_lab_has_what_curl_needs(stage, curl):
    api = stage.status()["api"]
    assert api["url"] == "https://127.0.0.1:8443"
    assert api["token"].startswith("narrows_")
    assert curl("/sessions")[0] == 200
    assert curl("/sessions", token="narrows_wrong")[0] == 401
    assert stage.place.token.stat().st_mode & 0o777 == 0o600


def test_a_session_is_listed_followed_ended_and_its_bytes_are_there(stage, curl):
    port, client, server = conversation(stage)
    began = time.monotonic()
    [session] = wait_for(lambda: curl.sessions(port), what="the session in the list")
    print(f"listed after {time.monotonic() - began:.2f} s")
    assert session["state"] == "running"
    _, live = curl("/live")
    assert session["id"] in [one["id"] for one in live["items"]]
    assert live["workers"] == {"there": os.cpu_count(), "silent": 0}
    words = ("-X", "POST", "--json", json.dumps({"reason": "it reads card numbers"}))
    assert curl(f"/sessions/{session['id']}/kill", *words[2:])[0] == 200
    wait_for(lambda: curl.sessions(port)[0]["close_reason"] == "killed", what="its end")
    _, page = curl(f"/sessions/{session['id']}/records?kind=decisions")
    assert page["items"][0]["actor"].startswith("token:")
    assert page["items"][0]["reason"] == "it reads card numbers"
    assert curl.sessions(port) == stage.sessions("--limit", "1")
    client.close()
    server.close()


def test_a_token_made_on_the_command_line_is_good_at_once(stage, curl):
    token = stage.narrows("token", "create", "--role", "viewer").stdout.strip()
    assert curl("/sessions", token=token)[0] == 200
    assert curl("/sessions?q=x", token=token)[0] == 403


def test_clients_do_not_reach_the_api_through_the_gate(make_stage):
    stage = make_stage('[review]\naddress = "198.51.100.1"\n')
    argv = ["curl", "-sk", "--max-time", "10", "https://198.51.100.1:8443/api/v1/health"]

    def ask():
        return subprocess.run(argv, capture_output=True, text=True, check=False)

    assert json.loads(stage.on("server", ask).stdout)["recording"]
    assert stage.on("client", ask).returncode != 0
    refused = stage.narrows("evidence", "log", "--kind", "refused", "--json").stdout.splitlines()
    assert "own-address" in [json.loads(line)["fields"]["reason"] for line in refused]


def test_health_is_ok_and_every_part_of_it_can_fail_and_come_back(stage, curl):
    wait_for(lambda: curl("/health")[1]["status"] == "ok", what="health")


def test_what_the_api_wrote_is_sealed_and_verifies(stage, curl):
    assert curl("/live")[0] == 200

    def sealed():
        """A read is durable before its answer; its leaf comes with a checkpoint seconds later."""
        _, page = curl("/evidence/leaves?limit=1000")
        return ("access", "live") in {
            (leaf["leaf"]["type"], leaf["leaf"].get("action")) for leaf in page["items"]
        }

    wait_for(sealed, what="the read among the leaves")
    assert json.loads(stage.narrows("evidence", "verify", "--json").stdout)["ok"]


def test_the_api_answers_while_everything_else_is_dead(make_stage):
    stage = make_stage()
    curl = Curl(stage)
    port, client, server = conversation(stage)
    [session] = wait_for(lambda: curl.sessions(port), what="the session in the list")
    for role in ("supervisor", "gate", "seal", "sensor"):
        for pid in stage.pids(role):
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: curl.sessions(port)[0]["state"] == "cut", what="the cut session")
    status, live = curl("/live")
    assert (status, live["items"]) == (200, [])
    status, operations = curl(f"/sessions/{session['id']}/operations")
    assert (status, operations) == (200, {"items": [], "next": None})
    wait_for(lambda: curl("/health")[1]["status"] == "degraded", what="what it says of the rest")
    client.close()
    server.close()
