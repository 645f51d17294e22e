"""Which protocol a session speaks, from the client's first bytes.

Ports are a hint for the order of asking, never proof. The driver keeps the bytes back until this
says something.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from appliance.protocols import discover
from appliance.sansio import Answer

if TYPE_CHECKING:
    from appliance.sansio import Protocol

MOST_PREFIX_BYTES = 16 * 1024


def detect(prefix: bytes, port: int) -> tuple[Protocol | None, str]:
    """Return (protocol, reason), or (None, "") while more bytes are needed."""
    undecided = False
    for protocol in _asked(port):
        answer = protocol.probe(prefix)
        if answer is Answer.YES:
            return protocol, ""
        undecided = undecided or answer is Answer.MORE
    if undecided and len(prefix) < MOST_PREFIX_BYTES:
        return None, ""
    return discover()["opaque"], "no-probe-matched"


def expected(prefix: bytes, port: int) -> bool:
    """Say whether these may be the first bytes of a protocol whose usual port this is.

    Then no silence makes the session opaque: a client could have its credentials recorded, and its
    statements not decoded, by pausing inside the first message. The server waits for it likewise.
    """
    protocols = (protocol for protocol in _asked(port) if protocol.waits and port in protocol.ports)
    return any(protocol.probe(prefix) is Answer.MORE for protocol in protocols)


@lru_cache(maxsize=1024)
def _asked(port: int) -> tuple[Protocol, ...]:
    """Return the protocols in the order of asking; opaque never claims a session."""
    found = (protocol for protocol in discover().values() if protocol.name != "opaque")
    return tuple(sorted(found, key=lambda protocol: port not in protocol.ports))
