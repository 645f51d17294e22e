"""TLS that passes: what real handshakes show, with direct TLS and after PostgreSQL's SSLRequest."""

import pytest
from replay import Replay, run
from transcript import FOLDER, load

from appliance.protocols import discover
from appliance.sansio import CLIENT, UPSTREAM, Answer
from capture.records import Tls


def told(name, cut=None):
    """Return the Tls records of a recorded session."""
    return run(load(FOLDER / f"{name}.txt"), cut).of(Tls)


def test_up_to_tls_1_2_the_answer_is_read_with_the_certificate():
    hello, answered = told("tls/1.2")
    assert (hello.stage, hello.mode, hello.sni) == ("hello", "passthrough", "up.test")
    assert hello.alpn_offered == answered.alpn_offered == ("h2", "http/1.1")
    assert hello.ja4 == answered.ja4
    assert (answered.stage, answered.mode, answered.alpn) == ("answered", "passthrough", "http/1.1")
    assert answered.client_version == answered.upstream_version == "TLSv1.2"
    assert answered.client_cipher == answered.upstream_cipher == "ECDHE-ECDSA-AES256-GCM-SHA384"
    assert [each["subject"] for each in answered.chain] == ["CN=localhost"]
    assert not answered.certificate_asked
    assert answered.verified == ""


def test_that_a_client_certificate_was_asked_for_is_read():
    assert told("tls/1.2-asks")[1].certificate_asked


@pytest.mark.parametrize("name", ["tls/direct", "tls/1.3-retry", "postgresql/tls-pg15"])
def test_from_tls_1_3_on_version_and_cipher_are_all_there_is(name):
    hello, answered = told(name)
    assert (hello.stage, answered.stage) == ("hello", "answered")
    assert answered.upstream_version == "TLSv1.3"
    assert answered.upstream_cipher == "TLS_AES_256_GCM_SHA384"
    assert (answered.alpn, answered.chain) == ("", ())


def test_an_alert_in_the_clear_is_the_reason_why_it_failed():
    _, failed = told("tls/refused")
    assert (failed.stage, failed.by, failed.why) == ("failed", "upstream", "protocol version")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", None),
        (b"\x15\x03\x03\x00\x02\x02\xff", "alert 255"),
        (b"\x17\x03\x03\x00\x01\x00", "the answer is no ServerHello"),
        (b"\x16\x03\x03\x00\x08\x02\x00\x00\x04\x03\x03\x00\x00", None),
        (b"\x16\x03\x03\x00\x06\x0b\x00\x00\x02\x00\x09", None),
    ],
)
def test_an_answer_that_is_none_passes_all_the_same(answer, why):
    replay = Replay(discover()["tls"])
    hello = load(FOLDER / "tls/1.2.txt").pieces[0].data
    replay.feed(CLIENT, hello)
    replay.feed(UPSTREAM, answer)
    replay.feed(UPSTREAM, b"more")
    assert replay.relayed == {CLIENT: hello, UPSTREAM: answer + b"more"}
    assert replay.relay[UPSTREAM]
    assert [each.why for each in replay.of(Tls)[1:]] == ([] if why is None else [why])


def test_a_client_hello_is_claimed_only_when_it_is_whole():
    protocol = discover()["tls"]
    hello = load(FOLDER / "tls/1.2.txt").pieces[0].data
    assert {protocol.probe(hello[:length]) for length in range(len(hello))} == {Answer.MORE}
    assert protocol.probe(hello) is Answer.YES
