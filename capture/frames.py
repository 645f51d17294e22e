"""The frame: what segments and chunks are made of, and how sessions are named.

`capture.chunk` publishes frames, `capture.tail` and `capture.reader` walk them. Layout,
little-endian, 8-byte aligned:

    word 0   incarnation (32 bit) << 32 | kind (8 bit) << 24 | payload length (24 bit)
    word 1   session
    word 2   time, ns since the Unix epoch
    word 3   offset in the half-stream (data frames), 0 (records)
    payload, zero-padded to a multiple of 8

Word 0 is stored last, in one aligned store, after the next frame's word 0 was zeroed: a torn frame
has length word zero, and one of an earlier life of the same memory carries another incarnation.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

HEADER_BYTES = 32
MAX_PAYLOAD_BYTES = (1 << 24) - 1
HEADER = struct.Struct("<QQQQ")

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_VALUES = {letter: value for value, letter in enumerate(_ALPHABET)}
_PAIRS = [first + second for first in _ALPHABET for second in _ALPHABET]
NAME_LETTERS = 13
SESSION_BITS = 40


class Kind(IntEnum):
    """What a frame holds; record kinds are in `capture.records.KINDS`, from 16 on."""

    #: bytes received from the client (passed on unchanged unless a Withheld record says otherwise)
    UP = 1
    DOWN = 2  #: bytes received from the upstream, likewise
    UP_OWN = 3  #: the gate's own bytes, sent to the upstream
    DOWN_OWN = 4  #: the gate's own bytes, sent to the client


FIRST_RECORD = 16


def padded(length: int) -> int:
    """Return the bytes that a frame with `length` bytes of payload takes, header included."""
    return HEADER_BYTES + ((length + 7) & ~7)


def session_name(session: int) -> str:
    """Return the printed form of a session's number: 13 letters of Crockford's base 32, lower
    case.
    """
    pair = _PAIRS
    return (
        _ALPHABET[session >> 60] + pair[session >> 50 & 1023] + pair[session >> 40 & 1023]
        + pair[session >> 30 & 1023] + pair[session >> 20 & 1023] + pair[session >> 10 & 1023]
        + pair[session & 1023]
    )  # fmt: skip


def session_number(name: str) -> int:
    """Return the number of a printed session; ValueError when it is none."""
    if len(name) != NAME_LETTERS:
        raise ValueError(f"a session id has {NAME_LETTERS} letters")
    number = 0
    for letter in name.lower():
        if letter not in _VALUES:
            raise ValueError(f"{letter!r} is no letter of a session id")
        number = number << 5 | _VALUES[letter]
    if number >> 64:
        raise ValueError("a session id has 64 bits")
    return number


def incarnation_of(session: int) -> int:
    """Return the incarnation of the process that numbered `session`."""
    return session >> SESSION_BITS


def walk(
    plaintext: bytes | memoryview, incarnation: int, start: int = 0
) -> Iterator[tuple[int, int, int, int, memoryview, int]]:
    """Yield (kind, session, time_ns, offset, payload, position) of each frame in `plaintext`.

    Ends at a zero length word, at one of another incarnation, or where a frame would run over the
    end; the caller compares the last position with what it expected. `position` is where the
    frame's header stands.
    """
    view = memoryview(plaintext)
    size = len(view)
    at = start
    unpack = HEADER.unpack_from
    while at + HEADER_BYTES <= size:
        word, session, time_ns, offset = unpack(view, at)
        if word >> 32 != incarnation or not word & 0xFFFFFFFF:
            return
        length = word & 0xFFFFFF
        after = at + HEADER_BYTES + ((length + 7) & ~7)
        if after > size:
            return
        body = at + HEADER_BYTES
        yield (word >> 24) & 0xFF, session, time_ns, offset, view[body : body + length], at
        at = after
