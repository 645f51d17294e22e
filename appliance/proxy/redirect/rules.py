"""The rule set: client subnets' TCP goes to the listeners, and nothing else passes that is not
allowed and counted.

One chain at prerouting (`pre`), before routing decides; the others are reached from it. What enters
or leaves a client subnet through the gate is a session, a listed bypass, an allowed and counted
flow, or nothing:

    pre       lo passes, except with a client's address; packets of our own sockets, and ICMP
              errors about them, are delivered here; then by address:
    from4/6   from a client: what keeps the network working; own, management and martian
              destinations (`refuse`); the bypass list; QUIC; TCP by route (`tcp`); other protocols
              by route; answers to another client subnet (`answer`); drop
    refuse    TCP goes to the listener, which refuses and records it; anything else is dropped
    tcp4/6    first route that matches (`routeN`); what no route names goes to the listener too,
              which refuses it
    routeN    the listener; without one, drop, or (on_failure = "bypass") strip the SYN option,
              count, pass
    to4/6     towards a client: to this host itself; to a socket of ours that is in TIME_WAIT;
              else `answer`
    answer4/6 the return way of bypasses and allowed flows, and ICMP errors; drop
    up4/6, down4/6   count an allowed packet under client, protocol and port, and let it pass;
              `flows` swaps the set that they count in

A packet that passes carries MARK_PASS, one for a socket of ours MARK_LOCAL; `routing` says what the
marks do. No connection tracking is used. The kernel reassembles fragments before `pre`, because
tproxy asks for it, so ports can always be read.
"""

from __future__ import annotations

import ipaddress
import struct
import zlib
from typing import TYPE_CHECKING

from appliance.proxy.redirect import expressions as expr
from appliance.proxy.redirect import sets
from appliance.proxy.redirect.expressions import ACCEPT, DROP
from appliance.proxy.redirect.family import FAMILIES, IPV4, IPV6, Family
from appliance.proxy.redirect.netlink import text
from appliance.proxy.redirect.nft import Table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from appliance.config import Config, Network, Route
    from appliance.proxy.redirect.expressions import Expression, Rule

TABLE = "narrows"
BASE = "pre"
MARK_LOCAL = 0x4E01  #: deliver to a socket of this host
MARK_PASS = 0x4E02  #: route as if there were no gate
SYN_OPTION = 253
#: Keys in a flow set; what finds no room is dropped, so that nothing passes uncounted.
FLOW_SIZE = 65536
KEEP_MS = 365 * 86_400_000  #: how long an element waits to be read
SINCE = "since"  #: set with the first packet of each bypass
FLOW_CHAINS = ("up4", "down4", "up6", "down6")
PORTED = (6, 17, 33, 132, 136)  #: protocols with ports: TCP, UDP, DCCP, SCTP, UDP-Lite
COUNTERS = (
    "session", "redirected", "refused", "bypass", "control", "quic", "spoofed", "direct", "dropped",
)  # fmt: skip

_TCP, _UDP, _QUIC = 6, 17, 443
_ALL_PORTS = ((1, 65535),)
_IPV4_NOWHERE = ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3")
_IPV6_NOWHERE = ("::/127", "fe80::/10", "ff00::/8")
_MAPPED = ("::ffff:0:0/96",)  # an IPv6 socket would reach them by IPv4
_LINK = ("fe80::/10", "::/128")  # sources that are never routed
_NEIGHBOUR_DISCOVERY = (133, 134, 135, 136)
_NO_HOSTS = (2, 3, 4, 5)  # RTN_LOCAL, _BROADCAST, _ANYCAST, _MULTICAST: this host takes them


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


def generation(applied: dict[str, list[bytes]]) -> str:
    """Return which of the two flow sets applied rules, by chain, count in; "a" when there are
    none.
    """
    first = next(iter(applied.get("up4", ())), b"")
    return "b" if text(flow_set(4, "b")) in first else "a"


def protocol_number(name: str, version: int) -> int:
    """Return the IP protocol number of a route's `protocol`: "icmp" is that of the IP version."""
    if name == "icmp":
        return (IPV4 if version == 4 else IPV6).icmp
    return {"tcp": _TCP, "udp": _UDP}.get(name) or int(name)


def build(config: Config, interfaces: Iterable[str], active: str) -> Table:
    """Return the table for a configuration.

    `interfaces` are those that client subnets are reached through; `active` is the generation of
    the flow sets in use.
    """
    return _Builder(config, active).build(sorted(interfaces))


def flow_chains(family: Family, active: str) -> dict[str, list[Rule]]:
    """Return the chains that count an allowed packet and let it pass: `up` from clients, `down`
    towards them.
    """
    chains = {}
    ways = (("up", family.source, 2), ("down", family.destination, 0))
    for name, client, port in ways:
        key = [client, expr.meta(expr.META_L4PROTO, family.protocol_register)]
        ported = [*key, expr.payload(expr.TRANSPORT, port, 2, family.port_register)]
        bare = [*key, expr.load(bytes(2), family.port_register)]
        end = [
            expr.remember(flow_set(family.version, active)),
            *expr.set_mark(MARK_PASS),
            ACCEPT,
        ]
        chains[f"{name}{family.version}"] = [
            [expr.meta(expr.META_L4PROTO), expr.in_set("ported"), *ported, *end],
            [expr.meta(expr.META_L4PROTO), expr.in_set("ported", inverted=True), *bare, *end],
            _drop("dropped"),
        ]
    return chains


def _protocol(number: int) -> Rule:
    return [expr.meta(expr.META_L4PROTO), expr.equals(bytes([number]))]


def _drop(counter: str) -> Rule:
    return [expr.count(counter), DROP]


def _pass(counter: str) -> Rule:
    return [*expr.set_mark(MARK_PASS), expr.count(counter), ACCEPT]


def _deliver(counter: str) -> Rule:
    return [*expr.set_mark(MARK_LOCAL), expr.count(counter), ACCEPT]


class _Builder:
    """Writes the table of one configuration."""

    def __init__(self, config: Config, active: str) -> None:
        self._config = config
        self._active = active
        self._table = Table(TABLE, BASE, chains={BASE: []}, counters=list(COUNTERS))
        self._seen = [family for family in FAMILIES if family.sees(config.redirect.clients)]

    def build(self, interfaces: list[str]) -> Table:
        chains, seen = self._table.chains, self._seen
        self._shared_sets(interfaces)
        ours = [*expr.transparent_socket(), *expr.wildcard_socket(inverted=True)]
        pre = chains[BASE]
        pre += self._inside()
        pre.append([*ours, *_deliver("session")])
        pre += [[*_in(f, f.source, "clients"), expr.goto(f"from{f.version}")] for f in seen]
        pre += self._strangers()
        pre += [[*_in(f, f.destination, "clients"), expr.goto(f"to{f.version}")] for f in seen]
        strip = [*_protocol(_TCP), expr.strip_option(SYN_OPTION)]
        chains["bypass"] = [strip, _pass("bypass")]
        for family in FAMILIES:
            self._family_sets(family)
            chains |= flow_chains(family, self._active)
        for family in seen:
            chains[f"from{family.version}"] = self._from(family)
            chains[f"refuse{family.version}"] = self._refuse(family)
            chains[f"tcp{family.version}"] = self._tcp(family)
            chains[f"to{family.version}"] = self._to(family)
            chains[f"answer{family.version}"] = self._answer(family)
        return self._table

    def _inside(self) -> list[Rule]:
        """Return the rules for what this host sends to itself: no session with a client's address
        can be one with this host, whatever its listener thinks.
        """
        loopback = [expr.meta(expr.META_IIFNAME), expr.equals(_interface("lo"))]
        clients = [[*loopback, *_in(f, f.source, "clients"), *_drop("spoofed")] for f in self._seen]
        return [[*loopback, *expr.from_local(), ACCEPT], *clients, [*loopback, ACCEPT]]

    def _shared_sets(self, interfaces: list[str]) -> None:
        add = self._table.sets
        names = frozenset((_interface(name), False) for name in interfaces)
        add["interfaces"] = sets.ExactSet(sets.TYPE_IFNAME, 16, names)
        add["ported"] = sets.ExactSet.of(sets.TYPE_PROTOCOL, [bytes([n]) for n in PORTED])
        kinds = [struct.pack("=I", number) for number in _NO_HOSTS]
        add["nohosts"] = sets.ExactSet.of(sets.TYPE_ADDRESS_KIND, kinds)
        add[SINCE] = sets.DynamicSet(sets.TYPE_MARK, 4, FLOW_SIZE, KEEP_MS)

    def _family_sets(self, family: Family) -> None:
        redirect, add, version = self._config.redirect, self._table.sets, family.version
        nowhere = _networks(_IPV4_NOWHERE if version == 4 else _IPV6_NOWHERE)
        add[f"clients{version}"] = family.addresses(redirect.clients)
        add[f"bypass{version}"] = family.addresses(redirect.bypass)
        add[f"refused{version}"] = family.addresses([*nowhere, *redirect.management])
        add[f"errors{version}"] = family.types(family.errors)
        key = (family.address_type << 6 | sets.TYPE_PROTOCOL) << 6 | sets.TYPE_PORT
        for name in (flow_set(version, "a"), flow_set(version, "b")):
            add[name] = sets.DynamicSet(key, family.size + 8, FLOW_SIZE, KEEP_MS)
        if version == 6:
            add["link6"] = family.addresses(_networks(_LINK))
            add["mapped6"] = family.addresses(_networks(_MAPPED))
            add["discovery6"] = family.types(_NEIGHBOUR_DISCOVERY)

    def _strangers(self) -> list[Rule]:
        """Return the rules for sources that are no clients: no way around the redirect by another
        address, and none to the listener itself.
        """
        near = [expr.meta(expr.META_IIFNAME), expr.in_set("interfaces")]
        elsewhere = [*expr.source_elsewhere(), *_drop("spoofed")]
        ipv4 = [*near, *IPV4.mine, IPV4.source, expr.equals(bytes(4), inverted=True)]
        ipv6 = [*near, *IPV6.mine, IPV6.source]
        rules = [[*ipv4, *elsewhere], [*ipv6, expr.in_set("link6", inverted=True), *elsewhere]]
        to_us = [*_protocol(_TCP), *expr.to_local()]
        if IPV6 in self._seen:
            rules.append([*ipv6, expr.in_set("link6"), *to_us, expr.goto("refuse6")])
        listener = expr.equals(struct.pack(">H", self._config.gate.listen_port))
        port = [expr.payload(expr.TRANSPORT, 2, 2), listener]
        return [*rules, [*to_us, *port, *_drop("direct")]]

    def _from(self, family: Family) -> list[Rule]:
        version, to, kind = family.version, family.destination, family.icmp_kind
        control = [expr.count("control"), ACCEPT]
        rules: list[Rule] = []
        if version == 6:
            rules.append([*kind, expr.in_set("discovery6"), *control])
            rules.append([to, expr.in_set("mapped6"), *_drop("dropped")])
        rules += [
            [*kind, expr.equals(bytes([family.ping])), *expr.to_local(), *control],
            [*kind, expr.in_set(f"errors{version}"), *expr.to_local(), *control],
            [*_protocol(_TCP), *expr.opens_no_connection(), *self._our_own(), *control],
            [expr.kind_of_destination(), expr.in_set("nohosts"), expr.goto(f"refuse{version}")],
            [to, expr.in_set(f"refused{version}"), expr.goto(f"refuse{version}")],
            [to, expr.in_set(f"bypass{version}"), expr.goto("bypass")],
        ]
        if self._config.redirect.quic_reject:
            port = [expr.payload(expr.TRANSPORT, 2, 2), expr.equals(struct.pack(">H", _QUIC))]
            rejected = [expr.count("quic"), expr.reject_port()]
            rules.append([*_protocol(_UDP), *port, *rejected])
        rules.append([*_protocol(_TCP), expr.goto(f"tcp{version}")])
        for number, route in self._routes(family, "allow"):
            counted = [self._counted(allow_counter(route.name)), expr.goto(f"up{version}")]
            where = self._where(family, number, route, answer=False)
            rules.append([*_protocol(protocol_number(route.protocol, version)), *where, *counted])
            rules.append([*kind, expr.in_set(f"errors{version}"), *where[:2], *counted])
        rules.append([to, expr.in_set(f"clients{version}"), expr.goto(f"answer{version}")])
        return [*rules, _drop("dropped")]

    def _our_own(self) -> Rule:
        """Continue for answers to connections that this host opened itself (source = "gate")."""
        return [*expr.to_local(), *expr.wildcard_socket(inverted=True)]

    def _refuse(self, family: Family) -> list[Rule]:
        return [[*_protocol(_TCP), *self._listener(family, "refused")], _drop("dropped")]

    def _listener(self, family: Family, counter: str) -> Rule:
        port = self._config.gate.listen_port
        return [*expr.to_listener(family.number, port), *_deliver(counter)]

    def _tcp(self, family: Family) -> list[Rule]:
        rules: list[Rule] = []
        for number, route in self._routes(family, "intercept"):
            chain = f"route{number}.{family.version}"
            rules.append([*self._where(family, number, route, answer=False), expr.goto(chain)])
            redirected = self._listener(family, "redirected")
            self._table.chains[chain] = [redirected, *self._without_listener(route)]
        return [*rules, [expr.goto(f"refuse{family.version}")]]

    def _without_listener(self, route: Route) -> list[Rule]:
        if route.on_failure == "closed":
            return [_drop("dropped")]
        counter = bypass_counter(route.name)
        self._counted(counter)
        since = [expr.load(route_key(route.name)), expr.remember(SINCE)]
        return [[expr.strip_option(SYN_OPTION)], [*since, *_pass(counter)], _drop("dropped")]

    def _to(self, family: Family) -> list[Rule]:
        tcp = [*_protocol(_TCP), *expr.transparent_socket()]
        answer = expr.goto(f"answer{family.version}")
        return [
            [*expr.to_local(), ACCEPT],
            [*tcp, *expr.wildcard_socket(), answer],
            [*tcp, *_deliver("session")],
            [answer],
        ]

    def _answer(self, family: Family) -> list[Rule]:
        version = family.version
        rules: list[Rule] = []
        if family.sees(self._config.redirect.bypass):
            listed = expr.in_set(f"bypass{version}")
            rules.append([family.source, listed, *_pass("bypass")])
        for number, route in self._routes(family, "intercept"):
            if route.on_failure == "bypass":
                counter = answer_counter(route.name)
                self._counted(counter)
                where = self._where(family, number, route, answer=True)
                answers = [*_protocol(_TCP), *expr.opens_no_connection(), *where]
                rules.append([*answers, *_pass(counter)])
        for number, route in self._routes(family, "allow"):
            counted = [self._counted(allow_counter(route.name)), expr.goto(f"down{version}")]
            where = self._where(family, number, route, answer=True)
            rules.append([*_protocol(protocol_number(route.protocol, version)), *where, *counted])
        if rules:  # else nothing passes that an error could be about
            errors = [*family.icmp_kind, expr.in_set(f"errors{version}")]
            rules.insert(0, [*errors, expr.goto(f"down{version}")])
        return [*rules, _drop("dropped")]

    def _routes(self, family: Family, action: str) -> list[tuple[int, Route]]:
        routes = enumerate(self._config.route)
        return [(n, r) for n, r in routes if r.action == action and family.sees(r.destinations)]

    def _where(self, family: Family, number: int, route: Route, *, answer: bool) -> Rule:
        """Continue when the packet is to, or with `answer` from, a route's destinations and
        ports.
        """
        name = f"route{number}.{family.version}.to"
        self._table.sets[name] = family.addresses(route.destinations)
        where = [family.source if answer else family.destination, expr.in_set(name)]
        if route.ports.ranges != _ALL_PORTS:
            ports = f"route{number}.ports"
            self._table.sets[ports] = sets.IntervalSet.of(sets.TYPE_PORT, 2, route.ports.ranges)
            port = expr.payload(expr.TRANSPORT, 0 if answer else 2, 2)
            where += [port, expr.in_set(ports)]
        return where

    def _counted(self, name: str) -> Expression:
        """Return the expression that counts in a counter of this table."""
        if name not in self._table.counters:
            self._table.counters.append(name)
        return expr.count(name)


def _in(family: Family, address: Expression, name: str) -> Rule:
    return [*family.mine, address, expr.in_set(f"{name}{family.version}")]


def _networks(networks: Iterable[str]) -> list[Network]:
    return [ipaddress.ip_network(network) for network in networks]


def _interface(name: str) -> bytes:
    return name.encode().ljust(16, b"\0")
