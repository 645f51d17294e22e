"""The rule set: client subnets' TCP goes to the listeners, and nothing else passes that is not
allowed and counted.

One chain at prerouting (`pre`), before routing decides; the others are reached from it. What enters
or leaves a client subnet through the gate is a session, a listed bypass, an allowed and counted
flow, or nothing:

    pre       lo passes; packets of our own sockets, and ICMP errors about them, are delivered
              here; then by address:
    from4/6   from a client: what keeps the network working; own, management and martian
              destinations (`refuse`); the bypass list; QUIC; TCP by route (`tcp`); other protocols
              by route; drop
    refuse    TCP goes to the listener, which refuses and records it; anything else is dropped
    tcp4/6    first route that matches (`routeN`); what no route names goes to the listener too,
              which refuses it
    routeN    the listener; without one, drop, or (on_failure = "bypass") strip the SYN option,
              count, pass
    to4/6     towards a client and no session: the return way of bypasses and allowed flows, and
              ICMP errors; drop
    up4/6, down4/6   count an allowed packet under client, protocol and port, and let it pass;
              `flows` swaps the set that they count in

A packet that passes carries MARK_PASS, one for a socket of ours MARK_LOCAL; `routing` says what the
marks do. The kernel reassembles fragments before `pre`, because tproxy asks for it, so ports can
always be read.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from appliance.proxy.redirect import nft
from appliance.proxy.redirect.netlink import text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from appliance.config import Config, Network, Route
    from appliance.proxy.redirect.nft import Expression

TABLE = "narrows"
BASE = "pre"
MARK_LOCAL = 0x4E01  #: deliver to a socket of this host
MARK_PASS = 0x4E02  #: route as if there were no gate
SYN_OPTION = 253
FLOW_SIZE = (
    65536  #: keys in a flow set; what finds no room is dropped, so that nothing passes uncounted
)
KEEP_MS = 365 * 86_400_000  #: how long an element waits to be read
SINCE = "since"  #: set with the first packet of each bypass
PORTED = (nft.TYPE_PROTOCOL, (6, 17, 33, 132, 136))  # TCP, UDP, DCCP, SCTP, UDP-Lite

_TCP, _UDP, _QUIC = 6, 17, 443
_ALL_PORTS = ((1, 65535),)
_IPV4_NOWHERE = ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3")
_IPV6_NOWHERE = ("::/127", "fe80::/10", "ff00::/8")
_MAPPED = ("::ffff:0:0/96",)  # an IPv6 socket would reach them by IPv4


@dataclass(frozen=True, slots=True)
class _Family:
    """Where things stand in a packet of one IP version, and what its ICMP types are."""

    version: int
    number: int  #: as in NFPROTO_*
    source: int
    destination: int
    size: int
    address_type: int
    icmp: int
    icmp_type: int  #: nftables' data type, for people who list the rules
    ping: int
    errors: tuple[int, ...]  #: unreachable, too big, time exceeded, parameter problem
    proto_register: int
    port_register: int

    def addresses(self, networks: Iterable[Network]) -> nft.IntervalSet:
        """Return the set of those networks that are of this version."""
        ranges = [
            (int(network.network_address), int(network.broadcast_address))
            for network in networks
            if network.version == self.version
        ]
        return nft.IntervalSet.of(self.address_type, self.size, ranges)

    def types(self, types: Iterable[int]) -> nft.ExactSet:
        """Return the set of ICMP types."""
        return nft.ExactSet(
            self.icmp_type, 1, frozenset((bytes([number]), False) for number in types)
        )

    def sees(self, networks: Iterable[Network]) -> bool:
        """Say whether one of the networks is of this version."""
        return any(network.version == self.version for network in networks)


IPV4 = _Family(4, socket.AF_INET, 12, 16, 4, nft.TYPE_IPV4, 1, 14, 8, (3, 11, 12), 9, 10)
IPV6 = _Family(6, socket.AF_INET6, 8, 24, 16, nft.TYPE_IPV6, 58, 29, 128, (1, 2, 3, 4), 2, 13)
FAMILIES = (IPV4, IPV6)
_NEIGHBOUR_DISCOVERY = (133, 134, 135, 136)


def bypass_counter(route: str) -> str:
    """Return the name of the counter of what passed a route unrecorded, from client to server."""
    return f"bypass.{route}"


def answer_counter(route: str) -> str:
    """Return the name of the counter of what came back on a route that may be bypassed."""
    return f"answer.{route}"


def allow_counter(route: str) -> str:
    """Return the name of the counter of what a route allows, both ways."""
    return f"allow.{route}"


def route_key(route: str) -> bytes:
    """Return the key of a route in the set SINCE."""
    return struct.pack("=I", zlib.crc32(route.encode()))


def flow_set(version: int, generation: str) -> str:
    """Return the name of the set that counts flows of an IP version; `generation` is "a" or "b"."""
    return f"flows{version}{generation}"


def generation(applied: nft.Applied) -> str:
    """Return which of the two flow sets the applied rules count into; "a" when there are none."""
    first = next(iter(applied.rules.get("up4", ())), b"")
    return "b" if text(flow_set(4, "b")) in first else "a"


def build(config: Config, interfaces: Iterable[str], active: str) -> nft.Table:
    """Return the table for a configuration.

    `interfaces` are those that client subnets are reached through; `active` is the generation of
    the flow sets in use.
    """
    return _Builder(config, active).build(sorted(interfaces))


def flow_chains(family: _Family, generation: str) -> dict[str, list[list[Expression]]]:
    """Return the chains that count an allowed packet and let it pass: `up` from clients, `down`
    towards them.
    """
    chains = {}
    for name, address, port in (("up", family.source, 2), ("down", family.destination, 0)):
        key = [
            nft.payload(nft.NETWORK, address, family.size),
            nft.meta(nft.META_L4PROTO, family.proto_register),
        ]
        ported = [*key, nft.payload(nft.TRANSPORT, port, 2, family.port_register)]
        bare = [*key, nft.load(bytes(2), family.port_register)]
        end = [
            nft.remember(flow_set(family.version, generation)),
            *nft.set_mark(MARK_PASS),
            nft.ACCEPT,
        ]
        chains[f"{name}{family.version}"] = [
            [nft.meta(nft.META_L4PROTO), nft.in_set("ported"), *ported, *end],
            [nft.meta(nft.META_L4PROTO), nft.in_set("ported", inverted=True), *bare, *end],
            [nft.count("dropped"), nft.DROP],
        ]
    return chains


def _protocol(number: int) -> list[Expression]:
    return [nft.meta(nft.META_L4PROTO), nft.equals(bytes([number]))]


def _counted(name: str, *end: Expression) -> list[Expression]:
    return [nft.count(name), *end]


def _pass(name: str) -> list[Expression]:
    return [*nft.set_mark(MARK_PASS), nft.count(name), nft.ACCEPT]


class _Builder:
    """Writes the table of one configuration."""

    def __init__(self, config: Config, generation: str) -> None:
        self._config = config
        self._generation = generation
        self._table = nft.Table(TABLE, BASE, chains={BASE: []})
        self._table.counters = [
            "session", "redirected", "refused", "bypass", "control", "quic", "spoofed", "direct",
            "dropped",
        ]  # fmt: skip

    def build(self, interfaces: list[str]) -> nft.Table:
        self._shared_sets(interfaces)
        seen = [family for family in FAMILIES if family.sees(self._config.redirect.clients)]
        pre = self._table.chains[BASE]
        pre.append([nft.meta(nft.META_IIFNAME), nft.equals(_interface("lo")), nft.ACCEPT])
        pre.append(
            [*nft.own_sockets(), *nft.set_mark(MARK_LOCAL), *_counted("session", nft.ACCEPT)]
        )
        for family in FAMILIES:
            self._family_sets(family)
            self._table.chains |= flow_chains(family, self._generation)
        pre += [[*self._source(family), nft.goto(f"from{family.version}")] for family in seen]
        pre += self._strangers()
        pre += [[*self._destination(family), nft.goto(f"to{family.version}")] for family in seen]
        strip = [*_protocol(_TCP), nft.strip_option(SYN_OPTION)]
        self._table.chains["bypass"] = [strip, _pass("bypass")]
        for family in seen:
            self._from(family)
            self._refuse(family)
            self._tcp(family)
            self._to(family)
        return self._table

    def _shared_sets(self, interfaces: list[str]) -> None:
        sets = self._table.sets
        sets["interfaces"] = nft.ExactSet(
            nft.TYPE_IFNAME, 16, frozenset((_interface(name), False) for name in interfaces)
        )
        kind, numbers = PORTED
        sets["ported"] = nft.ExactSet(kind, 1, frozenset((bytes([n]), False) for n in numbers))
        sets[SINCE] = nft.DynamicSet(nft.TYPE_MARK, 4, FLOW_SIZE, KEEP_MS)

    def _family_sets(self, family: _Family) -> None:
        config, sets, version = self._config, self._table.sets, family.version
        nowhere = _networks(_IPV4_NOWHERE if version == 4 else _IPV6_NOWHERE)
        sets[f"clients{version}"] = family.addresses(config.redirect.clients)
        sets[f"bypass{version}"] = family.addresses(config.redirect.bypass)
        sets[f"refused{version}"] = family.addresses([*nowhere, *config.redirect.management])
        sets[f"errors{version}"] = family.types(family.errors)
        key = (family.address_type << 6 | nft.TYPE_PROTOCOL) << 6 | nft.TYPE_PORT
        for generation in "ab":
            flows = nft.DynamicSet(key, family.size + 8, FLOW_SIZE, KEEP_MS)
            sets[flow_set(version, generation)] = flows
        if version == 6:
            sets["linklocal6"] = family.addresses(_networks(("fe80::/10",)))
            sets["mapped6"] = family.addresses(_networks(_MAPPED))
            sets["discovery6"] = family.types(_NEIGHBOUR_DISCOVERY)

    def _source(self, family: _Family) -> list[Expression]:
        return self._in(family, family.source, f"clients{family.version}")

    def _destination(self, family: _Family) -> list[Expression]:
        return self._in(family, family.destination, f"clients{family.version}")

    def _in(self, family: _Family, offset: int, name: str) -> list[Expression]:
        version = [nft.meta(nft.META_NFPROTO), nft.equals(bytes([family.number]))]
        return [*version, nft.payload(nft.NETWORK, offset, family.size), nft.in_set(name)]

    def _strangers(self) -> list[list[Expression]]:
        """Return the rules for sources that are no clients: no way around the redirect by another
        address.
        """
        near = [nft.meta(nft.META_IIFNAME), nft.in_set("interfaces")]
        ipv6 = [nft.meta(nft.META_NFPROTO), nft.equals(bytes([IPV6.number]))]
        source = nft.payload(nft.NETWORK, IPV6.source, IPV6.size)
        link = [*near, *ipv6, source, nft.in_set("linklocal6")]
        routed = [*near, *ipv6, source, nft.in_set("linklocal6", inverted=True)]
        ipv4 = [nft.meta(nft.META_NFPROTO), nft.equals(bytes([IPV4.number]))]
        listener = nft.equals(struct.pack(">H", self._config.gate.listen_port))
        spoofed = [*nft.source_elsewhere(), *_counted("spoofed", nft.DROP)]
        return [
            [*link, *_protocol(_TCP), *nft.to_local(), *_counted("direct", nft.DROP)],
            [*routed, *spoofed],
            [*near, *ipv4, *spoofed],
            [
                *_protocol(_TCP),
                nft.payload(nft.TRANSPORT, 2, 2),
                listener,
                *nft.to_local(),
                *_counted("direct", nft.DROP),
            ],
        ]

    def _from(self, family: _Family) -> None:
        version = family.version
        to = nft.payload(nft.NETWORK, family.destination, family.size)
        kind = [*_protocol(family.icmp), nft.payload(nft.TRANSPORT, 0, 1)]
        control = _counted("control", nft.ACCEPT)
        rules: list[list[Expression]] = []
        if version == 6:
            rules.append([*kind, nft.in_set("discovery6"), *control])
            rules.append([to, nft.in_set("mapped6"), *_counted("dropped", nft.DROP)])
        rules.append([*kind, nft.equals(bytes([family.ping])), *nft.to_local(), *control])
        rules.append([*kind, nft.in_set(f"errors{version}"), *nft.to_local(), *control])
        rules.append([*nft.to_local(), nft.goto(f"refuse{version}")])
        rules.append([to, nft.in_set(f"refused{version}"), nft.goto(f"refuse{version}")])
        rules.append([to, nft.in_set(f"bypass{version}"), nft.goto("bypass")])
        if self._config.redirect.quic_reject:
            port = [nft.payload(nft.TRANSPORT, 2, 2), nft.equals(struct.pack(">H", _QUIC))]
            rules.append([*_protocol(_UDP), *port, *_counted("quic", nft.reject_port())])
        rules.append([*_protocol(_TCP), nft.goto(f"tcp{version}")])
        for number, route in self._routes(family, "allow"):
            where = self._where(family, number, route, answer=False)
            protocol = _protocol(protocol_number(route.protocol, version))
            counted = [nft.count(allow_counter(route.name)), nft.goto(f"up{version}")]
            rules.append([*protocol, *where, *counted])
            rules.append([*kind, nft.in_set(f"errors{version}"), *where[:2], *counted])
            self._count(allow_counter(route.name))
        rules.append(_counted("dropped", nft.DROP))
        self._table.chains[f"from{version}"] = rules

    def _refuse(self, family: _Family) -> None:
        to_listener = [*self._listener(family), *_counted("refused", nft.ACCEPT)]
        drop = _counted("dropped", nft.DROP)
        self._table.chains[f"refuse{family.version}"] = [[*_protocol(_TCP), *to_listener], drop]

    def _listener(self, family: _Family) -> list[Expression]:
        return [
            *nft.to_listener(family.number, self._config.gate.listen_port),
            *nft.set_mark(MARK_LOCAL),
        ]

    def _tcp(self, family: _Family) -> None:
        rules: list[list[Expression]] = []
        for number, route in self._routes(family, "intercept"):
            chain = f"route{number}.{family.version}"
            rules.append([*self._where(family, number, route, answer=False), nft.goto(chain)])
            redirected = [*self._listener(family), *_counted("redirected", nft.ACCEPT)]
            self._table.chains[chain] = [redirected, *self._without_listener(route)]
        rules.append([nft.goto(f"refuse{family.version}")])
        self._table.chains[f"tcp{family.version}"] = rules

    def _without_listener(self, route: Route) -> list[list[Expression]]:
        drop = _counted("dropped", nft.DROP)
        if route.on_failure == "closed":
            return [drop]
        name = bypass_counter(route.name)
        self._count(name)
        since = [nft.load(route_key(route.name)), nft.remember(SINCE)]
        return [[nft.strip_option(SYN_OPTION)], [*since, *_pass(name)], drop]

    def _to(self, family: _Family) -> None:
        version = family.version
        source = nft.payload(nft.NETWORK, family.source, family.size)
        kind = [*_protocol(family.icmp), nft.payload(nft.TRANSPORT, 0, 1)]
        rules: list[list[Expression]] = [
            [*nft.to_local(), nft.ACCEPT],
            [*kind, nft.in_set(f"errors{version}"), nft.goto(f"down{version}")],
            [source, nft.in_set(f"bypass{version}"), *_pass("bypass")],
        ]
        for number, route in self._routes(family, "intercept"):
            if route.on_failure == "bypass":
                where = self._where(family, number, route, answer=True)
                rules.append([*_protocol(_TCP), *where, *_pass(answer_counter(route.name))])
                self._count(answer_counter(route.name))
        for number, route in self._routes(family, "allow"):
            where = self._where(family, number, route, answer=True)
            protocol = _protocol(protocol_number(route.protocol, version))
            rules.append(
                [
                    *protocol,
                    *where,
                    nft.count(allow_counter(route.name)),
                    nft.goto(f"down{version}"),
                ]
            )
        rules.append(_counted("dropped", nft.DROP))
        self._table.chains[f"to{version}"] = rules

    def _routes(self, family: _Family, action: str) -> list[tuple[int, Route]]:
        return [
            (number, route)
            for number, route in enumerate(self._config.route)
            if route.action == action and family.sees(route.destinations)
        ]

    def _where(
        self, family: _Family, number: int, route: Route, *, answer: bool
    ) -> list[Expression]:
        """Continue when the packet is to, or with `answer` from, a route's destinations and
        ports.
        """
        name = f"route{number}.{family.version}"
        self._table.sets[f"{name}.to"] = family.addresses(route.destinations)
        address = family.source if answer else family.destination
        where = [nft.payload(nft.NETWORK, address, family.size), nft.in_set(f"{name}.to")]
        if route.ports.ranges != _ALL_PORTS:
            ports = nft.IntervalSet.of(nft.TYPE_PORT, 2, list(route.ports.ranges))
            self._table.sets[f"route{number}.ports"] = ports
            port = nft.payload(nft.TRANSPORT, 0 if answer else 2, 2)
            where += [port, nft.in_set(f"route{number}.ports")]
        return where

    def _count(self, name: str) -> None:
        if name not in self._table.counters:
            self._table.counters.append(name)


def protocol_number(name: str, version: int) -> int:
    """Return the IP protocol number of a route's `protocol`: "icmp" is that of the IP version."""
    if name == "icmp":
        return (IPV4 if version == 4 else IPV6).icmp
    return {"tcp": _TCP, "udp": _UDP}.get(name) or int(name)


def _networks(networks: Iterable[str]) -> list[Network]:
    return [ipaddress.ip_network(network) for network in networks]


def _interface(name: str) -> bytes:
    return name.encode().ljust(16, b"\0")
