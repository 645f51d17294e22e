"""Who did it, for ten thousand processes that are gone before anybody looks."""

import hashlib
import subprocess
from collections import Counter

import pytest
from attributed import PORT, Sessions, echo
from short_lives import FIRST_PORT, program
from staging import Stage, own_place, wait_for

from appliance.lab import cgroups
from appliance.lab.topology import SERVER4

pytestmark = [pytest.mark.system, pytest.mark.load]
PROCESSES = 10_007
ACCOUNTS = ("ci-deployer", "backup-job", None)
#: The machine may be busy with other tests: no answer is to be missed for want of a processor.
PATIENT = "[attribution]\nwait_ms = 10000\n"


@pytest.fixture(scope="module")
def stage():
    made = Stage(own_place())
    try:
        made.up(PATIENT)
        yield made
    finally:
        made.down()


def load(stage, count=PROCESSES):
    """Run the clients, spread over the accounts; return {nonce: (account, pid)}."""
    spawners = []
    for first, account in enumerate(ACCOUNTS):
        argv = [program(), "spawn", first, count, len(ACCOUNTS), SERVER4, PORT]
        spawners.append(
            stage.spawn(
                "client", list(map(str, argv)), account=account, stdout=subprocess.PIPE, text=True
            )
        )
    ran = {}
    for spawner, account in zip(spawners, ACCOUNTS, strict=True):
        out, _ = spawner.communicate(timeout=100)
        assert spawner.returncode == 0
        for line in out.splitlines():
            nonce, pid = map(int, line.split())
            ran[nonce] = (account, pid)
    return ran


def test_every_one_of_10007_short_lived_processes_is_named_and_none_wrongly(stage):
    with echo(stage):
        ran = load(stage)
        assert len(ran) == PROCESSES
        sessions = Sessions(stage)
        wait_for(lambda: sessions.more().closed() >= PROCESSES, 60, "the end of every session")
    opened = sessions.opened()
    digest = hashlib.sha256(program().read_bytes()).hexdigest()
    groups = {
        account: f"/{stage.cgroup('client', account).relative_to(cgroups.root())}"
        for account in ACCOUNTS
    }
    assert len(opened) == PROCESSES
    for nonce, (account, pid) in ran.items():
        (found,) = opened[FIRST_PORT + nonce]["Attributed"]
        assert found["account"] == account
        assert found["reason"] == (None if account else "no-account")
        owner = found["owner"]
        assert (owner["pid"], owner["argv"][2]) == (pid, f"nonce-{nonce}")
        assert (owner["exe"], owner["exe_sha256"]) == (str(program()), digest)
        assert owner["cgroup"] == groups[account]
    ways = Counter(records["Attributed"][0]["how"] for records in opened.values())
    assert ways == {"syn": PROCESSES}
    assert {beat["sensor_lost"] for beat in sessions.all("Heartbeat")} <= {0}
