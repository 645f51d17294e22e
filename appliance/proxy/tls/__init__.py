"""TLS that the gate opens: its certificate authority, both handshakes, and the streams after them.

`appliance.daemon` makes one `Terminator` per gate worker; sessions on routes with
`tls = "intercept"` use it. docs/protocols/tls.md says what clients and servers see of it.
"""

from __future__ import annotations

from appliance.proxy.tls.authority import Authority
from appliance.proxy.tls.terminator import Terminator

__all__ = ["Authority", "Terminator"]
