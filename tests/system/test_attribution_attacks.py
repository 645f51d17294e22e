"""Who lies about who it is: forged, borrowed, replayed and unknown identities, by a real gate."""

import json
import socket
import sys
from itertools import count

import pytest
from attributed import PORT, Sessions, echo
from raw_packets import Handmade, Muted, Wire, identity, identity_of, is_syn_from, signed, syn
from staging import Stage, own_place, wait_for

from appliance.lab.topology import CLIENT4, CLIENT6, SERVER4, SERVER6
from ebpf import events

pytestmark = pytest.mark.system
HANDLE = 0x4242_0010_0000_0007
TALK = """
import socket, struct, sys
address, port, source = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
s = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
s.bind(("", source))
s.connect((address, port))
s.sendall(b"hello")
assert s.recv(5) == b"hello"
"""
ENDS = [(CLIENT4, SERVER4), (CLIENT6, SERVER6)]
_ports = count(40_000)


@pytest.fixture(scope="module")
def stage():
    made = Stage(own_place())
    try:
        made.up("[attribution]\nwait_ms = 2000\n")
        with echo(made):
            yield made
    finally:
        made.down()


@pytest.fixture
def sessions(stage):
    return Sessions(stage)


def key(stage):
    """Return the sensor's key, as it tells its gates; only root can ask."""
    with socket.socket(socket.AF_UNIX) as asker:
        asker.connect(str(stage.config.paths.run / "sensor.sock"))
        messages = events.Messages()
        while not (found := messages.feed(asker.recv(4096))):
            pass
    return bytes.fromhex(json.loads(found[0][1])["mac_keys"][0])


def recorded(sessions, port):
    """Return the records of the session from a client port, once it is attributed."""
    return wait_for(
        lambda: (found := sessions.more().opened().get(port)) and "Attributed" in found and found
    )


def talk(stage, packet, data=b"hello"):
    """Open a connection with a SYN of our own and say something; return what came back."""
    with Muted(stage, packet.sport), Wire(stage) as wire:
        connection = Handmade(wire, packet)
        assert connection.opened()
        return connection.echoed(data)


def genuine(stage, port, address=SERVER4, account="backup-job"):
    """Let a real client talk from `port`; return its SYN."""
    with Wire(stage) as wire:
        stage.client([sys.executable, "-c", TALK, address, str(PORT), str(port)], account=account)
        return wire.wait(is_syn_from(port))


def assert_refused_identity(found, reason, handle):
    (attributed,), (alarm,) = found["Attributed"], found["Alarm"]
    assert (attributed["account"], attributed["assurance"]) == (None, "none")
    assert attributed["reason"] == alarm["kind"] == reason
    assert attributed["owner"] is None
    assert alarm["detail"]["claimed_handle"] == f"{handle:016x}"


@pytest.mark.parametrize(("source", "target"), ENDS)
@pytest.mark.parametrize("mac_bytes", [8, 4, 3])
def test_a_forged_identity_is_unknown_and_alarmed_and_the_session_goes_on(
    stage, sessions, source, target, mac_bytes
):
    port = next(_ports)
    option = identity(HANDLE, bytes(range(mac_bytes)))
    assert talk(stage, syn((source, port), (target, PORT), option)) == b"hello"
    assert_refused_identity(recorded(sessions, port), "forged", HANDLE)


@pytest.mark.parametrize("target", [SERVER4, SERVER6])
def test_an_identity_that_was_borrowed_from_another_connection_is_forged(stage, sessions, target):
    lender, port = next(_ports), next(_ports)
    handle, mac = identity_of(genuine(stage, lender, target))
    assert recorded(sessions, lender)["Attributed"][0]["account"] == "backup-job"
    source = CLIENT6 if ":" in target else CLIENT4
    borrowed = syn((source, port), (target, PORT), identity(handle, mac))
    assert talk(stage, borrowed) == b"hello"
    assert_refused_identity(recorded(sessions, port), "forged", handle)


@pytest.mark.parametrize("target", [SERVER4, SERVER6])
def test_a_syn_that_was_here_before_is_replayed_and_alarmed(stage, sessions, target):
    port = next(_ports)
    copy = genuine(stage, port, target)
    first = recorded(sessions, port)
    assert first["Attributed"][0]["account"] == "backup-job"
    wait_for(lambda: "SessionClose" in sessions.more().opened()[port])
    assert talk(stage, copy) == b"hello"
    again = Sessions(stage)
    both = wait_for(
        lambda: (
            len(found := again.more().from_port(port)) == 2 and "Attributed" in found[1] and found
        )
    )
    assert both[0]["Attributed"] == first["Attributed"]
    assert_refused_identity(both[1], "replayed", identity_of(copy)[0])


def test_a_true_identity_that_no_sensor_gave_is_unknown(stage, sessions):
    """Signed with the right key, for a handle that means nothing."""
    port = next(_ports)
    ends = (CLIENT4, port), (SERVER4, PORT)
    option = signed(key(stage), HANDLE, syn(*ends))
    assert talk(stage, syn(*ends, option)) == b"hello"
    (attributed,) = recorded(sessions, port)["Attributed"]
    assert attributed["reason"] == "no-owner"
    assert attributed["owner"]["handle"] == f"{HANDLE:016x}"


def test_a_syn_without_identity_from_nobody_is_unknown_and_never_by_its_network(stage, sessions):
    """A sensor covers this client, so that its kernel's word was to be expected."""
    port = next(_ports)
    assert talk(stage, syn((CLIENT4, port), (SERVER4, PORT))) == b"hello"
    (attributed,) = recorded(sessions, port)["Attributed"]
    assert (attributed["account"], attributed["reason"]) == (None, "timeout")


def test_a_route_may_refuse_forged_identities():
    stage = Stage(own_place())
    try:
        stage.up('[attribution]\non_forged = "refuse"\n')
        port = next(_ports)
        with echo(stage):
            packet = syn((CLIENT4, port), (SERVER4, PORT), identity(HANDLE, bytes(8)))
            assert talk(stage, packet) is None
            assert genuine(stage, next(_ports)) is not None
        found = recorded(Sessions(stage), port)
        assert_refused_identity(found, "forged", HANDLE)
        assert "UpstreamOpen" not in found
    finally:
        stage.down()
