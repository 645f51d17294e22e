"""What a TLS server answers in the clear: ServerHello, and up to TLS 1.2 its certificates.

`appliance.wire.tlspassing` reads it where nobody opens TLS (RFC 8446, section 4.1.3; RFC 5246,
section 7.4). From TLS 1.3 on everything after ServerHello is encrypted.
"""

from __future__ import annotations

from dataclasses import dataclass

from appliance.wire.tlsrecords import Fields, version_name

_ALPN, _SUPPORTED_VERSIONS = 16, 43
_TLS_1_3 = 0x0304
#: OpenSSL's names, which are those of intercepted sessions; what is missing is shown as a number.
_CIPHERS = {
    0x002F: "AES128-SHA", 0x0035: "AES256-SHA", 0x003C: "AES128-SHA256", 0x003D: "AES256-SHA256",
    0x0033: "DHE-RSA-AES128-SHA", 0x0039: "DHE-RSA-AES256-SHA",
    0x0067: "DHE-RSA-AES128-SHA256", 0x006B: "DHE-RSA-AES256-SHA256",
    0x009C: "AES128-GCM-SHA256", 0x009D: "AES256-GCM-SHA384",
    0x009E: "DHE-RSA-AES128-GCM-SHA256", 0x009F: "DHE-RSA-AES256-GCM-SHA384",
    0x1301: "TLS_AES_128_GCM_SHA256", 0x1302: "TLS_AES_256_GCM_SHA384",
    0x1303: "TLS_CHACHA20_POLY1305_SHA256",
    0xC009: "ECDHE-ECDSA-AES128-SHA", 0xC00A: "ECDHE-ECDSA-AES256-SHA",
    0xC013: "ECDHE-RSA-AES128-SHA", 0xC014: "ECDHE-RSA-AES256-SHA",
    0xC023: "ECDHE-ECDSA-AES128-SHA256", 0xC024: "ECDHE-ECDSA-AES256-SHA384",
    0xC027: "ECDHE-RSA-AES128-SHA256", 0xC028: "ECDHE-RSA-AES256-SHA384",
    0xC02B: "ECDHE-ECDSA-AES128-GCM-SHA256", 0xC02C: "ECDHE-ECDSA-AES256-GCM-SHA384",
    0xC02F: "ECDHE-RSA-AES128-GCM-SHA256", 0xC030: "ECDHE-RSA-AES256-GCM-SHA384",
    0xCCA8: "ECDHE-RSA-CHACHA20-POLY1305", 0xCCA9: "ECDHE-ECDSA-CHACHA20-POLY1305",
    0xCCAA: "DHE-RSA-CHACHA20-POLY1305",
}  # fmt: skip
#: RFC 8446, section 6, and RFC 5246, section 7.2: OpenSSL's words for what may come in the clear.
_ALERTS = {
    10: "unexpected message", 20: "bad record mac", 40: "handshake failure", 42: "bad certificate",
    43: "unsupported certificate", 44: "certificate revoked", 45: "certificate expired",
    46: "certificate unknown", 47: "illegal parameter", 48: "unknown ca", 49: "access denied",
    50: "decode error", 51: "decrypt error", 70: "protocol version", 71: "insufficient security",
    80: "internal error", 86: "inappropriate fallback", 112: "unrecognized name",
    120: "no application protocol",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ServerHello:
    """What a server chose."""

    version: str  #: "TLSv1.3", ...
    cipher: str
    alpn: str  #: "" from TLS 1.3 on, where it is encrypted
    encrypted: bool  #: nothing that follows is readable


def server_hello(body: bytes) -> ServerHello:
    """Return what a ServerHello, or a HelloRetryRequest, says. Raises NotTls."""
    fields = Fields(body)
    version = fields.number(2)
    fields.take(32)
    fields.block(1)
    cipher = fields.number(2)
    fields.take(1)
    alpn = b""
    extensions = fields.block(2) if len(fields) else Fields(b"")
    while len(extensions):
        number, content = extensions.number(2), extensions.block(2)
        if number == _SUPPORTED_VERSIONS:
            version = content.number(2)
        elif number == _ALPN:
            alpn = content.block(2).block(1).rest()
    return ServerHello(
        version_name(version), _CIPHERS.get(cipher, f"0x{cipher:04x}"),
        alpn.decode("utf-8", "backslashreplace"), encrypted=version >= _TLS_1_3,
    )  # fmt: skip


def alert(number: int) -> str:
    """Return what an alert says."""
    return _ALERTS.get(number, f"alert {number}")
