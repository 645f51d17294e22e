"""HTTP/1.1, decoded and recorded, in the clear and with TLS opened, against haproxy."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.lab.topology import SERVER4
from bench.capture_check import BULK_BODY_BYTES, SMALL, pattern
from bench.runs import DIRECT, Load, Work, interleaved
from bench.web_client import BULK_PATH, NAME, SMALL_PATH

if TYPE_CHECKING:
    from bench.report import Report
    from bench.stage import Stage

HERE = Path(__file__).parent
PLAIN_PORT, TLS_PORT = 8080, 8443
HTTP_PEER, TLS_PEER = "haproxy-http", "haproxy-tls"
PEER_PORTS = {HTTP_PEER: 15013, TLS_PEER: 15014}
CONNECTIONS = 16
RUN_S = 2.0
GOAL = 0.5


def http(stage: Stage, report: Report, rounds: int) -> None:
    """GET of 100 bytes on 16 connections that stay."""
    _start(stage)
    _measure(stage, report, rounds, _requests(stage, "http", "keep"), HTTP_PEER)


def tls(stage: Stage, report: Report, rounds: int) -> None:
    """The same with TLS on both sides; one request a connection; and 100 MB as one answer."""
    _start(stage)
    _measure(stage, report, rounds, _requests(stage, "tls", "keep"), TLS_PEER)
    _measure(stage, report, rounds, _requests(stage, "tls connect", "connect"), TLS_PEER)
    _measure(stage, report, rounds, _bulk(stage), TLS_PEER)


def _measure(stage: Stage, report: Report, rounds: int, work: Work, peer: str) -> None:
    interleaved(stage, report, work, rounds)
    report.capacity(work.name, work.cost, peer, GOAL)


def _requests(stage: Stage, name: str, mode: str) -> Work:
    secure = name.startswith("tls")

    def run(path: str) -> Load:
        answer = _client(stage, mode, str(CONNECTIONS), str(RUN_S), secure=secure)
        if path == "gate":
            stage.sent.requests += answer["requests"]
        extra = {"us p50": answer["p50_us"], "us p99": answer["p99_us"]}
        return Load(answer["requests"], answer["seconds"], extra)

    unit, plural = "request", "requests"
    if mode == "connect":
        unit, plural = "connection", "connections"
    paths = (TLS_PEER if secure else HTTP_PEER, "gate", DIRECT)
    return Work(name, unit, plural, ("us", 1e6), paths, run)


def _bulk(stage: Stage) -> Work:
    def run(path: str) -> Load:
        answer = _client(stage, "bulk", secure=True)
        if path == "gate":
            stage.sent.pages += 1
        return Load(BULK_BODY_BYTES / 1e9, answer["seconds"])

    return Work("tls bulk", "GB", "GB", ("s", 1.0), (TLS_PEER, "gate", DIRECT), run)


def _client(stage: Stage, mode: str, *words: str, secure: bool) -> dict[str, float]:
    port, trusted = (TLS_PORT, str(_trusted(stage))) if secure else (PLAIN_PORT, "-")
    argv = [sys.executable, str(HERE / "web_client.py"), mode, SERVER4, str(port), trusted, *words]
    answer: dict[str, float] = json.loads(stage.client(argv))
    return answer


def _trusted(stage: Stage) -> Path:
    return stage.place.disk / "web" / "trusted.pem"


def _start(stage: Stage) -> None:
    """Start nginx and its haproxies; once."""
    folder = stage.place.disk / "web"
    if folder.exists():
        return
    (folder / "www").mkdir(parents=True)
    leaf = stage.authority.leaf((NAME,))
    certificate = folder / "server.pem"
    certificate.touch(mode=0o600)
    certificate.write_bytes(leaf.chain + leaf.key)
    authority = stage.certificates / "ca.pem"
    gate = stage.lab.config.paths.state / "ca.pem"
    _trusted(stage).write_bytes(authority.read_bytes() + gate.read_bytes())
    piece = pattern()
    (folder / "www" / SMALL_PATH[1:]).write_bytes(piece[:SMALL])
    with (folder / "www" / BULK_PATH[1:]).open("wb") as file:
        for _ in range(BULK_BODY_BYTES // len(piece)):
            file.write(piece)
    words = {"FOLDER": folder, "CERTIFICATE": certificate, "AUTHORITY": authority,
             "PLAIN": PLAIN_PORT, "SECURE": TLS_PORT}  # fmt: skip
    config = folder / "nginx.conf"
    config.write_text(_filled("nginx.conf", words), encoding="utf-8")
    stage.start("nginx", "server", ["nginx", "-e", "stderr", "-c", str(config)])
    stage.use(DIRECT)
    stage.wait_for(lambda: stage.accepts("client", SERVER4, TLS_PORT), "nginx")
    for peer, port in PEER_PORTS.items():
        stage.start_haproxy(peer, port, _filled(f"{peer}.cfg", words))
        stage.use(peer)
        stage.wait_for(lambda: stage.accepts("client", SERVER4, PLAIN_PORT), peer)


def _filled(template: str, words: dict[str, object]) -> str:
    text = (HERE / "peers" / template).read_text(encoding="utf-8")
    for word, value in words.items():
        text = text.replace(word, str(value))
    return text
