"""The rule set that turns client subnets' TCP towards the listeners and stops everything else that no route allows.

One chain at prerouting, before routing decides; order is meaning:

1. packets of our own transparent sockets (both legs) are delivered locally;
2. from here on only packets from client subnets: neighbour discovery and pings of the gate itself pass;
3. bypass destinations are routed, their SYN option stripped;
4. UDP/443 is rejected, so that QUIC falls back to TCP;
5. each route, first match wins: TCP goes to the listener; with no listener it is routed (on_failure = "bypass", counted) or dropped;
6. TCP that no route names goes to the listener too, which refuses and records it;
7. protocols that a route allows are counted and routed; everything else is dropped.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

from appliance.proxy.redirect import nft

if TYPE_CHECKING:
    from appliance.config import Config, Ports, Route

TABLE = "narrows"
CHAIN = "pre"
MARK_LOCAL = 1  #: deliver to a socket of this host
MARK_ROUTED = 2  #: let through
SYN_OPTION = 253

_FAMILIES = ((4, socket.AF_INET, 12, 16, 4), (6, socket.AF_INET6, 8, 24, 16))


def protocol_number(name: str, version: int) -> int:
    """Return the IP protocol number of a route's `protocol`; ValueError when it is none."""
    known = {"tcp": nft.TCP, "udp": nft.UDP, "icmp": nft.ICMP if version == 4 else nft.ICMPV6}
    number = known.get(name, int(name) if name.isdecimal() else -1)
    if not 0 <= number <= 255:
        raise ValueError(f"{name!r} is no IP protocol")
    return number


def stamp(config: Config) -> str:
    """Return the name of an empty set that says in the kernel itself which configuration was applied."""
    return f"config_{config.sha256[:16]}"


def build(config: Config) -> tuple[nft.Batch, dict[str, list[int]]]:
    """Return the whole table as one batch, and for each counted purpose the numbers of its rules.

    Purposes: "bypass:<route>", "allow:<route>", "dropped", "redirected".
    """
    batch = nft.Batch(TABLE)
    batch.table()
    batch.delete_table()
    batch.table()
    batch.chain(CHAIN)
    batch.interval_set(stamp(config), nft.TYPE_SERVICE, 2, [])
    builder = _Builder(batch)
    builder.add("own", [*nft.own_sockets(), *nft.set_mark(MARK_LOCAL), nft.COUNTER, nft.ACCEPT])
    for version, family, source, destination, size in _FAMILIES:
        if any(network.version == version for network in config.redirect.clients):
            builder.version(config, version, family, source, destination, size)
    return batch, builder.purposes


class _Builder:
    """Adds the rules of one IP version after the other."""

    def __init__(self, batch: nft.Batch) -> None:
        self._batch = batch
        self.purposes: dict[str, list[int]] = {}

    def add(self, purpose: str, expressions: list[nft.Expression]) -> None:
        self.purposes.setdefault(purpose, []).append(len(self._batch.shape))
        self._batch.rule(CHAIN, expressions)

    def version(self, config: Config, version: int, family: int, source: int, destination: int, size: int) -> None:
        batch = self._batch
        clients, bypass = f"clients{version}", f"bypass{version}"
        batch.networks(clients, version, config.redirect.clients)
        batch.networks(bypass, version, config.redirect.bypass)
        here = [nft.meta(nft.META_NFPROTO), nft.equals(bytes([family])), nft.payload(1, source, size), nft.in_set(clients)]
        to = nft.payload(1, destination, size)
        tcp = [nft.meta(nft.META_L4PROTO), nft.equals(bytes([nft.TCP]))]
        local = nft.set_mark(MARK_LOCAL)
        if version == 6:
            discovery = [nft.meta(nft.META_L4PROTO), nft.equals(bytes([nft.ICMPV6])), nft.payload(2, 0, 1)]
            self.add("control", [*here, *discovery, *nft.between(b"\x85", b"\x89"), nft.ACCEPT])
        ping = bytes([nft.ICMP if version == 4 else nft.ICMPV6])
        self.add("control", [*here, nft.meta(nft.META_L4PROTO), nft.equals(ping), *nft.to_local(), nft.ACCEPT])
        routed = [*nft.set_mark(MARK_ROUTED), nft.COUNTER, nft.ACCEPT]
        self.add("option", [*here, to, nft.in_set(bypass), *tcp, nft.strip_option(SYN_OPTION)])
        self.add("bypassed", [*here, to, nft.in_set(bypass), *routed])
        if config.redirect.quic_reject:
            quic = [nft.meta(nft.META_L4PROTO), nft.equals(bytes([nft.UDP])), nft.payload(2, 2, 2)]
            self.add("quic", [*here, *quic, nft.equals(struct.pack(">H", 443)), nft.COUNTER, nft.reject_port()])
        listener = [*nft.to_listener(family, config.gate.listen_port), *local, nft.COUNTER, nft.ACCEPT]
        for number, route in enumerate(config.route):
            where = self._where(f"r{number}v{version}", route, version, to)
            if route.action == "intercept":
                self.add("redirected", [*here, *tcp, *where, *listener])
                if route.on_failure == "bypass":
                    self.add("option", [*here, *tcp, *where, nft.strip_option(SYN_OPTION)])
                    self.add(f"bypass:{route.name}", [*here, *tcp, *where, *routed])
                else:
                    self.add("dropped", [*here, *tcp, *where, nft.COUNTER, nft.DROP])
            else:
                protocol = bytes([protocol_number(route.protocol, version)])
                kind = [nft.meta(nft.META_L4PROTO), nft.equals(protocol)]
                self.add(f"allow:{route.name}", [*here, *kind, *where, *routed])
        self.add("redirected", [*here, *tcp, *listener])
        self.add("dropped", [*here, nft.COUNTER, nft.DROP])

    def _where(self, name: str, route: Route, version: int, to: nft.Expression) -> list[nft.Expression]:
        self._batch.networks(f"{name}d", version, route.destinations)
        where = [to, nft.in_set(f"{name}d")]
        if not _all(route.ports):
            self._batch.interval_set(f"{name}p", nft.TYPE_SERVICE, 2, route.ports.ranges)
            where += [nft.payload(2, 2, 2), nft.in_set(f"{name}p")]
        return where


def _all(ports: Ports) -> bool:
    return ports.ranges == ((1, 65535),)
