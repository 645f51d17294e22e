"""Bodies of PostgreSQL 3.x messages: what they say, as plain values.

Called by `appliance.protocols.postgresql` with a message's body (after type and length), which may
be cut off at its limit. Every function raises `Malformed` when the body is not what the protocol
says (PostgreSQL documentation, "Message Formats"); none keeps a reference to the body.
"""

from __future__ import annotations

from functools import lru_cache
from struct import Struct
from struct import error as struct_error
from typing import Any

from appliance.wire.pgtypes import decode, text_of

CANCEL_REQUEST = 80877102
SSL_REQUEST = 80877103
GSSENC_REQUEST = 80877104
MOST_STARTUP_BYTES = 10_000  #: the server's MAX_STARTUP_PACKET_LENGTH
MOST_CANCEL_BYTES = 12 + 256  #: 3.2: the key has up to 256 bytes

_MOST_MESSAGE_CHARS = 4 * 1024
_MOST_BINDS_BYTES = 64 * 1024
_SHORT_BYTES = 1024
_MOST_COLUMNS = 1_664  #: the server's MaxTupleAttributeNumber

_INT2 = Struct("!h").unpack_from
_COUNT = Struct("!H").unpack_from
_INT4 = Struct("!i").unpack_from
_UINT4 = Struct("!I").unpack_from
_COLUMN = Struct("!IhIhih").unpack_from
_FIXED_COLUMN_BYTES = 18


Columns = tuple[tuple[str, int], ...]  #: (name, type oid)


class Malformed(Exception):
    """A body is not what the protocol says."""


def cstring(body: bytes, position: int) -> tuple[bytes, int]:
    """Return the bytes up to the next zero byte, and the position after it."""
    end = body.find(b"\0", position)
    if end < 0:
        raise Malformed("a string has no end")
    return body[position:end], end + 1


def startup_parameters(body: bytes) -> dict[str, str]:
    """Return the name and value pairs of a StartupMessage (from its 9th byte on)."""
    parameters: dict[str, str] = {}
    position = 0
    while position < len(body) and body[position]:
        name, position = cstring(body, position)
        value, position = cstring(body, position)
        parameters[text_of(name)] = text_of(value)
    if position != len(body) - 1:
        raise Malformed("startup parameters do not end where the packet does")
    return parameters


def parse(body: bytes, *, cut: bool) -> tuple[bytes, bytes, tuple[int, ...]]:
    """Return (name, text, types that the client gave, 0 for none) of a Parse.

    Of a cut one the text goes as far as the body, and no types are known.
    """
    end = body.find(0)
    stop = body.find(0, end + 1)
    if end < 0 or (stop < 0 and not cut):
        raise Malformed("a string in Parse has no end")
    name = body[:end]
    if cut:
        return name, body[end + 1 : stop] if stop >= 0 else body[end + 1 :], ()
    text = body[end + 1 : stop]
    size = len(body) - stop - 3
    count = int.from_bytes(body[stop + 1 : stop + 3], "big")
    if size != 4 * count:
        raise Malformed("Parse has other types than it says")
    if not count:
        return name, text, ()
    return name, text, tuple(_UINT4(body, stop + 3 + 4 * number)[0] for number in range(count))


def bind(body: bytes) -> tuple[bytes, bytes, tuple[int, ...], int]:
    """Return (portal, statement, formats, where the value count stands) of a Bind."""
    end = body.find(0)
    stop = body.find(0, end + 1)
    if end < 0 or stop < 0:
        raise Malformed("a name in Bind has no end")
    formats: tuple[int, ...] = ()
    try:
        (count,) = _COUNT(body, stop + 1)
        position = stop + 3 + 2 * count
        if count:
            formats = tuple(_INT2(body, stop + 3 + 2 * number)[0] for number in range(count))
    except struct_error as wrong:
        raise Malformed("Bind is cut") from wrong
    return body[:end], body[end + 1 : stop], formats, position


def values(
    body: bytes, position: int, formats: tuple[int, ...], oids: tuple[int, ...], *, cut: bool
) -> tuple[Any, ...]:
    """Return the decoded values of a Bind or FunctionCall, from the value count at `position`.

    Values beyond the first 64 KiB, and those of a cut body, are counted in a last {"omitted": n}.
    """
    try:
        (count,) = _COUNT(body, position)
        if not count:
            return ()
        if len(formats) > 1 and len(formats) != count:
            raise Malformed("there are other formats than values")
        form = formats[0] if formats else 0
        position += 2
        limit = min(len(body), position + _MOST_BINDS_BYTES)
        found: list[Any] = []
        for number in range(count):
            if position + 4 > limit:
                return _omitted(found, count, cut=cut or len(body) > limit)
            (length,) = _INT4(body, position)
            position += 4
            if length < 0:
                found.append(None)
                continue
            end = position + length
            if end > limit:
                return _omitted(found, count, cut=cut or end <= len(body))
            oid = oids[number] if number < len(oids) else 0
            if len(formats) > 1:
                form = formats[number]
            found.append(decode(body[position:end], oid, binary=form == 1))
            position = end
    except struct_error as wrong:
        raise Malformed("values are cut") from wrong
    return tuple(found)


def _omitted(found: list[Any], count: int, *, cut: bool) -> tuple[Any, ...]:
    if not cut:
        raise Malformed("a value is longer than its message")
    return (*found, {"omitted": count - len(found)})


def function_call(body: bytes) -> tuple[int, tuple[int, ...], int]:
    """Return (function's oid, formats of its arguments, where the argument count stands)."""
    try:
        (oid,) = _UINT4(body, 0)
        (count,) = _COUNT(body, 4)
        formats = tuple(_INT2(body, 6 + 2 * number)[0] for number in range(count))
    except struct_error as wrong:
        raise Malformed("FunctionCall is cut") from wrong
    return oid, formats, 6 + 2 * count


def error_fields(body: bytes) -> dict[str, str]:
    """Return the fields of ErrorResponse or NoticeResponse by their one-letter codes."""
    fields: dict[str, str] = {}
    position = 0
    while position < len(body) and body[position]:
        code = chr(body[position])
        end = body.find(b"\0", position + 1)
        if end < 0:
            end = len(body)
        fields[code] = text_of(body[position + 1 : end])[:_MOST_MESSAGE_CHARS]
        position = end + 1
    return fields


@lru_cache(256)
def tag(body: bytes) -> str:
    """Return the text of a CommandComplete, which is one of a few again and again."""
    return text_of(body).partition("\0")[0]


def columns(body: bytes) -> Columns:
    """Return (name, type oid) of each column of a RowDescription; of a cut one those that are
    there.
    """
    return _short_columns(body) if len(body) <= _SHORT_BYTES else _columns(body)


def _columns(body: bytes) -> Columns:
    found: list[tuple[str, int]] = []
    try:
        (count,) = _COUNT(body, 0)
        position = 2
        for _ in range(min(count, _MOST_COLUMNS)):
            end = body.index(b"\0", position)
            found.append((text_of(body[position:end]), _COLUMN(body, end + 1)[2]))
            position = end + 1 + _FIXED_COLUMN_BYTES
    except (struct_error, ValueError):
        pass  # cut at the limit, or by a server that is none: what is there is told
    return tuple(found)


#: The same few statements give the same few descriptions.
_short_columns = lru_cache(1024)(_columns)


def parameter_types(body: bytes) -> tuple[int, ...]:
    """Return the type oids of a ParameterDescription; of a cut one those that are there."""
    count = min(int.from_bytes(body[:2], "big"), (len(body) - 2) // 4)
    return tuple(_UINT4(body, 2 + 4 * number)[0] for number in range(count))


def strings(body: bytes, position: int, count: int) -> list[str]:
    """Return `count` strings that stand one after another from `position`."""
    found: list[str] = []
    for _ in range(count):
        text, position = cstring(body, position)
        found.append(text_of(text))
    return found


def error_response(sqlstate: str, message: str) -> bytes:
    """Return a FATAL ErrorResponse as the server itself would send it."""
    text = message.replace("\0", "")[:1_024].encode("utf-8", "backslashreplace")
    state = sqlstate.encode()
    body = b"SFATAL\0VFATAL\0C" + state + b"\0M" + text + b"\0\0"
    return b"E" + (len(body) + 4).to_bytes(4, "big") + body
