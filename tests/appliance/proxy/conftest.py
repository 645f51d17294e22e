import socket
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "contract")]

from driven import Gate  # noqa: E402 - the path comes first
from tls_ends import Certificates  # noqa: E402 - the same


@pytest.fixture
def certificates(tmp_path):
    return Certificates(tmp_path / "certificates")


@pytest.fixture
def make_gate(tmp_path, certificates):
    """Return a function that makes a gate whose only route opens TLS; `ca` is its authority."""
    made = []

    def make(**route):
        words = {"tls": "intercept", "tls_verify": "pinned", "tls_ca": str(certificates.ca)} | route
        if words["tls_verify"] != "pinned":
            del words["tls_ca"]
        gate = Gate(tmp_path / f"gate-{len(made)}", **words)
        gate.ca = gate.config.paths.state / "ca.pem"
        made.append(gate)
        return gate

    yield make
    for gate in made:
        if not gate.loop.is_closed():
            gate.close()


@pytest.fixture
def connect():
    """Return a function that connects to a loopback port; its sockets are closed at the end."""
    made = []

    def dial(port, *, receive_bytes=0):
        sock = socket.socket()
        made.append(sock)
        if receive_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        sock.settimeout(20)
        sock.connect(("127.0.0.1", port))
        return sock

    yield dial
    for sock in made:
        sock.close()
