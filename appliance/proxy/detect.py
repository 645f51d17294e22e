"""Which protocol a session speaks, from the client's first bytes.

Ports are a hint for the order of asking, never proof. The driver keeps the bytes back until this
says something.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from appliance.protocols import discover
from appliance.sansio import Answer

if TYPE_CHECKING:
    from appliance.sansio import Protocol

MOST_PREFIX_BYTES = 16 * 1024


def detect(prefix: bytes, port: int) -> tuple[Protocol | None, str]:
    """Return (protocol, reason), or (None, "") while more bytes are needed."""
    protocols = discover()
    asked = sorted(protocols.values(), key=lambda protocol: port not in protocol.ports)
    undecided = False
    for protocol in asked:
        answer = protocol.probe(prefix)
        if answer is Answer.YES:
            return protocol, ""
        undecided = undecided or answer is Answer.MORE
    if undecided and len(prefix) < MOST_PREFIX_BYTES:
        return None, ""
    return protocols["opaque"], "no-probe-matched"
