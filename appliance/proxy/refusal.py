"""Destinations that no session may have: the gate itself, loopback, link-local, the management
network.

Checked at accept, before anything is dialled: no loop through the listener, no pivot through the
gate.
"""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from appliance.config import Network, Route


class Destinations:
    """Which route a destination belongs to, or why it is refused."""

    def __init__(
        self, routes: Iterable[Route], own: set[str], management: Iterable[Network]
    ) -> None:
        self._routes = [route for route in routes if route.action == "intercept"]
        self._own = {ipaddress.ip_address(address) for address in own}
        self._management = tuple(management)
        self.look_up = lru_cache(4096)(self._look_up)

    def _look_up(self, host: str, port: int) -> tuple[Route | None, str]:
        """Return (route, "") or (None, reason); `host` is textual, as accept gives it."""
        address = ipaddress.ip_address(host.partition("%")[0])
        if address.version == 6 and address.ipv4_mapped is not None:
            return None, "mapped"  # dialling it would reach an IPv4 address by another name
        if address in self._own:
            return None, "own-address"
        if address.is_loopback or address.is_unspecified:
            return None, "loopback"
        if address.is_link_local:
            return None, "link-local"
        if address.is_multicast:
            return None, "multicast"
        if any(address in network for network in self._management):
            return None, "management"
        for route in self._routes:
            if port in route.ports and any(address in network for network in route.destinations):
                return route, ""
        return None, "no-route"
