"""Peer bytes and texts as a terminal can show them: nothing that a peer sent is ever printed as is.

Control characters (also the newer ones from U+0080 on), line breaks, marks that turn the direction
of writing, invisible and unassigned characters become backslash escapes, and a backslash becomes
two, so that an escape cannot be imitated.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

LINE_BYTES = 16  #: in a line of a hex dump
_LINE_CHARS = 200  #: a longer line of text is broken

_SHORT = {"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_PLAIN = re.compile(r"[ -\[\]-~]*")
_LINES = re.compile(r"[^\n]*\n|[^\n]+")
_TEXT_BYTES = frozenset(range(32, 127)) | frozenset(b"\t\r\n")


def printable(text: str) -> str:
    """Return `text` on one line, everything but printable characters and spaces escaped."""
    if _PLAIN.fullmatch(text):
        return text
    return "".join(map(_escaped, text))


def _escaped(letter: str) -> str:
    if letter in _SHORT:
        return _SHORT[letter]
    if letter.isprintable():
        return letter
    code = ord(letter)
    if code < 0x80 or 0xDC80 <= code <= 0xDCFF:  # ASCII, or a byte that is not UTF-8
        return f"\\x{code & 0xFF:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def lines(text: str) -> Iterator[str]:
    """Yield `text` escaped, broken after its (escaped) line breaks, and where it is long.

    The caller puts something of its own before each line, so that none can be taken for another.
    """
    for line in _LINES.findall(text):
        for start in range(0, len(line), _LINE_CHARS):
            yield printable(line[start : start + _LINE_CHARS])


def octets(data: bytes, offset: int) -> Iterator[str]:
    """Yield bytes for a person: as escaped text when nearly all of it is text, else as a hex dump
    whose first column is the place in the half-stream.
    """
    if data and sum(map(_TEXT_BYTES.__contains__, data)) >= 0.9 * len(data):
        yield from lines(data.decode("utf-8", "surrogateescape"))
        return
    for start in range(0, len(data), LINE_BYTES):
        row = data[start : start + LINE_BYTES]
        shown = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        yield f"{offset + start:08x}  {row.hex(' '):{3 * LINE_BYTES - 1}}  {shown}"
