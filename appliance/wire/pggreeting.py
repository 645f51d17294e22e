"""What single messages of the beginning of a PostgreSQL session say, and its phases.

`appliance.wire.pgstartup` uses it. Pure functions: bodies in, records or fields out.
Each raises Malformed for a body that is none.
"""

from __future__ import annotations

from enum import Enum
from struct import Struct
from typing import TYPE_CHECKING, Any

from appliance.sansio import Audit, Effect
from appliance.wire import pgmessages
from appliance.wire.pgmessages import Malformed
from capture.records import Fact, Operation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from appliance.sansio import Facts

_PACKET = Struct("!II").unpack_from
_INT4 = Struct("!I").unpack_from
_HEADER_BYTES = 5
_SECRET_ANSWERS = {8: "gss", 11: "sasl", 12: "sasl"}  #: requests that carry a server's secret


class Phase(Enum):
    """See the table in `appliance.wire.pgstartup`."""

    OPEN = "open"
    ASKED = "asked"
    STARTED = "started"
    READY = "ready"
    CANCELLED = "cancelled"
    SEALED = "sealed"
    REFUSED = "refused"


def startup(packet: bytes, code: int) -> dict[str, Any]:
    """Return the fields of the fact `startup`."""
    parameters = pgmessages.startup_parameters(packet[8:])
    return {"protocol": f"{code >> 16}.{code & 0xFFFF}", "parameters": parameters}


def cancel(packet: bytes, offset: int, facts: Facts) -> list[Effect]:
    """Return the records of a CancelRequest, whole, at `offset` of the client's half-stream."""
    if len(packet) < 16:
        raise Malformed("a cancel request has a key")
    (pid,) = _INT4(packet, 8)
    target = "{}:{}".format(*facts.target)
    named = {"pid": pid, "key_digest": facts.digest(packet[12:]), "target": target}
    operation = Operation(
        1, "CANCEL", f"cancel {pid}", offset, len(packet), binds=(named,), kind="cancel"
    )
    return [Audit(operation), Audit(Fact("cancel", named))]


def negotiated(body: bytes) -> dict[str, Any]:
    """Return the fields of the fact `negotiate` (NegotiateProtocolVersion)."""
    if len(body) < 8:
        raise Malformed("NegotiateProtocolVersion is cut")
    version, count = _PACKET(body, 0)
    refused = pgmessages.strings(body, 8, min(count, len(body)))
    minor = version & 0xFFFF  # servers send the minor number alone or the whole version
    return {"protocol": f"3.{minor}", "refused": refused}


def secrets(message: bytearray) -> Iterator[tuple[int, str]]:
    """Yield (where a secret begins in a server's message, its kind); it goes to the message's end,
    of which not all need be there.
    """
    kind = message[0]
    if kind == ord("K"):
        yield _HEADER_BYTES + 4, "cancel-key"
    elif kind == ord("R") and len(message) >= _HEADER_BYTES + 4:
        secret = _SECRET_ANSWERS.get(_INT4(message, _HEADER_BYTES)[0])
        if secret is not None:
            yield _HEADER_BYTES + 4, secret
