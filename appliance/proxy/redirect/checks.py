"""What would keep redirected sessions from working, or let clients around the gate, as far as this
host can see it.

`narrows redirect apply`, `narrows doctor` and the gate's start ask; each `Problem` says what to do.
What other hosts do (whether a server's answers really come back through here) cannot be seen from
here, except where clients and servers share a link.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyroute2 import IPRoute

from appliance.proxy.redirect import routing

if TYPE_CHECKING:
    from appliance.config import Config, Network

_SYSCTLS = Path("/proc/sys/net")
_MAIN = 254
_FAMILIES = (socket.AF_INET, socket.AF_INET6)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong, and what to do about it."""

    problem: str
    hint: str

    def __str__(self) -> str:
        return f"{self.problem}: {self.hint}"


def own_addresses() -> set[str]:
    """Return every address of this network namespace, as text, without scope."""
    with IPRoute() as ip:
        found = set()
        for message in ip.get_addr():
            for name in ("IFA_LOCAL", "IFA_ADDRESS"):
                if message.get_attr(name):
                    found.add(str(message.get_attr(name)))
                    break
        return found


def client_interfaces(config: Config) -> list[str]:
    """Return the names of the interfaces through which the main table reaches client subnets."""
    with IPRoute() as ip:
        table = _Routes(ip)
        indexes = {index for network in config.redirect.clients for index, _ in table.to(network)}
        names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in ip.get_links()}
    return sorted({names[index] for index in indexes if index in names} - {"lo"})


def check(config: Config) -> list[Problem]:
    """Return what is wrong; empty when nothing is found."""
    problems = _sysctl_problems(config)
    before = routing.foreign_before_guard()
    if before:
        numbers = ", ".join(map(str, before))
        hint = f"they may route clients around the gate: give them priorities above {routing.END}"
        problems.append(Problem(f"policy rules {numbers} come before ours", hint))
    with IPRoute() as ip:
        problems += _route_problems(config, _Routes(ip))
    return problems


class _Routes:
    """The main routing table, as it is now."""

    def __init__(self, ip: IPRoute) -> None:
        self._routes: list[tuple[Network, int, bool, int]] = []
        for family in _FAMILIES:
            for route in ip.get_routes(family=family, table=_MAIN):
                self._routes += [
                    (_network(family, route), *hop, route["type"]) for hop in _hops(route)
                ]

    def to(self, network: Network) -> set[tuple[int, bool]]:
        """Return (interface, is it reached without a further router) of the routes that lead to
        parts of a network.

        Those inside it, and the most specific one that covers it.
        """
        mine = [
            entry for entry in self._routes if entry[0].version == network.version and entry[3] == 1
        ]
        inside = [entry for entry in mine if _within(entry[0], network)]
        around = [entry for entry in mine if _within(network, entry[0])]
        longest = max((entry[0].prefixlen for entry in around), default=-1)
        best = [entry for entry in around if entry[0].prefixlen == longest]
        return {(index, direct) for _, index, direct, _ in inside + best}


def _within(inner: Network, outer: Network) -> bool:
    return inner.version == outer.version and inner.subnet_of(outer)  # type: ignore[arg-type]


def _network(family: int, route: Any) -> Network:
    nothing = "0.0.0.0" if family == socket.AF_INET else "::"
    return ipaddress.ip_network(f"{route.get_attr('RTA_DST') or nothing}/{route['dst_len']}")


def _hops(route: Any) -> list[tuple[int, bool]]:
    """Return (interface, without a further router) of each next hop."""
    several = route.get_attr("RTA_MULTIPATH")
    if several:
        return [(hop["oif"], hop.get_attr("RTA_GATEWAY") is None) for hop in several]
    gateway = route.get_attr("RTA_GATEWAY") or route.get_attr("RTA_VIA")
    return [(route.get_attr("RTA_OIF") or 0, gateway is None)]


def _sysctl(path: str) -> str:
    with contextlib.suppress(OSError):
        return (_SYSCTLS / path).read_text(encoding="ascii").strip()
    return ""


def _sysctl_problems(config: Config) -> list[Problem]:
    found = []
    versions = {network.version for network in config.redirect.clients}
    wrong = []
    if 4 in versions:
        wrong.append(("ipv4/ip_forward", "0", "what bypasses or is allowed is not routed"))
        wrong.append(
            ("ipv4/tcp_fwmark_accept", "1", "answers to clients would be sent to this host itself")
        )
        wrong.append(
            ("ipv4/fwmark_reflect", "1", "answers to clients would be sent to this host itself")
        )
    if 6 in versions:
        wrong.append(("ipv6/conf/all/forwarding", "0", "what bypasses or is allowed is not routed"))
        wrong.append(
            ("ipv6/fwmark_reflect", "1", "answers to clients would be sent to this host itself")
        )
    interfaces = client_interfaces(config)
    marked = [f"ipv4/conf/{name}/src_valid_mark" for name in ("all", *interfaces)]
    wrong += [
        (path, "1", "redirected packets would be dropped as martians")
        for path in marked
        if 4 in versions
    ]
    for path, value, why in wrong:
        if _sysctl(path) == value:
            name = "net." + path.replace("/", ".")
            found.append(
                Problem(f"{name} is {value}, {why}", f"sysctl -w {name}={int(value == '0')}")
            )
    return found


def _route_problems(config: Config, table: _Routes) -> list[Problem]:
    found = []
    near: set[int] = set()
    for network in config.redirect.clients:
        hops = table.to(network)
        near |= {index for index, _ in hops}
        if not hops:
            hint = "add the route, then apply again"
            found.append(Problem(f"no route leads to clients {network}", hint))
    for route in config.route:
        for network in _narrow(route.destinations):
            if not table.to(network):
                found.append(
                    Problem(
                        f"route {route.name!r}: no route leads to {network}", "add a route to it"
                    )
                )
        shared = {
            index for n in route.destinations for index, direct in table.to(n) if direct
        } & near
        apart = {index for n in config.redirect.clients for index, _ in table.to(n)}
        if (
            route.source == "client"
            and route.action == "intercept"
            and _one_armed(config, route.destinations, table)
        ):
            hint = 'servers would answer clients directly and not through the gate: set source = "gate"'
            found.append(
                Problem(f"route {route.name!r}: clients and servers are on one link", hint)
            )
        del shared, apart
    return found
