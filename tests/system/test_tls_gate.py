"""HTTPS through a real gate and its redirect: curl, nginx, and the load of real kernels."""

import hashlib
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
from gate_hosts import Gate, until

sys.path.append(str(Path(__file__).parents[1] / "appliance" / "proxy"))

from tls_ends import Certificates

from appliance.lab import topology
from appliance.lab.topology import SERVER4

pytestmark = pytest.mark.system
NAME, PORT = "shop.test", 443
SIZE = 40 << 20
NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
  access_log off; client_max_body_size 100m;
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  server {{
    listen {port} ssl http2; ssl_certificate {certificate}; ssl_certificate_key {key};
    ssl_protocols TLSv1.2 TLSv1.3; root {folder}; dav_methods PUT;
  }}
}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Yield (gate, folder of nginx): a gate that opens TLS, in front of nginx with h2."""
    folder = tmp_path_factory.mktemp("nginx")
    certificates = Certificates(folder / "certificates")
    certificate, key = certificates.server(NAME)
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, port=PORT, certificate=certificate, key=key))
    (folder / "big").write_bytes(hashlib.shake_128(b"down").digest(SIZE))
    route = f'tls = "intercept"\ntls_verify = "pinned"\ntls_ca = "{certificates.ca}"'
    with Gate(route=route) as gate:
        server = topology.start(
            gate.topology.namespace("server"),
            ["nginx", "-g", "user root;", "-e", str(folder / "error.log"), "-c", str(config)],
            cgroup=gate.cgroup / "gate", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            until(lambda: curl(gate, "/big", "-r", "0-0").returncode == 0, what="nginx")
            yield gate, folder
        finally:
            server.kill()
            server.wait()


def request(gate, path):
    where = ["--resolve", f"{NAME}:{PORT}:{SERVER4}", f"https://{NAME}{path}"]
    return ["curl", "-sS", "--cacert", str(gate.state / "ca.pem"), *where]


def curl(gate, path, *words):
    argv = [*request(gate, path), *words]
    return gate.on("client", lambda: subprocess.run(argv, capture_output=True, check=False))


@pytest.mark.parametrize("http", ["--http1.1", "--http2"])
@pytest.mark.parametrize("tls", ["1.2", "1.3"])
def test_large_transfers_pass_both_ways_and_are_recorded_as_plaintext(place, tmp_path, http, tls):
    gate, folder = place
    words = [http, "--tls-max", tls]
    down, up = tmp_path / "down", tmp_path / "up"
    up.write_bytes(hashlib.shake_128(f"{http}{tls}".encode()).digest(SIZE))
    before = {session.number for session in gate.recorded().values()}
    assert curl(gate, "/big", *words, "-o", str(down)).returncode == 0
    assert down.read_bytes() == (folder / "big").read_bytes()
    sent = f"/up{tls}{http}"
    done = curl(gate, sent, *words, "-T", str(up))
    assert (done.returncode, done.stderr) == (0, b"")
    assert (folder / sent[1:]).read_bytes() == up.read_bytes()

    def closed():
        found = [s for n, s in gate.recorded().items() if n and n not in before and s.close]
        return found if len(found) == 2 else None

    first, second = until(closed, what="the sessions in the evidence")
    for session in (first, second):
        hello, established = [r for r in session.records if r["record"] == "Tls"]
        assert established["client_version"] == f"TLSv{tls}"
        assert established["alpn"] == ("h2" if http == "--http2" else "http/1.1")
        assert hello["sni"] == NAME
    if http == "--http1.1":
        assert first.sizes[1] > SIZE
        assert bytes(first.up).startswith(b"GET /big HTTP/1.1\r\n")
        assert second.sizes[0] > SIZE
    else:
        assert bytes(first.up).startswith(b"PRI * HTTP/2.0\r\n")


def test_a_gate_that_is_killed_in_a_handshake_leaves_a_session_that_was_cut(place):
    gate, _ = place
    before = set(gate.recorded())
    context = ssl.create_default_context(cafile=gate.state / "ca.pem")
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname=NAME)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    hello = outgoing.read()
    shown = (gate.state / "ca.pem").read_bytes()
    with gate.connect(PORT) as half, gate.connect(PORT) as unfinished:
        half.sendall(hello[:100])
        unfinished.sendall(hello)
        assert unfinished.recv(1) == b"\x16"  # the server's leg is up; the client says no more
        gate.kill()
        gate.start()
        gate.wait_ready()
    gate.recover()
    cut = [
        session for number, session in gate.recorded().items() if number and number not in before
    ]
    assert len(cut) == 2
    for session in cut:
        assert session.sizes == [0, 0, 0, 0]
        assert session.close is None
    # says that sessions of the dead worker that have no SessionClose were cut
    assert any(record["record"] == "Recovered" for record in gate.recorded()[0].records)
    stages = sorted(len([r for r in session.records if r["record"] == "Tls"]) for session in cut)
    assert stages == [0, 1]
    assert (gate.state / "ca.pem").read_bytes() == shown
    known = set(gate.recorded())
    assert curl(gate, "/big", "-r", "0-0").returncode == 0
    until(lambda: any(s.close for n, s in gate.recorded().items() if n not in known), what="it")


def test_what_passed_before_a_gate_was_killed_is_in_the_evidence(place, tmp_path):
    gate, folder = place
    before = set(gate.recorded())
    got = tmp_path / "got"
    argv = [*request(gate, "/big"), "--http1.1", "--limit-rate", "8M", "-o", str(got)]
    client = gate.on("client", lambda: subprocess.Popen(argv, stderr=subprocess.DEVNULL))
    until(lambda: got.exists() and got.stat().st_size > 1 << 20, what="some of the file")
    gate.kill()
    client.kill()
    client.wait()
    gate.start()
    gate.wait_ready()
    gate.recover()
    (session,) = [s for n, s in gate.recorded().items() if n and n not in before]
    head, _, body = bytes(session.down).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    whole = (folder / "big").read_bytes()
    assert body == whole[: len(body)]
    assert session.sizes[1] - len(head) - 4 >= got.stat().st_size
