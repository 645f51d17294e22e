"""JSON that is safe to show anywhere: ASCII only, without any control character.

Peers choose much of what the evidence holds. Terminal escapes, line breaks, bidirectional marks and
whatever else is not plain ASCII leave as escapes ("backslash u"), which mean the same to every JSON
reader.
"""

from __future__ import annotations

import json
from typing import Any


def dumps(value: Any) -> str:
    """Return `value` as one line of JSON."""
    return json.dumps(value, separators=(",", ":"))
