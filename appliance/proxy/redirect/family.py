"""The two IP versions: where things stand in a packet, and the numbers that nftables has for them.

`appliance.proxy.redirect.rules` writes each rule once and asks here for what differs.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from appliance.proxy.redirect import expressions as expr
from appliance.proxy.redirect.sets import TYPE_IPV4, TYPE_IPV6, ExactSet, IntervalSet

if TYPE_CHECKING:
    from collections.abc import Iterable

    from appliance.config import Network
    from appliance.proxy.redirect.expressions import Expression, Rule

_TYPE_ICMP, _TYPE_ICMP6 = 14, 29


@dataclass(frozen=True, slots=True)
class Family:
    """One IP version."""

    version: int
    number: int  #: as in NFPROTO_*
    source_offset: int
    destination_offset: int
    size: int  #: of an address
    address_type: int  #: nftables' data type, for people who list the rules
    icmp: int  #: protocol number
    icmp_type: int  #: nftables' data type
    ping: int  #: ICMP type of an echo request
    errors: tuple[int, ...]  #: ICMP types: unreachable, too big, time exceeded, parameter problem
    protocol_register: int  #: that follows an address in register 1
    port_register: int

    @property
    def source(self) -> Expression:
        """Load the source address."""
        return expr.payload(expr.NETWORK, self.source_offset, self.size)

    @property
    def destination(self) -> Expression:
        """Load the destination address."""
        return expr.payload(expr.NETWORK, self.destination_offset, self.size)

    @property
    def mine(self) -> Rule:
        """Continue when the packet is of this version."""
        return [expr.meta(expr.META_NFPROTO), expr.equals(bytes([self.number]))]

    @property
    def icmp_kind(self) -> Rule:
        """Continue when the packet is ICMP, with its type loaded."""
        return [
            expr.meta(expr.META_L4PROTO),
            expr.equals(bytes([self.icmp])),
            expr.payload(expr.TRANSPORT, 0, 1),
        ]

    def addresses(self, networks: Iterable[Network]) -> IntervalSet:
        """Return the set of those networks that are of this version."""
        ranges = [
            (int(network.network_address), int(network.broadcast_address))
            for network in networks
            if network.version == self.version
        ]
        return IntervalSet.of(self.address_type, self.size, ranges)

    def types(self, numbers: Iterable[int]) -> ExactSet:
        """Return the set of ICMP types."""
        return ExactSet.of(self.icmp_type, [bytes([number]) for number in numbers])

    def sees(self, networks: Iterable[Network]) -> bool:
        """Say whether one of the networks is of this version."""
        return any(network.version == self.version for network in networks)


IPV4 = Family(4, socket.AF_INET, 12, 16, 4, TYPE_IPV4, 1, _TYPE_ICMP, 8, (3, 11, 12), 9, 10)
IPV6 = Family(6, socket.AF_INET6, 8, 24, 16, TYPE_IPV6, 58, _TYPE_ICMP6, 128, (1, 2, 3, 4), 2, 13)
FAMILIES = (IPV4, IPV6)
