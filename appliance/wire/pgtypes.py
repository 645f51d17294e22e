"""PostgreSQL parameter values as JSON values, from their text or binary form.

`decode` never raises: what is not a valid value of its type, and what has a type that is not listed
here, becomes {"hex": "..."} in binary form and plain text in text form. The binary forms are those
of the server's typsend functions (src/backend/utils/adt). Numbers that JSON cannot hold (numeric,
NaN, infinity) are strings; dates and times are ISO 8601, timestamps with time zone in UTC.
"""

from __future__ import annotations

import math
from datetime import date, datetime, timedelta
from struct import Struct
from struct import error as struct_error
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_VALUE_BYTES = 4 * 1024  #: of one value that a record shows

_INT2 = Struct("!h")
_INT4 = Struct("!i")
_INT8 = Struct("!q")
_FLOAT4 = Struct("!f")
_FLOAT8 = Struct("!d")
_ARRAY = Struct("!iiI")
_DIMENSION = Struct("!ii")
_NUMERIC = Struct("!hhHh")
_TIMETZ = Struct("!qi")
_INTERVAL = Struct("!qii")

_EPOCH_DATE = date(2000, 1, 1)
_EPOCH = datetime(2000, 1, 1)  # noqa: DTZ001 - the value's type says whether it is in UTC
_INFINITE_INTERVALS = {
    (2**63 - 1, 2**31 - 1, 2**31 - 1): "infinity",
    (-(2**63), -(2**31), -(2**31)): "-infinity",
}
_NUMERIC_SIGNS = {0x0000: "", 0x4000: "-"}
_NUMERIC_SPECIAL = {0xC000: "NaN", 0xD000: "Infinity", 0xF000: "-Infinity"}
_MOST_NUMERIC_DIGITS = 2_000
_MOST_ARRAY_ITEMS = 1_000


def text_of(raw: bytes | memoryview) -> str:
    """Return peer bytes as text: UTF-8, with what is not UTF-8 shown as backslash escapes."""
    return str(raw, "utf-8", "backslashreplace")


def decode(raw: bytes, oid: int, *, binary: bool) -> Any:
    """Return the value of a parameter of type `oid` (0 when not known), in binary or text form."""
    if len(raw) > MOST_VALUE_BYTES:
        return _shortened(raw, oid, binary=binary)
    if not binary:
        return _from_text(raw, oid) if oid else str(raw, "utf-8", "backslashreplace")
    decoder = _BINARY.get(oid)
    if decoder is None:
        return {"hex": raw.hex()}
    try:
        return decoder(raw)
    except (ValueError, OverflowError, struct_error, IndexError):
        return {"hex": raw.hex()}


def _shortened(raw: bytes, oid: int, *, binary: bool) -> dict[str, Any]:
    """Return the beginning of a long value and its whole length."""
    head = raw[:MOST_VALUE_BYTES]
    if binary and oid not in _TEXTUAL:
        return {"hex": head.hex(), "bytes": len(raw)}
    return {"text": text_of(head), "bytes": len(raw)}


def _from_text(raw: bytes, oid: int) -> Any:
    text = text_of(raw)
    try:
        if oid in _INTEGERS:
            return _bounded(int(text))
        if oid in (700, 701):
            return _finite(float(text))
    except ValueError:
        return text
    if oid == 16:
        return {"t": True, "f": False, "true": True, "false": False}.get(text, text)
    return text


def _bounded(number: int) -> int | str:
    return number if -(2**63) <= number < 2**63 else str(number)


def _finite(number: float) -> float | str:
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "Infinity" if number > 0 else "-Infinity"
    return number


def _whole(layout: Struct) -> Callable[[bytes], Any]:
    def decoder(raw: bytes) -> Any:
        return layout.unpack(raw)[0]

    return decoder


def _float8(raw: bytes) -> float | str:
    number: float = _FLOAT8.unpack(raw)[0]
    return _finite(number)


def _float4(raw: bytes) -> float | str:
    """Return the shortest decimal number that is this float4, as the server prints it."""
    number: float = _FLOAT4.unpack(raw)[0]
    if math.isfinite(number):
        for digits in range(6, 10):
            shorter = float(f"{number:.{digits}g}")
            if _FLOAT4.pack(shorter) == raw:
                return shorter
    return _finite(number)


def _bool(raw: bytes) -> bool:
    if raw not in (b"\0", b"\1"):
        raise ValueError("a bool is one byte, 0 or 1")
    return raw == b"\1"


def _bytea(raw: bytes) -> dict[str, str]:
    return {"hex": raw.hex()}


def _uuid(raw: bytes) -> str:
    if len(raw) != 16:
        raise ValueError("a uuid has 16 bytes")
    digits = raw.hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _jsonb(raw: bytes) -> str:
    if raw[:1] != b"\1":
        raise ValueError("jsonb version 1 is the only one")
    return text_of(raw[1:])


def _numeric(raw: bytes) -> str:
    """Return base-10000 digits as decimal text (numeric_send)."""
    count, weight, sign, scale = _NUMERIC.unpack_from(raw)
    if sign in _NUMERIC_SPECIAL:
        return _NUMERIC_SPECIAL[sign]
    if count < 0 or len(raw) != 8 + 2 * count or not 0 <= scale <= _MOST_NUMERIC_DIGITS:
        raise ValueError("not a numeric")
    if abs(weight) * 4 > _MOST_NUMERIC_DIGITS:
        raise ValueError("too long to show")
    digits = [_INT2.unpack_from(raw, 8 + 2 * index)[0] for index in range(count)]
    if not all(0 <= digit <= 9999 for digit in digits):
        raise ValueError("a digit is 0 to 9999")

    def digit(place: int) -> int:
        index = weight - place
        return digits[index] if 0 <= index < count else 0

    whole = (
        "".join(f"{digit(place):04d}" for place in range(max(weight, 0), -1, -1)).lstrip("0") or "0"
    )
    places = -(-scale // 4)
    fraction = "".join(f"{digit(-1 - place):04d}" for place in range(places))[:scale]
    return _NUMERIC_SIGNS[sign] + whole + ("." + fraction if scale else "")


def _date(raw: bytes) -> str:
    days: int = _INT4.unpack(raw)[0]
    if days in (2**31 - 1, -(2**31)):
        return "infinity" if days > 0 else "-infinity"
    return (_EPOCH_DATE + timedelta(days)).isoformat()


def _clock(microseconds: int) -> str:
    if not 0 <= microseconds <= 86_400_000_000:
        raise ValueError("a day has 24 hours")
    seconds, rest = divmod(microseconds, 1_000_000)
    text = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    return text + (f".{rest:06d}" if rest else "")


def _time(raw: bytes) -> str:
    return _clock(_INT8.unpack(raw)[0])


def _timetz(raw: bytes) -> str:
    microseconds, west = _TIMETZ.unpack(raw)
    sign = "-" if west > 0 else "+"
    return f"{_clock(microseconds)}{sign}{abs(west) // 3600:02d}:{abs(west) // 60 % 60:02d}"


def _timestamp(raw: bytes) -> str:
    microseconds: int = _INT8.unpack(raw)[0]
    if microseconds in (2**63 - 1, -(2**63)):
        return "infinity" if microseconds > 0 else "-infinity"
    return (_EPOCH + timedelta(microseconds=microseconds)).isoformat()


def _timestamptz(raw: bytes) -> str:
    text = _timestamp(raw)
    return text if text.endswith("infinity") else text + "Z"


def _interval(raw: bytes) -> str:
    """Return months, days and microseconds in ISO 8601 form; each has a sign of its own."""
    fields = _INTERVAL.unpack(raw)
    if fields in _INFINITE_INTERVALS:
        return _INFINITE_INTERVALS[fields]
    microseconds, days, months = fields
    sign = "-" if microseconds < 0 else ""
    seconds, rest = divmod(abs(microseconds), 1_000_000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{sign}{hours}H{sign}{minutes}M{sign}{seconds}.{rest:06d}S"
    return f"P{months}M{days}DT{clock}"


def _array(raw: bytes) -> Any:
    """Return an array of any known element type (array_send); nested lists when it has several
    dimensions.
    """
    dimensions, _, element = _ARRAY.unpack_from(raw)
    if dimensions == 0:
        return []
    if not 0 < dimensions <= 6 or element in _ARRAYS:
        raise ValueError("an array has at most 6 dimensions, and no arrays as items")
    sizes = [_DIMENSION.unpack_from(raw, 12 + 8 * number)[0] for number in range(dimensions)]
    total = 1
    for size in sizes:
        if size <= 0:
            raise ValueError("a dimension has at least one item")
        total *= size
    if total > _MOST_ARRAY_ITEMS:
        raise ValueError("too many items to show")
    position = 12 + 8 * dimensions
    items: list[Any] = []
    for _ in range(total):
        length: int = _INT4.unpack_from(raw, position)[0]
        position += 4
        if length < 0:
            items.append(None)
            continue
        if position + length > len(raw):
            raise ValueError("an item is cut")
        items.append(decode(raw[position : position + length], element, binary=True))
        position += length
    for size in reversed(sizes[1:]):
        items = [items[start : start + size] for start in range(0, len(items), size)]
    return items


_TEXTUAL = frozenset({18, 19, 25, 114, 142, 705, 1042, 1043})
_INTEGERS = frozenset({20, 21, 23, 26, 28, 2278})
_ARRAYS = frozenset((
    143, 199, 1000, 1001, 1002, 1003, 1005, 1007, 1009, 1014, 1015, 1016, 1021, 1022, 1028, 1115,
    1182, 1183, 1185, 1187, 1231, 1270, 2951, 3807,
))  # fmt: skip
_UNSIGNED4 = Struct("!I")

#: Type oids of src/include/catalog/pg_type.dat.
_BINARY: dict[int, Callable[[bytes], Any]] = {
    16: _bool,
    17: _bytea,
    20: _whole(_INT8),
    21: _whole(_INT2),
    23: _whole(_INT4),
    26: _whole(_UNSIGNED4),
    28: _whole(_UNSIGNED4),
    700: _float4,
    701: _float8,
    1082: _date,
    1083: _time,
    1114: _timestamp,
    1184: _timestamptz,
    1186: _interval,
    1266: _timetz,
    1700: _numeric,
    2950: _uuid,
    3802: _jsonb,
    **dict.fromkeys(_TEXTUAL, text_of),
    **dict.fromkeys(_ARRAYS, _array),
}
