"""Time outside the program: RFC 3339 in UTC with nanoseconds. Inside it is an integer of
nanoseconds.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from functools import lru_cache

SECOND = 1_000_000_000


@lru_cache(maxsize=64)
def _second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def rfc3339(time_ns: int) -> str:
    """Return "2026-11-22T03:00:00.123456789Z"."""
    second, rest = divmod(time_ns, SECOND)
    return f"{_second(second)}.{rest:09d}Z"


def nanoseconds(text: str) -> int:
    """Return the nanoseconds of an RFC 3339 text with any offset and up to nine decimals;
    ValueError otherwise.
    """
    head, dot, tail = text.partition(".")
    digits, zone = "", ""
    if dot:
        digits = tail[: len(tail) - len(tail.lstrip("0123456789"))]
        zone = tail[len(digits) :]
        if not 1 <= len(digits) <= 9:
            raise ValueError(f"{text!r} is no RFC 3339 time")
    moment = datetime.fromisoformat(head + zone)
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} names no offset from UTC")
    whole = moment.astimezone(UTC) - datetime(1970, 1, 1, tzinfo=UTC)
    return (whole.days * 86400 + whole.seconds) * SECOND + int(digits.ljust(9, "0") or "0")
