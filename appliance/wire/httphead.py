"""HTTP/1.1 heads: one strict reading of a request's or response's first lines, and what they mean.

`appliance.wire.httprequests` and `appliance.wire.httpresponses` give whole heads; nothing here
keeps bytes. The gate forwards a head unchanged, so whatever two parsers could read differently is
`Malformed`: a smuggled request lives from that difference. Grammar: RFC 9112, sections 2 to 7,
without the leniencies that it allows to a recipient:

* lines end with CRLF, never with LF or CR alone; no NUL, no other control character;
* a field name is a token that the colon follows at once; no line goes on with a space (obs-fold);
* Content-Length stands once and is plain digits; Transfer-Encoding stands once and ends in
  `chunked`; never both, never in HTTP/1.0; nor does a name stand that some servers take for one of
  them ("Content_Length");
* Connection names neither of them, nor Host (a proxy behind would remove it);
* at most one Host.

llhttp, by way of httptools, is asked as well, and must accept the same lines: what one parser is
blind to, the other is not likely to be. It is no more than that second opinion, as it tells neither
where a field stands, which hiding needs, nor where a message ends, and knows some methods only.

A `FieldReader` remembers how names are read, never values.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

from appliance.wire.httpsecrets import Secrets, may_hold_parameters, redact, scheme

if TYPE_CHECKING:
    from collections.abc import Sequence

    from appliance.wire.httpsecrets import Span

IN_CHUNKS = -1  #: "length" of a body that comes in chunks
TO_THE_END = -2  #: "length" of a body that ends with the connection
MOST_FIELDS = 256
MOST_NAME_BYTES = 256
MOST_FACT_CHARS = 256

_TOKEN = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
#: What a line may hold: tab, printable ASCII, obs-text.
_LINE_BYTES = bytes(byte for byte in range(256) if byte == 9 or (byte >= 32 and byte != 127))
_NOT_A_LETTER = re.compile(rb"[^a-z]")
_FRAMING = {b"content-length": b"Content-Length", b"transfer-encoding": b"Transfer-Encoding"}
_USUAL_CONNECTIONS = frozenset({b"keep-alive", b"Keep-Alive", b"close", b"Upgrade", b"upgrade"})
_NO_CALLBACKS = object()
_MOST_NAMES = 2_048
_MOST_KEPT_NAME_BYTES = 64

#: Headers that a record shows. Their values are cut at MOST_FACT_CHARS, secrets in them hidden.
FACTS = frozenset({
    "content-disposition", "content-encoding", "content-range", "content-type", "destination",
    "etag", "forwarded", "idempotency-key", "location", "origin", "range", "referer",
    "retry-after", "server", "soapaction", "traceparent", "user-agent", "via", "www-authenticate",
    "x-amz-request-id", "x-amz-target", "x-correlation-id", "x-forwarded-for",
    "x-http-method-override", "x-request-id",
})  # fmt: skip

# What a field means to the reader.
(_PLAIN, _FACT, _SECRET, _LENGTH, _CODING, _CONNECTION, _HOST, _UPGRADE) = range(8)
_ROLES = {
    "content-length": _LENGTH, "transfer-encoding": _CODING, "connection": _CONNECTION,
    "proxy-connection": _PLAIN, "host": _HOST, "upgrade": _UPGRADE,
}  # fmt: skip


class Malformed(Exception):
    """A message that must not be passed on; `status` is the native answer to a request."""

    def __init__(self, reason: str, status: int = 400) -> None:
        super().__init__(reason)
        self.status = status


class Fields:
    """What the field lines of one head say."""

    __slots__ = (
        "coding", "credentials", "facts", "host", "length", "padded", "spans", "upgrade",
    )  # fmt: skip

    def __init__(self) -> None:
        self.length = -1  #: Content-Length, -1 when there is none
        self.padded = False  #: it begins with a zero that it does not need
        self.coding = b""  #: Transfer-Encoding, lower case; it ends in "chunked"
        self.host: str | None = None  #: lower case
        self.upgrade = ""
        self.facts: dict[str, str] = {}
        self.credentials: tuple[tuple[str, str, bytes], ...] = ()  #: (header, scheme, secret)
        self.spans: Sequence[Span] = ()  #: secrets, from the first field line on


class FieldReader:
    """Reads field lines. One per process and configuration."""

    __slots__ = ("_names", "secrets")

    def __init__(self, secrets: Secrets) -> None:
        self.secrets = secrets
        self._names: dict[bytes, tuple[str, int]] = {}

    def read(self, block: bytes) -> Fields:
        """Return what field lines mean, each with its CRLF. Raises Malformed."""
        check_lines(block)
        lines = block.split(b"\r\n")
        if len(lines) > MOST_FIELDS + 1:
            raise Malformed("too many header fields", 431)
        fields = Fields()
        spans = self.secrets.in_text(block) if may_hold_parameters(block) else None
        facts, names = fields.facts, self._names
        lines.pop()
        for line in lines:
            name, colon, value = line.partition(b":")
            found = names.get(name)
            if found is None or not colon:
                found = self._learn(name, line)
            key, role = found
            if role == _PLAIN:
                continue
            value = value.strip(b" \t")
            if role == _FACT:
                text = self._shown(value) if spans else _text(value)
                facts[key] = f"{facts[key]}, {text}"[:MOST_FACT_CHARS] if key in facts else text
            elif role == _SECRET:
                shown = scheme(value)
                credential = (key, shown.decode().strip(), value[len(shown) :])
                fields.credentials = (*fields.credentials, credential)
            else:
                _READERS[role](fields, value)
        if fields.coding and fields.length >= 0:
            raise Malformed("both Content-Length and Transfer-Encoding")
        _ask_llhttp(block)
        if fields.credentials:
            spans = self.secrets.in_lines(block[:-2])
        if spans:
            fields.spans = spans
        return fields

    def check(self, line: bytes) -> None:
        """Raise Malformed unless `line` is a field line, or the beginning of one."""
        name, colon, _ = line.partition(b":")
        if len(name) > MOST_NAME_BYTES:
            raise Malformed("a header name that is too long", 431)
        if colon or name[:1] in (b" ", b"\t"):
            if name not in self._names:
                self._learn(name, line)
        elif name.translate(None, _TOKEN):
            raise Malformed("a header name that is no token")

    def _learn(self, name: bytes, line: bytes) -> tuple[str, int]:
        """Return what a field name means when it was not seen before. Raises Malformed."""
        if line[:1] in (b" ", b"\t"):
            raise Malformed("a header line that begins with a space")
        if len(name) == len(line):
            raise Malformed("a header line without a colon")
        if not name or name.translate(None, _TOKEN):
            raise Malformed("a header name that is no token")
        if len(name) > MOST_NAME_BYTES:
            raise Malformed("a header name that is too long", 431)
        lower = name.lower()
        meant = _FRAMING.get(_NOT_A_LETTER.sub(b"-", lower))
        if meant is not None and lower not in _FRAMING:
            raise Malformed(f"a header name that some take for {meant.decode()}")
        key = lower.decode()
        role = _ROLES.get(key, _FACT if key in FACTS else _PLAIN)
        if key in self.secrets.headers and role in (_PLAIN, _FACT):
            role = _SECRET
        if len(name) <= _MOST_KEPT_NAME_BYTES and len(self._names) < _MOST_NAMES:
            self._names[name] = (key, role)
        return key, role

    def _shown(self, value: bytes) -> str:
        return _text(redact(value, self.secrets.in_text(value)))


def _ask_llhttp(block: bytes) -> None:
    """Raise Malformed when llhttp does not accept the lines of `block` in a head."""
    try:
        HttpRequestParser(_NO_CALLBACKS).feed_data(b"POST / HTTP/1.1\r\n" + block + b"\r\n")
    except HttpParserUpgrade:
        pass  # it would go on with another protocol: an Upgrade header is there
    except HttpParserError as wrong:
        raise Malformed(f"a head that llhttp refuses: {wrong}") from wrong


def _text(value: bytes) -> str:
    try:
        text = value.decode()
    except UnicodeDecodeError:
        text = value.decode("utf-8", "backslashreplace")
    return text if len(text) <= MOST_FACT_CHARS else text[:MOST_FACT_CHARS]


def check_lines(block: bytes) -> None:
    """Raise Malformed unless every CR and LF of `block` is part of a CRLF and no other control
    character is there.
    """
    left = block.translate(None, _LINE_BYTES)
    if len(left) != 2 * block.count(b"\r\n"):
        for byte, reason in ((b"\0", "a NUL"), (b"\n", "a bare LF"), (b"\r", "a bare CR")):
            if left.replace(b"\r\n", b"").count(byte):
                raise Malformed(f"{reason} in a head")
        raise Malformed("a control character in a head")


def _read_length(fields: Fields, value: bytes) -> None:
    if fields.length >= 0:
        raise Malformed("more than one Content-Length")
    if not value.isdigit() or len(value) > 18:
        raise Malformed("a Content-Length that is no plain number")
    fields.length = int(value)
    fields.padded = len(value) > 1 and value[:1] == b"0"


def _read_coding(fields: Fields, value: bytes) -> None:
    if fields.coding:
        raise Malformed("more than one Transfer-Encoding")
    fields.coding = value.lower()
    codings = [coding.strip(b" \t") for coding in fields.coding.split(b",")]
    if codings[-1] != b"chunked" or codings.count(b"chunked") > 1:
        raise Malformed("a Transfer-Encoding that does not end in chunked")


def _read_connection(_fields: Fields, value: bytes) -> None:
    if value in _USUAL_CONNECTIONS:
        return
    for option in value.lower().split(b","):
        word = option.strip(b" \t")
        if word in _FRAMING or word == b"host":
            raise Malformed(f"Connection names {word.decode()}")


def _read_host(fields: Fields, value: bytes) -> None:
    if fields.host is not None:
        raise Malformed("more than one Host")
    if len(value) > MOST_NAME_BYTES:
        raise Malformed("a Host that is too long")
    fields.host = value.lower().decode("utf-8", "backslashreplace")


def _read_upgrade(fields: Fields, value: bytes) -> None:
    text = value.decode("utf-8", "backslashreplace")
    fields.upgrade = f"{fields.upgrade}, {text}" if fields.upgrade else text


_READERS = {
    _LENGTH: _read_length, _CODING: _read_coding, _CONNECTION: _read_connection,
    _HOST: _read_host, _UPGRADE: _read_upgrade,
}  # fmt: skip
