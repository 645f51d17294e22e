"""How the identity gets through: what is on the way of a SYN, and what still names its sender."""

import sys
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path

import pytest
from attributed import PORT, Sessions, echo
from staging import Stage, own_place, wait_for

from appliance.lab.topology import GATE_SERVER4, GATE_SERVER6, SERVER4, SERVER6

pytestmark = pytest.mark.system
CLIENT = """
import socket, sys
address, port, source, protocol = sys.argv[1], *map(int, sys.argv[2:])
family = socket.AF_INET6 if ":" in address else socket.AF_INET
s = socket.socket(family, socket.SOCK_STREAM, protocol)
s.bind(("", source))
s.connect((address, port))
s.sendall(b"hello")
assert s.recv(5) == b"hello"
"""
MPTCP = 262
BOX = """
table ip box {
    chain ingress {
        type filter hook prerouting priority -400;
        reset tcp option 253
    }
}
table ip6 box {
    chain ingress {
        type filter hook prerouting priority -400;
        reset tcp option 253
    }
}
"""
_ports = count(42_000)


@pytest.fixture(scope="module")
def stage():
    made = Stage(own_place())
    try:
        made.up("[attribution]\nwait_ms = 10000\n")
        with echo(made):
            yield made
    finally:
        made.down()


@contextmanager
def sysctl(stage, role, path, value):
    """Set a value of a host's network stack for a while."""
    file = Path("/proc/sys/net", path)
    before = stage.on(role, file.read_text)
    stage.on(role, file.write_text, value)
    try:
        yield
    finally:
        stage.on(role, file.write_text, before)


@contextmanager
def middlebox(stage):
    """Strip unknown options from what reaches the gate, before anything else sees it."""
    add = stage.spawn("gate", ["nft", "-f", "-"], stdin=-1, text=True)
    add.communicate(BOX)
    assert add.returncode == 0
    try:
        yield
    finally:
        for family in ("ip", "ip6"):
            assert stage.spawn("gate", ["nft", f"delete table {family} box"]).wait() == 0


def attributed(stage, address, account="backup-job", protocol=0):
    """Let a client of an account talk to the server; return what the session's record says."""
    port = next(_ports)
    words = [address, str(PORT), str(port), str(protocol)]
    stage.client([sys.executable, "-c", CLIENT, *words], account=account)
    sessions = Sessions(stage)
    found = wait_for(
        lambda: (
            "Attributed" in (records := sessions.more().opened().get(port, {}))
            and records["Attributed"]
        )
    )
    assert len(found) == 1
    owner = found[0]["owner"]
    assert owner["argv"][3:] == words
    return found[0]["account"], found[0]["how"]


@pytest.mark.parametrize("address", [SERVER4, SERVER6])
@pytest.mark.parametrize("account", ["ci-deployer", "backup-job", "report-job", None])
def test_a_syn_names_its_account(stage, address, account):
    assert attributed(stage, address, account) == (account, "syn")


@pytest.mark.parametrize("address", [SERVER4, SERVER6])
def test_a_client_without_timestamps_is_named_by_its_syn(stage, address):
    with sysctl(stage, "client", "ipv4/tcp_timestamps", "0"):
        assert attributed(stage, address) == ("backup-job", "syn")


@pytest.mark.skipif(
    not Path("/proc/sys/net/mptcp/enabled").exists(), reason="kernel: it has no MPTCP"
)
@pytest.mark.parametrize("address", [SERVER4, SERVER6])
def test_an_mptcp_client_is_named_by_its_syn(stage, address):
    assert attributed(stage, address, protocol=MPTCP) == ("backup-job", "syn")


@pytest.mark.parametrize("address", [SERVER4, SERVER6])
def test_a_syn_that_a_cookie_answered_is_named_by_its_event(stage, address):
    with sysctl(stage, "gate", "ipv4/tcp_syncookies", "2"):
        assert attributed(stage, address) == ("backup-job", "event")


@pytest.mark.parametrize("address", [SERVER4, SERVER6])
def test_a_syn_that_lost_its_option_on_the_way_is_named_by_its_event(stage, address):
    with middlebox(stage):
        assert attributed(stage, address) == ("backup-job", "event")
    assert attributed(stage, address) == ("backup-job", "syn")


TRIED = """
import socket, sys
address, port, source = sys.argv[1], *map(int, sys.argv[2:])
s = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
s.bind(("", source))
try:
    s.connect((address, port))
    s.recv(1)
except ConnectionResetError:
    sys.exit(0)
sys.exit("nobody refused it")
"""


def tried(stage, address, account="backup-job"):
    """Let a client of an account try what is not let through; return its port."""
    port = next(_ports)
    argv = [sys.executable, "-c", TRIED, address, str(PORT), str(port)]
    stage.client(argv, account=account)
    return port


@pytest.mark.parametrize("address", [GATE_SERVER4, GATE_SERVER6])
@pytest.mark.parametrize("account", ["backup-job", None])
def test_a_connection_that_is_refused_is_recorded_with_its_owner(stage, address, account):
    port = tried(stage, address, account)
    sessions = Sessions(stage)
    (refused,) = wait_for(
        lambda: [r for r in sessions.more().all("Refused") if r["client_port"] == port]
    )
    assert (refused["reason"], refused["account"], refused["how"]) == (
        "own-address",
        account,
        "syn",
    )
    assert refused["unknown"] == (None if account else "no-account")
    assert refused["owner"]["argv"][-1] == str(port)


@pytest.mark.parametrize("stripped", [False, True])
def test_a_connection_that_cannot_even_be_dialled_is_recorded_with_its_owner(stage, stripped):
    there = "198.51.100.77"
    assert stage.spawn("gate", ["ip", "route", "add", "unreachable", there]).wait() == 0
    try:
        with middlebox(stage) if stripped else nullcontext():
            port = tried(stage, there)
    finally:
        assert stage.spawn("gate", ["ip", "route", "del", "unreachable", there]).wait() == 0
    sessions = Sessions(stage)

    def closed():
        records = sessions.more().opened().get(port, {})
        return records if "SessionClose" in records else None

    records = wait_for(closed)
    assert records["SessionClose"][0]["reason"] == "unreachable"
    (found,) = records["Attributed"]
    assert (found["account"], found["how"]) == ("backup-job", "event" if stripped else "syn")
    assert found["owner"]["argv"][-1] == str(port)
