"""Reads a leaf: its fields and their types, as docs/evidence-format.md lists them."""

from __future__ import annotations

import base64
import binascii
import re
from datetime import UTC, datetime
from typing import Any

from capture.verify import canonical

MOST_BYTES = 4096
_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.(\d{9})Z")
_WORD = re.compile("[a-z0-9][a-z0-9-]{0,31}")
_NAME = re.compile("[0-9a-hjkmnp-tv-z]{13}")
_HEX = re.compile("[0-9a-f]+")
_STREAM = re.compile("[!-~]{1,16}")
_ORIGIN = re.compile("[!-~]{1,128}")


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _counts(length: int) -> Any:
    return lambda value: (
        isinstance(value, list) and len(value) == length and all(map(_count, value))
    )


def _pattern(pattern: re.Pattern[str]) -> Any:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _digest(value: Any) -> bool:
    try:
        return len(base64.b64decode(value, validate=True)) == 32
    except (ValueError, TypeError, binascii.Error):
        return False


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _or_empty(check: Any) -> Any:
    return lambda value: value == "" or check(value)


_WORDS, _TIMES, _NAMES, _HEXES = map(_pattern, (_WORD, _TIME, _NAME, _HEX))
_PLACE = {"generation": _count, "commit": _count}

#: Fields of each type beside `type`, `v` and `time`, with what they must be.
FIELDS: dict[str, dict[str, Any]] = {
    "genesis": {"boot": _HEXES, "origin": _pattern(_ORIGIN)},
    "start": {**_PLACE, "boot": _HEXES, "role": _WORDS},
    "stop": {**_PLACE, "reason": _WORDS},
    "config": {**_PLACE, "sha256": _HEXES},
    "pack": {
        "commits": _count, "digest": _digest, "first": _count, "generation": _count,
        "last": _flag, "parts": _count, "size": _count,
    },
    "segment": {
        "base": _count, "commits": _count, "end": _count, "final": _flag, "first": _count,
        "generation": _count, "header": _or_empty(_digest), "incarnation": _count,
        "offset": _count, "position": _count, "root": _digest, "stream": _pattern(_STREAM),
    },
    "hot": {"commits": _count, "first": _count, "generation": _count, "offset": _count,
            "tags": _digest},
    "session_open": {**_PLACE, "session": _NAMES},
    "session_close": {
        **_PLACE, "by": _WORDS, "bytes": _counts(2), "commits": _count, "declared": _counts(3),
        "frames": _count, "gaps": _count, "opened": _or_empty(_TIMES), "operations": _count,
        "own": _counts(2), "reason": _WORDS, "records": _count, "session": _NAMES,
        "subroot": _digest,
    },
    "decision": {**_PLACE, "action": _WORDS, "session": _or_empty(_NAMES)},
    "access": {**_PLACE, "action": _WORDS},
    "gap": {**_PLACE, "bytes": _counts(2), "count": _count, "packets": _count, "reason": _WORDS,
            "scope": _WORDS},
    "heartbeat": {
        **_PLACE, "accepted": _count, "closed": _count, "kernel_accepted": _count,
        "listen_drops": _count, "open": _count, "refused": _count, "sensor_lost": _count,
        "worker": _count,
    },
    "seal_heartbeat": {"boot": _HEXES, "mono_ms": _count, "open": _count, "pace_ms": _count},
    "recovered": {**_PLACE, "bytes": _count, "frames": _count, "incarnation": _count,
                  "last": _count, "power_loss": _flag, "segments": _count},
    "damaged": {"generation": _count, "offset": _count, "reason": _WORDS},
}  # fmt: skip


def parse(data: bytes) -> dict[str, Any]:
    """Return the fields of a leaf; ValueError with what is wrong with it."""
    if len(data) > MOST_BYTES:
        raise ValueError(f"the leaf has {len(data)} bytes")
    fields = canonical.loads(data)
    if not isinstance(fields, dict) or fields.get("v") != 1:
        raise ValueError("the leaf is no object of version 1")
    known = FIELDS.get(str(fields.get("type")))
    if known is None:
        raise ValueError(f"the leaf's type {fields.get('type')!r} is not known")
    if fields.keys() != known.keys() | {"type", "v", "time"}:
        raise ValueError("the leaf has not the fields of its type")
    for name, check in {**known, "time": _TIMES}.items():
        if not check(fields[name]):
            raise ValueError(f"the leaf's field {name} is not what it must be")
    return fields


def nanoseconds(time: str) -> int:
    """Return a leaf's time in ns since the Unix epoch; ValueError when it is no moment."""
    found = _TIME.fullmatch(time)
    if found is None:
        raise ValueError(f"{time!r} is no time")
    moment = datetime.fromisoformat(found[1]).replace(tzinfo=UTC)
    return int(moment.timestamp()) * 1_000_000_000 + int(found[2])


def digest(text: str) -> bytes:
    """Return the bytes of a base64 hash."""
    return base64.b64decode(text)
