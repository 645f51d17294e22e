"""TLS records and handshake messages in the clear, cut as the peer likes (RFC 8446, section 5.1).

`appliance.wire.clienthello` and `appliance.wire.tlspassing` use it on bytes that nobody has
decrypted: the first flight of a TLS 1.3 session, the whole handshake of an older one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

CHANGE_CIPHER_SPEC, ALERT, HANDSHAKE, APPLICATION_DATA = 20, 21, 22, 23
CLIENT_HELLO, SERVER_HELLO, CERTIFICATE, CERTIFICATE_REQUEST, SERVER_HELLO_DONE = 1, 2, 11, 13, 14
HEADER_BYTES = 5
MOST_RECORD_BYTES = (1 << 14) + 256  #: of an unencrypted record, some room for old servers
MOST_MESSAGE_BYTES = 1 << 17  #: a certificate chain; OpenSSL's own limit is 100 KiB

_VERSION_NAMES = {0x0304: "TLSv1.3", 0x0303: "TLSv1.2", 0x0302: "TLSv1.1", 0x0301: "TLSv1"}


class NotTls(Exception):
    """The bytes are no TLS handshake."""


class Handshakes:
    """Puts the handshake messages of one side together; keeps at most one message."""

    __slots__ = ("_any_version", "_body", "_record", "alert", "closed")

    def __init__(self, *, any_version: bool = False) -> None:
        """With `any_version` the first byte of a record's version may be any, as for some servers
        (RFC 8446, section 5.1).
        """
        self._any_version = any_version
        self._record = bytearray()
        self._body = bytearray()
        #: what follows is encrypted, or no handshake
        self.closed = False
        self.alert = 0  #: number of the alert that ended it

    def feed(self, data: bytes | memoryview) -> Iterator[tuple[int, bytes]]:
        """Yield (type, body) of each message that is whole now. Raises NotTls."""
        record = self._record
        record += data
        while not self.closed and len(record) >= HEADER_BYTES:
            kind, major = record[0], record[1]
            length = int.from_bytes(record[3:5], "big")
            known = CHANGE_CIPHER_SPEC <= kind <= APPLICATION_DATA
            if not known or (major != 3 and not self._any_version):
                raise NotTls("not a TLS record")
            if kind == ALERT and length == 2 and len(record) < HEADER_BYTES + length:
                return
            if kind != HANDSHAKE:
                self.alert = record[6] if kind == ALERT and length == 2 else 0
                self._close()
                return
            if not 0 < length <= MOST_RECORD_BYTES:
                raise NotTls(f"a handshake record has {length} bytes")
            if len(record) < HEADER_BYTES + length:
                return
            self._body += record[HEADER_BYTES : HEADER_BYTES + length]
            del record[: HEADER_BYTES + length]
            yield from self._messages()

    def _messages(self) -> Iterator[tuple[int, bytes]]:
        body = self._body
        while len(body) >= 4:
            length = int.from_bytes(body[1:4], "big")
            if length > MOST_MESSAGE_BYTES:
                raise NotTls(f"a handshake message has {length} bytes")
            if len(body) < 4 + length:
                return
            message = body[0], bytes(body[4 : 4 + length])
            del body[: 4 + length]
            yield message

    def _close(self) -> None:
        self.closed = True
        self._record.clear()
        self._body.clear()


class Fields:
    """Reads length-prefixed fields; NotTls when they do not fit."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __len__(self) -> int:
        return len(self._data) - self._at

    def take(self, length: int) -> bytes:
        """Return the next `length` bytes."""
        if length > len(self):
            raise NotTls("a field is longer than its message")
        self._at += length
        return self._data[self._at - length : self._at]

    def rest(self) -> bytes:
        """Return everything that is left."""
        return self.take(len(self))

    def number(self, width: int) -> int:
        """Return the next number of `width` bytes."""
        return int.from_bytes(self.take(width), "big")

    def block(self, width: int) -> Fields:
        """Return the field that begins with its length in `width` bytes."""
        return Fields(self.take(self.number(width)))

    def numbers(self, width: int = 2) -> tuple[int, ...]:
        """Return everything that is left as numbers of `width` bytes."""
        if len(self) % width:
            raise NotTls("a list has half an entry")
        return tuple(self.number(width) for _ in range(len(self) // width))


def certificates(body: bytes, *, thirteen: bool) -> tuple[bytes, ...]:
    """Return the DER certificates of a Certificate message, the peer's own first. Raises NotTls."""
    fields = Fields(body)
    if thirteen:
        fields.block(1)
    chain = fields.block(3)
    found = []
    while len(chain):
        found.append(chain.block(3).rest())
        if thirteen:
            chain.block(2)
    return tuple(found)


def version_name(number: int) -> str:
    """Return OpenSSL's name of a protocol version."""
    return _VERSION_NAMES.get(number, f"0x{number:04x}")
