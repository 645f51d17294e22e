"""What an incident responder does, against a real gate with real traffic."""

import json
import os
import random
import signal
import threading
from itertools import count

import pytest
from staging import served, wait_for

from appliance.lab.topology import SERVER4, SERVER6

pytestmark = pytest.mark.system
PORTS = count(6100)


def to(stage, port, *words):
    """The sessions towards a port."""
    return [s for s in stage.sessions(*words) if s["target"].endswith(f":{port}")]


def told(stage, port, **wanted):
    """Wait until the one session towards a port is as wanted."""

    def there():
        found = to(stage, port)
        return found if found and found[0].items() >= wanted.items() else None

    [session] = wait_for(there, what=f"a session to {port} with {wanted}")
    return session


@pytest.fixture
def talk(stage):
    """A running conversation: (port, client's socket, server's socket)."""
    ends = []

    def begin():
        port = next(PORTS)
        with stage.listen(SERVER4, port) as listener:
            client = stage.connect(SERVER4, port)
            client.sendall(b"hello\n")
            server, _ = listener.accept()
        server.settimeout(20)
        ends.extend([client, server])
        assert server.recv(100) == b"hello\n"
        return port, client, server

    yield begin
    for sock in ends:
        sock.close()


def test_a_running_session_is_listed_grows_and_is_complete_when_it_ends(stage, talk):
    port, client, server = talk()
    assert told(stage, port, state="running", bytes_up=6)["ended"] is None
    server.sendall(b"x" * 1000)
    received = 0
    while received < 1000:
        received += len(client.recv(1000))
    told(stage, port, state="running", bytes_down=1000)
    client.close()
    server.close()
    session = told(stage, port, state="closed", bytes_up=6, bytes_down=1000)
    assert (session["close_reason"], session["closed_by"]) == ("fin", "client")
    assert stage.shown(session["id"])["id"] == session["id"]


def test_live_shows_a_session_and_kill_ends_it_for_good(stage, talk):
    port, client, server = talk()
    running = json.loads(stage.narrows("live", "--json").stdout)
    [session] = [s for s in running if s["target"] == f"{SERVER4}:{port}"]
    assert (session["bytes_up"], session["state"]) == (6, "running")
    answer = stage.narrows("kill", session["id"], "--reason", "it reads card numbers")
    assert answer.stderr == f"session {session['id']} was ended\n"
    for sock in (client, server):
        sock.settimeout(20)
        try:
            assert sock.recv(1) == b""
        except ConnectionResetError:
            pass  # ended all the same
    client.close()
    server.close()
    told(stage, port, state="closed", close_reason="killed", closed_by="gate")
    [decision] = stage.shown(session["id"])["decisions"]
    assert decision["reason"] == "it reads card numbers"
    assert decision["actor"].startswith("uid:0(root)")
    assert stage.narrows("kill", session["id"], "--reason", "x", check=False).returncode == 3


def test_a_raw_export_is_byte_for_byte_what_both_sides_sent(stage, tmp_path):
    chance = random.Random(5)
    up, down = chance.randbytes(3_000_000), chance.randbytes(5_000_000)

    def answer(sock):
        sender = threading.Thread(target=sock.sendall, args=(down,))
        sender.start()
        while sock.recv(1 << 16):
            pass
        sender.join()

    with stage.listen(SERVER6, 6201) as listener:
        thread = served(listener, answer)
        with stage.connect(SERVER6, 6201) as client:
            sender = threading.Thread(target=client.sendall, args=(up,))
            sender.start()
            left = len(down)
            while left:
                left -= len(client.recv(1 << 16))
            sender.join()
        thread.join(20)
    session = told(stage, 6201, state="closed", bytes_up=len(up), bytes_down=len(down))
    stage.narrows("sessions", "export", session["id"], "--format", "raw", "--output", str(tmp_path))
    assert (tmp_path / f"{session['id']}.up").read_bytes() == up
    assert (tmp_path / f"{session['id']}.down").read_bytes() == down
    events = stage.narrows("sessions", "export", session["id"]).stdout.splitlines()
    [event] = [json.loads(line) for line in events]
    assert event["traffic"]["bytes_in"] == len(down)


def test_every_read_is_in_the_log_and_the_evidence_verifies(stage, talk):
    port, client, server = talk()
    client.close()
    server.close()
    session = told(stage, port, state="closed")
    stage.narrows("sessions", "show", session["id"])
    log = stage.narrows("evidence", "log", "--kind", "access", "--json").stdout.splitlines()
    shown = [json.loads(line)["fields"] for line in log]
    assert [f["action"] for f in shown if f["objects"] == [session["id"]]] == ["show"]

    def valid():
        answer = stage.narrows("evidence", "verify", "--json", check=False)
        return answer.returncode == 0 and json.loads(answer.stdout)["ok"]

    assert wait_for(valid, what="valid evidence")
    stage.narrows("evidence", "reindex")
    assert to(stage, port)[0]["id"] == session["id"]


def test_reading_goes_on_while_every_process_is_dead_and_the_sessions_are_cut(make_stage):
    stage = make_stage()
    with stage.listen(SERVER4, 6300) as listener:
        client = stage.connect(SERVER4, 6300)
        client.sendall(b"last words")
        server, _ = listener.accept()
        assert server.recv(100) == b"last words"
    for role in ("supervisor", "gate", "seal", "sensor"):
        for pid in stage.pids(role):
            os.kill(pid, signal.SIGKILL)
    session = told(stage, 6300, state="cut")
    assert session["bytes_up"] == len(b"last words")
    assert "last words" in stage.narrows("sessions", "show", session["id"]).stdout
    answer = stage.narrows("live", check=False)
    assert answer.returncode == 69
    client.close()
    server.close()
