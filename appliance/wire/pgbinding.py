"""SCRAM's channel binding where the gate opens TLS with a certificate that is not the server's.

The binding ties the password exchange to the server's certificate (RFC 5929,
tls-server-end-point). `appliance.wire.pgstartup` takes the mechanism that binds out of the server's
list, and refuses a client that binds, or says that it could have: the gate cannot change that, the
password signs it, and a TLS server takes it for a downgrade.
"""

from __future__ import annotations

from appliance.sansio import CLIENT, UPSTREAM, Audit, Close, Effect, Forward, Origin
from appliance.wire.pgmessages import error_response
from capture.frames import session_name
from capture.records import Fact

#: What a client is told.
WHY = (
    "SCRAM channel binding does not pass TLS that the gate opens: "
    "connect with channel_binding=disable where the driver has it, or ask the gate's operator"
)
INVALID_AUTHORIZATION = "28000"
_SASL = (10).to_bytes(4, "big")
_HEADER_BYTES = 5


def without(message: bytes) -> bytes | None:
    """Return what the client gets in place of the server's list of SASL mechanisms
    (AuthenticationSASL), or None for any other message, and for a list without binding.
    """
    body = message[_HEADER_BYTES:]
    if message[:1] != b"R" or body[:4] != _SASL:
        return None
    names = body[4:].split(b"\0")
    left = [name for name in names if not name.endswith(b"-PLUS")]
    if left == names or not any(left):
        return None
    told = _SASL + b"\0".join(left)
    return b"R" + (len(told) + 4).to_bytes(4, "big") + told


def binds(body: bytes) -> bool:
    """Say whether a SASLInitialResponse uses channel binding, or says that it would (RFC 5802,
    section 7: the gs2-cbind-flag).
    """
    name, _, rest = body.partition(b"\0")
    return name.startswith(b"SCRAM-") and rest[4:5] in (b"p", b"y")


def refusal(session: int) -> list[Effect]:
    """Return what ends the session with a native error."""
    told = f"{WHY} (reference {session_name(session)})"
    return [
        Audit(Fact("error", {"sqlstate": INVALID_AUTHORIZATION, "message": told})),
        Forward(CLIENT, error_response(INVALID_AUTHORIZATION, told), Origin.SYNTHESISED),
        Close(CLIENT, WHY),
        Close(UPSTREAM, WHY),
    ]
