"""Canonical JSON (RFC 8785) for what the ledger commits to: one value has one spelling.

Only str, int, bool, None, list, tuple and dict with str keys: no floats, and no integer beyond 2^53
- 1, which RFC 8785 cannot represent; such numbers are written as strings by their owner. The
verifier has its own reading of the RFC.
"""

from __future__ import annotations

from json.encoder import encode_basestring
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    #: str -> its JSON spelling with the least escapes; typeshed does not know the function
    encode_basestring: Callable[[str], str]

SAFE = (1 << 53) - 1

#: What can be made canonical.
Value = str | int | bool | None | list["Value"] | tuple["Value", ...] | dict[str, "Value"]


def dumps(value: Value) -> bytes:
    """Return the canonical UTF-8 spelling of `value`.

    Raises TypeError for a type that has none, ValueError for a number out of range or a lone
    surrogate.
    """
    return _text(value).encode("utf-8")


def _text(value: Value) -> str:
    if isinstance(value, str):
        return encode_basestring(value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        if not -SAFE <= value <= SAFE:
            raise ValueError(f"{value} has no exact place in canonical JSON")
        return str(int(value))
    if isinstance(value, list | tuple):
        return "[" + ",".join([_text(item) for item in value]) + "]"
    if isinstance(value, dict):
        return (
            "{"
            + ",".join(
                [encode_basestring(key) + ":" + _text(value[key]) for key in _ordered(value)]
            )
            + "}"
        )
    raise TypeError(f"{type(value).__name__} has no canonical form")


def _ordered(value: dict[str, Value]) -> list[str]:
    """Return the keys in the order of RFC 8785: by UTF-16 code units."""
    if all(map(str.isascii, value)):
        return sorted(value)
    return sorted(value, key=lambda key: key.encode("utf-16-be"))
