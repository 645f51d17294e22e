"""ClientHello: read from real clients, in any pieces, and from junk."""

import ssl

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.wire import clienthello
from appliance.wire.clienthello import ClientHello, may_begin, parse
from appliance.wire.tlsrecords import NotTls


def offered(name="up.test", alpn=("h2", "http/1.1"), version=None):
    """Return the first bytes of OpenSSL as a client."""
    context = ssl.create_default_context()
    if alpn:
        context.set_alpn_protocols(list(alpn))
    if version:
        context.maximum_version = version
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


def test_what_a_real_client_offers_is_read():
    hello = parse(offered())
    assert hello.sni == "up.test"
    assert hello.alpn == (b"h2", b"http/1.1")
    assert hello.version_names[:2] == ("TLSv1.3", "TLSv1.2")
    assert hello.ja4.startswith("t13d")
    assert "h2_" in hello.ja4


def test_a_client_without_name_and_protocols_and_with_an_old_version_is_read():
    hello = parse(offered("192.0.2.1", (), ssl.TLSVersion.TLSv1_2))
    assert (hello.sni, hello.alpn, hello.version_names[0]) == ("", (), "TLSv1.2")
    assert hello.ja4.startswith("t12i")
    assert hello.ja4.split("_")[0].endswith("00")


def test_ja4_is_that_of_its_authors_example():
    ciphers = "1301 1302 1303 c02b c02f c02c c030 cca9 cca8 c013 c014 009c 009d 002f 0035"
    extensions = "001b 0000 0033 0010 4469 0017 002d 000d 0005 0023 0012 002b ff01 000b 000a 0015"
    signatures = "0403 0804 0401 0503 0805 0501 0806 0601"

    def numbers(text):
        return tuple(int(each, 16) for each in text.split())

    hello = ClientHello(
        "x.test", (b"h2", b"http/1.1"), (0x5A5A, 0x0304, 0x0303), (0x3A3A, *numbers(ciphers)),
        (0x7A7A, *numbers(extensions)), numbers(signatures),
    )  # fmt: skip
    assert hello.ja4 == "t13d1516h2_8daaf6152771_e5627efa2ab1"


def test_it_is_read_over_many_records_and_not_before_it_is_whole():
    whole = offered()
    body = whole[5:]
    pieces = [body[at : at + 50] for at in range(0, len(body), 50)]
    records = b"".join(b"\x16\x03\x01" + len(p).to_bytes(2, "big") + p for p in pieces)
    for length in range(len(records)):
        assert parse(records[:length]) is None
    assert parse(records) == parse(whole) == parse(records + b"more")


@pytest.mark.parametrize(
    "prefix",
    [b"GET / HTTP/1.1\r\n", b"\x16\x02\x01\x00\x05\x02", b"\0\0\0\x08\x04\xd2\x16\x2f", b"SSH-2.0"],
)
def test_what_is_no_tls_is_told_apart_at_once(prefix):
    assert not may_begin(prefix)
    with pytest.raises(NotTls):
        parse(prefix)


def cut(hello, first):
    """Return a hello of which the first record has `first` bytes, the second all others."""
    body = hello[5:]
    pieces = body[:first], body[first:]
    return b"".join(hello[:3] + len(piece).to_bytes(2, "big") + piece for piece in pieces)


@pytest.mark.parametrize("version", [b"\x03\x7f", b"\x03\xff", b"\x05\x00", b"\x0f\x0f"])
@pytest.mark.parametrize("first", [1, 2, 4, 5, 100])
def test_the_version_of_a_record_is_ignored_as_servers_ignore_it(version, first):
    whole = offered()
    odd = b"\x16" + version + whole[3:]
    for hello in (odd, cut(odd, first)):
        assert all(may_begin(hello[:length]) for length in range(len(hello)))
        assert parse(hello) == parse(whole)


@pytest.mark.parametrize(
    "other",
    [
        b"\x16\x05\0\0\x50\x02",  # not a ClientHello
        b"\x16\0\0\0\x03SELECT",  # 22 bytes, as a little-endian length
        b"\x16\0\0\0\0\x01",
        b"\x16\x05\0\xff\xff",
        b"\x16\x05\0\x01\0\x01\0\0\xfc\x02",
        b"\x16\x05\0\0\x01\x01\x17",
    ],
)
def test_what_only_begins_with_that_number_is_told_apart(other):
    assert not may_begin(other)


def old_form(ciphers=6, challenge=32):
    """Return a ClientHello in the form of SSL 2, which asks for TLS 1.2."""
    head = b"\x01\x03\x03" + b"".join(
        n.to_bytes(2, "big") for n in (ciphers, 0, challenge)
    )  # fmt: skip
    rest = bytes(ciphers) + bytes(challenge)
    return (0x8000 | len(head) + len(rest)).to_bytes(2, "big") + head + rest


def test_the_form_of_ssl_2_is_known_and_refused():
    hello = old_form()
    for length in range(len(hello)):
        assert may_begin(hello[:length])
    with pytest.raises(NotTls, match="SSL 2"):
        parse(hello)
    assert parse(hello[:10]) is None
    for other in (old_form(7), old_form(0), old_form(6, 8), hello[:2] + b"\x02" + hello[3:]):
        assert not may_begin(other)


def test_names_that_are_none_are_not_taken():
    whole = offered()
    for name in (b"up.t\0st", b"-p.test", b"up..est", b"up test", b"\xffp.test"):
        assert parse(whole.replace(b"up.test", name)).sni == ""
    assert parse(whole.replace(b"up.test", b"UP.TEST")).sni == "up.test"


def test_a_hello_that_never_ends_is_refused():
    begun = b"\x16\x03\x01\x40\x00\x01\x00\xf0\x00" + bytes(0x4000 - 4)
    with pytest.raises(NotTls, match="too long"):
        parse(begun + begun[:5] + bytes(clienthello.MOST_HELLO_BYTES))


@settings(deadline=None, max_examples=500)
@given(data=st.data())
def test_a_mutated_hello_raises_nothing_else(data):
    changed = bytearray(offered())
    for _ in range(data.draw(st.integers(1, 5))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    try:
        hello = parse(bytes(changed))
    except NotTls:
        return
    if hello is not None:
        assert len(hello.ja4.split("_")) == 3
