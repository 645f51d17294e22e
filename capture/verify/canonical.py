"""Canonical JSON as RFC 8785 spells it, read strictly: one value has one spelling.

Leaves hold only str, int, bool, None, arrays and objects: no float, and no integer beyond 2^53 - 1,
which RFC 8785 cannot represent. Anything else is refused.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

SAFE = (1 << 53) - 1


def loads(text: bytes) -> Any:
    """Return the value of a canonical text; ValueError when it is not exactly canonical."""
    value = json.loads(
        text.decode("utf-8"),
        object_pairs_hook=_object,
        parse_float=_refuse,
        parse_constant=_refuse,
    )
    if dumps(value) != text:
        raise ValueError("not canonical JSON")
    return value


def dumps(value: Any) -> bytes:
    """Return the canonical UTF-8 spelling of `value`.

    ValueError for a type that has none, a number out of range or a lone surrogate.
    """
    return _text(value).encode("utf-8")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in an object")
    return found


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is no integer")


def _text(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
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
        ordered = sorted(value, key=lambda key: key.encode("utf-16-be"))
        return "{" + ",".join([f"{_text(key)}:{_text(value[key])}" for key in ordered]) + "}"
    raise ValueError(f"{type(value).__name__} has no canonical form")
