"""One file per protocol; this package finds them by listing its folder.

Each file has one constant `PROTOCOL` (see `appliance.sansio.Protocol`). None imports another, and
none does I/O.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from appliance.sansio import Protocol


@cache
def discover() -> dict[str, Protocol]:
    """Return every protocol by name, in the order of their files' names."""
    found: dict[str, Protocol] = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        protocol: Protocol = importlib.import_module(f"{__name__}.{module.name}").PROTOCOL
        found[protocol.name] = protocol
    return found
