"""ClientHello: what a TLS client asks for, before anything is encrypted (RFC 8446, section 4.1.2).

The gate reads it to know the server's name and the protocols that the client would speak; where TLS
passes, `appliance.wire.tlspassing` records it. Nothing here trusts it: lengths are checked, sizes
bounded, and a name that is none is "".
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from appliance.wire.tlsrecords import (
    CLIENT_HELLO,
    HANDSHAKE,
    HEADER_BYTES,
    MOST_RECORD_BYTES,
    Fields,
    Handshakes,
    NotTls,
    version_name,
)
from capture.records import Tls

MOST_HELLO_BYTES = 16 * 1024  #: records included; post-quantum key shares take about 2 KiB
_SERVER_NAME, _SIGNATURE_ALGORITHMS, _ALPN, _SUPPORTED_VERSIONS = 0, 13, 16, 43
_NAME = re.compile(rb"(?!-)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?")
_JA4_VERSIONS = {
    0x0304: "13", 0x0303: "12", 0x0302: "11", 0x0301: "10", 0x0300: "s3", 0x0002: "s2",
}  # fmt: skip
_NOTHING = "000000000000"
_OLD_HEAD_BYTES = 11  #: of a ClientHello in the form of SSL 2


@dataclass(frozen=True, slots=True)
class ClientHello:
    """One ClientHello; numbers are those of the IANA registries, GREASE included."""

    sni: str  #: host name, "" when there is none or it is no host name
    alpn: tuple[bytes, ...]  #: in the client's order
    versions: tuple[int, ...]  #: supported_versions, or the legacy version alone
    ciphers: tuple[int, ...]
    extensions: tuple[int, ...]
    signatures: tuple[int, ...]

    @property
    def ja4(self) -> str:
        """Return the JA4 fingerprint (FoxIO, "JA4: TLS Client Fingerprinting")."""
        ciphers = [each for each in self.ciphers if not _grease(each)]
        extensions = [each for each in self.extensions if not _grease(each)]
        highest = max((each for each in self.versions if not _grease(each)), default=0)
        head = "".join((
            "t", _JA4_VERSIONS.get(highest, "00"), "d" if _SERVER_NAME in extensions else "i",
            f"{min(len(ciphers), 99):02}", f"{min(len(extensions), 99):02}", self._ja4_alpn(),
        ))  # fmt: skip
        sorts = sorted(each for each in extensions if each not in (_SERVER_NAME, _ALPN))
        signatures = [each for each in self.signatures if not _grease(each)]
        told = _hex(sorts) + ("_" + _hex(signatures) if signatures else "")
        return f"{head}_{_cut(_hex(sorted(ciphers)))}_{_cut(told) if sorts else _NOTHING}"

    def _ja4_alpn(self) -> str:
        if not self.alpn or not self.alpn[0]:
            return "00"
        first = self.alpn[0]
        ends = bytes((first[0], first[-1]))
        if ends.isalnum():
            return ends.decode("ascii")
        return first.hex()[0] + first.hex()[-1]

    @property
    def version_names(self) -> tuple[str, ...]:
        """Return the offered versions by name, without GREASE."""
        return tuple(version_name(each) for each in self.versions if not _grease(each))


def parse(prefix: bytes) -> ClientHello | None:
    """Return the ClientHello that a client's first bytes begin with, None while it is not whole.

    Raises NotTls when they are none, or when it is longer than MOST_HELLO_BYTES.
    """
    if not may_begin(prefix):
        raise NotTls("no TLS handshake record")
    if prefix[:1] != b"\x16":
        if len(prefix) >= _OLD_HEAD_BYTES:
            raise NotTls("it has the form of SSL 2")
        return None
    if len(prefix) > 5 and prefix[5] != CLIENT_HELLO:
        raise NotTls("the handshake does not begin with ClientHello")
    handshakes = Handshakes(any_version=True)
    for _, body in handshakes.feed(prefix[:MOST_HELLO_BYTES]):
        return _client_hello(body)
    if handshakes.closed:
        raise NotTls("the ClientHello is cut")
    if len(prefix) >= MOST_HELLO_BYTES:
        raise NotTls("the ClientHello is too long")
    return None


def offer(hello: ClientHello, mode: str) -> Tls:
    """Return the record of what a client offers."""
    alpn = tuple(name.decode("utf-8", "backslashreplace") for name in hello.alpn)
    return Tls("hello", mode, hello.sni, alpn, hello.version_names, hello.ja4)


def may_begin(prefix: bytes) -> bool:
    """Say whether a client's first bytes may be those of a TLS handshake, in any form that some
    server takes: what is only TLS to the server would pass a gate that opens TLS unopened.
    """
    if prefix[:1] != b"\x16":
        return not prefix or _may_be_old(prefix)
    if len(prefix) < 3 or (prefix[1] == 3 and prefix[2] <= 4):
        return True
    # Servers ignore the record's version (RFC 8446, section 5.1: they must). Other protocols may
    # begin with these numbers, too, so the message has to look like a ClientHello as well.
    length = int.from_bytes(prefix[3:5], "big") if len(prefix) >= HEADER_BYTES else 4
    inside = (9, 3) if length > 4 else (HEADER_BYTES + length, HANDSHAKE)
    marks = ((HEADER_BYTES, CLIENT_HELLO), inside)
    return 0 < length <= MOST_RECORD_BYTES and all(
        prefix[at] == value for at, value in marks if at < len(prefix)
    )


def _may_be_old(prefix: bytes) -> bool:
    """Say the same of a ClientHello in the form of SSL 2 (RFC 5246, section E.2): two bytes of
    length with the highest bit set, the message type, the version, and three lengths.
    """
    if not prefix[0] & 0x80 or not (b"\x01\x03".startswith(prefix[2:4])):
        return False
    if len(prefix) < _OLD_HEAD_BYTES:
        return True
    length = int.from_bytes(prefix[:2], "big") & 0x7FFF
    ciphers, session, challenge = (int.from_bytes(prefix[at : at + 2], "big") for at in (5, 7, 9))
    return (
        ciphers % 3 == 0 < ciphers and 16 <= challenge <= 32
        and length + 2 == _OLD_HEAD_BYTES + ciphers + session + challenge
    )  # fmt: skip


def _client_hello(body: bytes) -> ClientHello:
    fields = Fields(body)
    legacy = fields.number(2)
    fields.take(32)
    fields.block(1)
    ciphers = fields.block(2).numbers()
    fields.block(1)
    found: dict[int, bytes] = {}
    extensions = fields.block(2) if len(fields) else Fields(b"")
    order = []
    while len(extensions):
        number = extensions.number(2)
        order.append(number)
        content = extensions.block(2).rest()
        if number in found:
            raise NotTls("an extension is there twice")
        found[number] = content
    versions: tuple[int, ...] = (legacy,)
    if _SUPPORTED_VERSIONS in found:
        versions = Fields(found[_SUPPORTED_VERSIONS]).block(1).numbers()
    return ClientHello(
        sni=_server_name(found.get(_SERVER_NAME, b"")),
        alpn=_protocols(found.get(_ALPN, b"")),
        versions=versions,
        ciphers=ciphers,
        extensions=tuple(order),
        signatures=_list(found.get(_SIGNATURE_ALGORITHMS, b"")),
    )


def _list(content: bytes) -> tuple[int, ...]:
    return Fields(content).block(2).numbers() if content else ()


def _server_name(content: bytes) -> str:
    """Return the host name of a server_name extension (RFC 6066, section 3)."""
    if not content:
        return ""
    names = Fields(content).block(2)
    while len(names):
        kind, name = names.number(1), names.block(2).rest()
        if kind == 0:
            fits = len(name) <= 253 and _NAME.fullmatch(name) is not None
            return name.decode("ascii").rstrip(".").lower() if fits else ""
    return ""


def _protocols(content: bytes) -> tuple[bytes, ...]:
    """Return the names of an ALPN extension (RFC 7301, section 3.1)."""
    if not content:
        return ()
    names = Fields(content).block(2)
    found = []
    while len(names):
        found.append(names.block(1).rest())
    return tuple(found)


def _grease(number: int) -> bool:
    """Say whether a number is one that means nothing on purpose (RFC 8701)."""
    return number & 0x0F0F == 0x0A0A and number >> 8 == number & 0xFF


def _hex(numbers: list[int]) -> str:
    return ",".join(f"{each:04x}" for each in numbers)


def _cut(text: str) -> str:
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:12] if text else _NOTHING
