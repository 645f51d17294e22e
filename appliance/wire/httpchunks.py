"""Walks over a chunked body (RFC 9112, section 7.1) by its size lines, without looking at the data.

`appliance.wire.httprequests` and `appliance.wire.httpresponses` make one per chunked message. Size
lines and trailers are forwarded only when they are whole and valid, so that no server can read a
body's end where there is none.

    SIZE      a size line comes next
    DATA      `left` bytes of data, then CRLF
    TRAILERS  field lines, then an empty line
    DONE
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import TYPE_CHECKING

from appliance.wire.httphead import FieldReader, Malformed

if TYPE_CHECKING:
    from appliance.wire.httpsecrets import Span

MOST_SIZE_LINE_BYTES = 1_024
MOST_TRAILER_BYTES = 16 * 1024

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_EXTENSIONS = rb"(?:;" + _TOKEN + rb"(?:=(?:" + _TOKEN + rb'|"[\t !#-\[\]-~\x80-\xff]*"))?)*'
#: Size and extensions. Some servers write spaces after the size; a request must not.
_REQUEST_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})" + _EXTENSIONS)
_RESPONSE_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15}) *" + _EXTENSIONS)


class Part(IntEnum):
    """See the module's table."""

    SIZE = 0
    DATA = 1
    TRAILERS = 2
    DONE = 3


class Chunks:
    """Where one chunked body is."""

    __slots__ = ("_fields", "_size", "at", "data_bytes", "left", "part", "spans")

    def __init__(self, fields: FieldReader, *, request: bool) -> None:
        self._fields = fields
        self._size = _REQUEST_SIZE if request else _RESPONSE_SIZE
        self.part = Part.SIZE
        self.at = 0  #: where the part that `walk` broke off in, or raised at, begins
        self.left = 0  #: data bytes of the chunk that are still to come
        self.data_bytes = 0  #: data bytes of all chunks so far
        self.spans: list[Span] = []  #: secrets in the trailers, as positions in the last buffer

    def skip(self, length: int) -> None:
        """Note that `length` bytes of the chunk's data passed."""
        self.left -= length
        self.data_bytes += length

    def walk(self, buffer: bytes, at: int) -> int:
        """Return the position up to which `buffer` is decided, from `at` on. Raises Malformed.

        The rest, if any, is what is not whole yet, or the next message when `part` is DONE.
        """
        end = len(buffer)
        while True:
            self.at = before = at
            if self.part is Part.DATA:
                if self.left:
                    taken = min(self.left, end - at)
                    self.skip(taken)
                    self.at = at = at + taken
                if not self.left:
                    at = self._end_of_data(buffer, at)
            elif self.part is Part.SIZE:
                at = self._size_line(buffer, at)
            elif self.part is Part.TRAILERS:
                return self._trailers(buffer, at)
            if at == before:
                return at

    def _end_of_data(self, buffer: bytes, at: int) -> int:
        if buffer.startswith(b"\r\n", at):
            self.part = Part.SIZE
            return at + 2
        if buffer[at:] in (b"", b"\r"):
            return at
        raise Malformed("a chunk that is longer than its size")

    def _size_line(self, buffer: bytes, at: int) -> int:
        stop = buffer.find(b"\r\n", at, at + MOST_SIZE_LINE_BYTES)
        if stop < 0:
            if len(buffer) - at >= MOST_SIZE_LINE_BYTES or b"\n" in buffer[at:]:
                raise Malformed("a chunk without a size")
            return at
        match = self._size.fullmatch(buffer, at, stop)
        if match is None:
            raise Malformed("a chunk's size that is no plain number")
        self.left = int(match[1], 16)
        self.part = Part.DATA if self.left else Part.TRAILERS
        return stop + 2

    def _trailers(self, buffer: bytes, at: int) -> int:
        if buffer.startswith(b"\r\n", at):
            self.part = Part.DONE
            return at + 2
        stop = buffer.find(b"\r\n\r\n", at)
        if stop < 0:
            if len(buffer) - at > MOST_TRAILER_BYTES:
                raise Malformed("trailers that are too long", 431)
            return at
        fields = self._fields.read(buffer[at : stop + 2])
        if fields.length >= 0 or fields.coding or fields.host is not None:
            raise Malformed("a trailer that belongs into the head")
        self.spans = [(at + start, at + end, kind) for start, end, kind in fields.spans]
        self.part = Part.DONE
        return stop + 4
