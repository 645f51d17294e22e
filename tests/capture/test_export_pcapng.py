"""The pcapng export, read back by tshark."""

import ast
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dissected import dissect, said, sent
from review_evidence import Evidence

sys.path.append(str(Path(__file__).parents[1] / "contract"))

import transcript

from appliance.sansio import CLIENT
from capture.errors import ExportError
from capture.export import capturefile
from capture.export.packets import MOST_BYTES
from capture.frames import Kind, session_name
from capture.index_query import session as known_session
from capture.reader import Reader
from capture.records import (
    Alarm,
    Attributed,
    Detected,
    Gap,
    Hidden,
    SessionOpen,
    Tls,
    Withheld,
)

HERE = Path(capturefile.__file__).parent
PORT = "5432"


@pytest.fixture
def evidence(tmp_path):
    return Evidence(tmp_path)


def exported(evidence, path, *sessions):
    """Export sessions into a file, and return it."""
    file = path / "sessions.pcapng"
    with evidence.index() as index, file.open("wb") as output:
        reader = Reader(evidence.store, evidence.keys, index)
        chosen = [known_session(index, session) for session in sessions]
        output.writelines(capturefile.export(reader, chosen))
        reader.close()
    return file


def replay(gate, session, name):
    """Record a conversation of real programs as the gate would, its secrets hidden."""
    found = transcript.load(transcript.FOLDER / name)
    for piece in found.pieces:
        if piece.data is None:
            continue
        kind = Kind.UP if piece.side is CLIENT else Kind.DOWN
        start, data, hidden = gate.sent.get((session, kind), 0), piece.data, []
        for secret in found.secrets:
            for match in re.finditer(re.escape(secret), piece.data):
                hidden.append(
                    Hidden(piece.side.value, start + match.start(), len(secret), "password", "00")
                )
            data = data.replace(secret, bytes(len(secret)))
        gate.data(session, kind, data)
        for record in hidden:
            gate.record(session, record)
    return found


@pytest.mark.parametrize("name", ["psql-pg15", "psycopg-extended-pg18", "password-plain-pg15"])
def test_postgresql_is_dissected_with_its_queries(evidence, tmp_path, name):
    with evidence.writer() as gate:
        session = gate.open(protocol="postgresql")
        whole = replay(gate, session, f"postgresql/{name}.txt")
        gate.close(session, 1)
    packets = dissect(exported(evidence, tmp_path, session))
    queries = said(packets, "pgsql.query")
    assert queries
    for query in queries:
        assert query.encode() in whole.sent(CLIENT)
    carrying = [p["frame.protocols"][0] for p in packets if "tcp.payload" in p]
    assert carrying[0].endswith(":pgsql")  # where a message spans packets, the last one has it
    assert {protocols.rpartition(":")[2] for protocols in carrying} <= {"pgsql", "tcp"}
    assert not said(packets, "_ws.malformed")
    assert not said(packets, "tcp.analysis.flags")


def test_hidden_bytes_keep_their_length_and_are_named(evidence, tmp_path):
    with evidence.writer() as gate:
        session = gate.open(protocol="postgresql")
        whole = replay(gate, session, "postgresql/password-plain-pg15.txt")
        gate.close(session, 1)
    file = exported(evidence, tmp_path, session)
    assert whole.secrets
    up = whole.sent(CLIENT)
    for secret in whole.secrets:
        assert secret not in file.read_bytes()
        up = up.replace(secret, bytes(len(secret)))
    packets = dissect(file)
    client = packets[0]["tcp.srcport"][0]
    assert sent(packets, client) == up
    assert any("hidden and zero here" in said for said in said(packets, "frame.comment"))


def test_http_is_dissected_also_with_hidden_headers(evidence, tmp_path):
    request = b"GET /secret?token=%s HTTP/1.1\r\nHost: shop\r\nAuthorization: %s\r\n\r\n"
    with evidence.writer() as gate:
        session = gate.writer.new_session()
        gate.record(session, SessionOpen("2001:db8:1::10", 40000, "2001:db8:2::10", 80, "all",
                                         "write", "client", 0))  # fmt: skip
        gate.record(session, Attributed(None, "none", "none", "no-owner"))
        gate.record(session, Detected("http1"))
        gate.up(session, request % (bytes(9), bytes(20)))
        gate.record(session, Hidden("client", 18, 9, "parameter", "00"))
        gate.record(session, Hidden("client", 65, 20, "authorization", "00"))
        gate.down(session, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
        gate.close(session, 1)
    packets = dissect(exported(evidence, tmp_path, session))
    assert said(packets, "http.request.uri")
    assert said(packets, "http.response.code") == ["200"]
    assert said(packets, "ipv6.src")[0] == "2001:db8:1::10"
    assert not said(packets, "_ws.malformed")
    comments = "\n".join(said(packets, "frame.comment"))
    assert "20 bytes at 65 of what the client sent (authorization)" in comments


def test_opened_tls_is_written_as_plain_tcp_without_what_asked_for_it(evidence, tmp_path):
    with evidence.writer() as gate:
        session = gate.open(protocol="postgresql")
        gate.up(session, (8).to_bytes(4, "big") + (80877103).to_bytes(4, "big"))
        gate.down(session, b"S")
        gate.record(session, Tls("hello", "intercept", "db.test"))
        gate.record(
            session, Tls("established", "intercept", "db.test", client_version="TLSv1.3")
        )  # fmt: skip
        replay(gate, session, "postgresql/psql-pg15.txt")
        gate.close(session, 1)
    file = exported(evidence, tmp_path, session)
    packets = dissect(file)
    assert said(packets, "pgsql.query")
    assert not any("tls" in protocols for protocols in said(packets, "frame.protocols"))
    assert b"TLS was opened by the gate" in file.read_bytes()
    assert b"TLSv1.3, server name db.test" in file.read_bytes()
    assert not said(packets, "tcp.analysis.flags")


def test_the_owner_and_the_session_are_in_section_and_interface(evidence, tmp_path):
    with evidence.writer() as gate:
        first, second = gate.open(), gate.open(account=None, owner=None)
        gate.up(first, b"one")
        gate.up(second, b"two")
        gate.close(first)
        gate.close(second)
    file = exported(evidence, tmp_path, first, second)
    told = subprocess.run(["capinfos", str(file)], capture_output=True, text=True, check=True)
    for words in (session_name(first), "service account: ci-deployer", "assurance: kernel",
                  "owner: /usr/bin/psql pid 4242"):  # fmt: skip
        assert words in told.stdout, told.stdout
    content = file.read_bytes()
    assert content.count(b"service account: unknown (no-sensor)") == 2  # section and interface
    packets = dissect(file)
    for session in (first, second):
        assert f"Name = narrows-{session_name(session)}" in told.stdout
    assert said(packets, "frame.interface_name")[0] == f"narrows-{session_name(first)}"
    assert [p["tcp.payload"][0] for p in packets if "tcp.payload" in p] == [
        b"one".hex(), b"two".hex(),
    ]  # fmt: skip


def test_times_order_and_numbers_are_those_of_the_record(evidence, tmp_path):
    with evidence.writer() as gate:
        session = gate.open()
        for turn in range(20):
            gate.up(session, b"a" * (turn + 1))
            gate.down(session, b"b" * 5000)
        gate.close(session, reason="fin", by="upstream")
    packets = dissect(exported(evidence, tmp_path, session))
    recorded = [(k, at, len(body)) for _, s, k, at, _, body in evidence.frames()
                if s == session and k < 16]  # fmt: skip
    carried = [p for p in packets if "tcp.payload" in p]
    assert len(carried) == len(recorded)
    for packet, (kind, at, length) in zip(carried, recorded, strict=True):
        assert (packet["tcp.srcport"] == [PORT]) == (kind == Kind.DOWN)
        whole, _, part = packet["frame.time_epoch"][0].partition(".")
        assert int(whole) * 10**9 + int(part) == at
        assert packet["tcp.len"] == [str(length)]
    flags = [packet["tcp.flags.str"][0].replace("·", "") for packet in packets]
    assert flags[:3] == ["S", "AS", "A"]
    assert flags[-3:] == ["AF", "AF", "A"]
    assert packets[-3]["tcp.srcport"] == [PORT]  # who ended first
    for packet in packets:
        assert packet["tcp.checksum.status"] == ["1"]
        assert packet["ip.checksum.status"] == ["1"]
    assert not said(packets, "tcp.analysis.flags")


@pytest.mark.parametrize(
    ("reason", "by", "sender"),
    [("reset", "client", "client"), ("reset", "upstream", PORT), ("refused", "upstream", PORT)],
)
def test_a_reset_is_a_reset_of_the_side_that_sent_it(evidence, tmp_path, reason, by, sender):
    with evidence.writer() as gate:
        session = gate.open()
        gate.up(session, b"x")
        gate.close(session, reason=reason, by=by)
    packets = dissect(exported(evidence, tmp_path, session))
    assert "R" in packets[-1]["tcp.flags.str"][0]
    assert (packets[-1]["tcp.srcport"] == [PORT]) == (sender == PORT)
    assert f"the session ended: {reason} by {by}" in packets[-1]["frame.comment"][0]


def test_a_running_session_has_no_end_and_a_bare_one_is_a_handshake(evidence, tmp_path):
    with evidence.writer() as gate:
        session, lost = gate.open(), gate.writer.new_session()
        gate.up(lost, b"without a beginning")
        gate.commit()
        packets = dissect(exported(evidence, tmp_path, session))
        assert len(packets) == 3
        assert said(dissect(exported(evidence, tmp_path, lost)), "tcp.payload")


def test_what_is_missing_withheld_or_the_gates_own_is_told(evidence, tmp_path):
    with evidence.writer() as gate:
        session = gate.open()
        gate.up(session, b"first")
        gate.sent[session, Kind.UP] = 105
        gate.record(session, Gap("session", "evidence-unavailable", bytes_up=100))
        gate.up(session, b"third")
        gate.down(session, b"keep-secret-list-keep")
        gate.record(session, Withheld("upstream", 5, 11, "channel-binding"))
        gate.data(session, Kind.DOWN_OWN, b"own")
        gate.data(session, Kind.UP_OWN, b"never")
        gate.down(session, b"after")
        gate.record(session, Alarm("forged", {"why": "\x1b[2J"}))
        gate.close(session)
    packets = dissect(exported(evidence, tmp_path, session))
    client = packets[0]["tcp.srcport"][0]
    assert sent(packets, client) == b"first" + bytes(100) + b"third"
    assert sent(packets, PORT) == b"keep--keepownafter"
    comments = "\n".join(said(packets, "frame.comment"))
    for words in ("100 bytes before this were not recorded", "evidence-unavailable", "Alarm",
                  "11 bytes here were withheld: channel-binding", "3 bytes here are the gate's own"
                  ):  # fmt: skip
        assert words in comments, comments
    assert "\x1b" not in comments


def test_large_frames_fit_into_packets_and_numbers_wrap(evidence, tmp_path):
    with evidence.writer() as gate:
        session = gate.open()
        big = bytes(200_000)
        area = gate.writer.reserve(len(big))
        area[: len(big)] = big
        gate.writer.publish(Kind.UP, session, 0, len(big), time.time_ns())
        gate.sent[session, Kind.UP] = (1 << 32) - 10  # the rest was not recorded
        gate.up(session, b"x" * 30)
        gate.close(session)
    packets = dissect(exported(evidence, tmp_path, session))
    sizes = [int(p["tcp.len"][0]) for p in packets if "tcp.payload" in p]
    assert max(sizes) == MOST_BYTES
    assert sum(sizes) == len(big) + 30


def test_a_session_of_many_bytes_is_exported_in_bounded_memory(evidence):
    total = 200 << 20
    with evidence.writer() as gate:
        session = gate.open()
        while (at := gate.sent.get((session, Kind.DOWN), 0)) < total:
            area = gate.writer.reserve(256 << 10)
            if area is None:
                time.sleep(0.001)
                continue
            gate.writer.publish(Kind.DOWN, session, at, len(area), time.time_ns())
            gate.sent[session, Kind.DOWN] = at + len(area)
        gate.close(session)
    with evidence.index():
        pass  # filled here, not by the process that is measured
    code = f"""
import pathlib, resource, sys
sys.path.insert(0, {str(HERE.parents[1])!r})
from capture import index_query
from capture.crypt import Keys
from capture.export import capturefile
from capture.index import Index
from capture.reader import Reader
from capture.store import Store
store = Store(*map(pathlib.Path, {(str(evidence.store.state), str(evidence.store.run))!r}))
with Index.open(store.index) as index:
    reader = Reader(store, Keys.load(store.state), index, 4 << 20)
    print(sum(map(len, capturefile.export(reader, [index_query.session(index, {session})]))))
status = pathlib.Path("/proc/self/status").read_text()
print(status.partition("VmHWM:")[2].split()[0])  # maxrss would count what forked this
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100
    )
    written, mine, program = map(int, done.stdout.split())
    assert written > total
    assert mine < 100 << 10  # KiB, of 200 MiB that were read
    assert program < 160 << 10


def test_the_program_runs_as_a_module_and_refuses_what_is_no_input():
    argv = [sys.executable, "-m", "capture.export.pcapng"]
    good = json.dumps({"section": "s", "name": "n", "client": ["192.0.2.1", 1],
                       "target": ["192.0.2.2", 2]})  # fmt: skip
    done = subprocess.run(argv, input=f'{good}\n{{"end":true}}\n'.encode(), capture_output=True,
                          check=True, timeout=30)  # fmt: skip
    assert done.stdout.startswith(b"\x0a\x0d\x0d\x0a")
    for bad in (b"x\n", good.encode() + b"\n"):
        done = subprocess.run(argv, input=bad, capture_output=True, check=False, timeout=30)
        assert done.returncode == 1
        assert b"the input cannot be read" in done.stderr
        assert b"Traceback" not in done.stderr


def test_a_program_that_fails_or_stalls_is_told_and_ended():
    shell = ("/bin/sh", "-c")
    with pytest.raises(ExportError, match="scapy is missing"):
        list(capturefile.fed(iter([b"x" * 300_000]), (*shell, "echo scapy is missing >&2; exit 3")))
    with pytest.raises(ExportError, match="does not go on"):
        list(capturefile.fed(iter([b""]), (*shell, "exec sleep 60"), stall_s=0.1))
    words = "exec >&- 2>&- <&-; exec sleep 60"
    with pytest.raises(ExportError, match="does not end"):
        list(capturefile.fed(iter([b""]), (*shell, words), stall_s=0.1))


def test_a_reader_that_goes_away_ends_the_program(tmp_path):
    said = tmp_path / "pid"
    words = f"echo $$ >{said}; while echo x; do :; done"
    running = capturefile.fed(iter([]), ("/bin/sh", "-c", words))
    assert next(running)
    running.close()
    assert not Path(f"/proc/{said.read_text().strip()}").exists()


def test_the_program_stands_alone_and_nothing_imports_it():
    tree = ast.parse((HERE / "pcapng.py").read_text())
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            used |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            used.add(node.module.split(".")[0])
    assert used <= {*sys.stdlib_module_names, "scapy"}
    for package in ("appliance", "capture", "ebpf"):
        for file in (HERE.parents[1] / package).rglob("*.py"):
            assert not re.search(r"import.*\bpcapng\b", file.read_text()), file
