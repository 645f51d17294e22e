"""What would keep redirected sessions from working, or let clients around the gate, as far as this
host can see it.

`narrows redirect`, `narrows doctor` and the gate's start ask; each `Problem` says what to do. What
other hosts do (whether a server's answers really come back through here) cannot be seen from here,
except where clients and servers are reached through one link.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyroute2 import IPRoute

from appliance.proxy.redirect import routing

if TYPE_CHECKING:
    from collections.abc import Iterable

    from appliance.config import Config, Network, Route

_SYSCTLS = Path("/proc/sys/net")
_MAIN, _UNICAST = 254, 1
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
        table = _Routes.read(ip)
        indexes = {index for network in config.redirect.clients for index in table.to(network)}
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
        problems += _route_problems(config, _Routes.read(ip))
    return problems


@dataclass(frozen=True, slots=True)
class _Routes:
    """The main routing table, as it is now: (network, index of the interface)."""

    entries: tuple[tuple[Network, int], ...]

    @classmethod
    def read(cls, ip: IPRoute) -> _Routes:
        found = []
        for family in _FAMILIES:
            for route in ip.get_routes(family=family, table=_MAIN):
                network = _network(family, route)
                if route["type"] == _UNICAST and not network.is_link_local:
                    found += [(network, index) for index in _hops(route)]
        return cls(tuple(found))

    def to(self, network: Network) -> set[int]:
        """Return the interfaces of the routes that lead to parts of a network.

        Those inside it, and the most specific one that covers it.
        """
        inside = [entry for entry in self.entries if _within(entry[0], network)]
        around = [entry for entry in self.entries if _within(network, entry[0])]
        longest = max((entry[0].prefixlen for entry in around), default=-1)
        best = [entry for entry in around if entry[0].prefixlen == longest]
        return {index for _, index in inside + best}

    def without(self, networks: Iterable[Network]) -> _Routes:
        """Return the routes that lead elsewhere than to those networks."""
        left = [entry for entry in self.entries if not any(_within(entry[0], n) for n in networks)]
        return _Routes(tuple(left))


def _within(inner: Network, outer: Network) -> bool:
    # mypy does not see that equal versions are equal types
    return inner.version == outer.version and inner.subnet_of(outer)  # type: ignore[arg-type]


def _network(family: int, route: Any) -> Network:
    nothing = "0.0.0.0" if family == socket.AF_INET else "::"
    return ipaddress.ip_network(f"{route.get_attr('RTA_DST') or nothing}/{route['dst_len']}")


def _hops(route: Any) -> list[int]:
    """Return the interface of each next hop."""
    several = route.get_attr("RTA_MULTIPATH")
    if several:
        return [hop["oif"] for hop in several]
    return [route.get_attr("RTA_OIF") or 0]


def _sysctl(path: str) -> str:
    try:
        return (_SYSCTLS / path).read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _sysctl_problems(config: Config) -> list[Problem]:
    versions = {network.version for network in config.redirect.clients}
    found = []
    if 4 in versions:
        found += _not_forwarding("ipv4/ip_forward")
        found += _reverse_path_problems()
    if 6 in versions:
        found += _not_forwarding("ipv6/conf/all/forwarding")
    return found


def _not_forwarding(path: str) -> list[Problem]:
    if _sysctl(path) != "0":
        return []
    name = "net." + path.replace("/", ".")
    text = f"{name} is 0: what bypasses or is allowed is not routed"
    return [Problem(text, f"sysctl -w {name}=1")]


def _reverse_path_problems() -> list[Problem]:
    """Return a problem when the reverse path filter would drop what passes.

    The filter asks for a route back without the packet's mark, unless src_valid_mark says
    otherwise, and the guard answers that there is none (net/ipv4/fib_frontend.c,
    __fib_validate_source).
    """
    names = sorted(path.name for path in (_SYSCTLS / "ipv4/conf").iterdir())
    strict = [name for name in names if _sysctl(f"ipv4/conf/{name}/rp_filter") not in {"", "0"}]
    if _sysctl("ipv4/conf/all/src_valid_mark") == "1" or not {*strict} - {"default", "lo"}:
        return []
    text = f"rp_filter is on ({', '.join(strict)}), and drops what passes the guard by its mark"
    return [Problem(text, "sysctl -w net.ipv4.conf.all.src_valid_mark=1")]


def _route_problems(config: Config, table: _Routes) -> list[Problem]:
    clients = config.redirect.clients
    found = []
    for network in clients:
        if not table.to(network):
            hint = "add the route, then apply again"
            found.append(Problem(f"no route leads to clients {network}", hint))
    near = {index for network in clients for index in table.to(network)}
    others = table.without(clients)
    for route in config.route:
        for network in route.destinations:
            if network.prefixlen and not table.to(network):
                lost = f"route {route.name!r}: no route leads to {network}"
                found.append(Problem(lost, "add a route to it"))
        if route.source == "client" and route.action == "intercept":
            far = {index for network in route.destinations for index in others.to(network)}
            found += _one_armed(route, near & far)
    return found


def _one_armed(route: Route, shared: set[int]) -> list[Problem]:
    if not shared:
        return []
    names = ", ".join(sorted(socket.if_indextoname(index) for index in shared))
    text = f"route {route.name!r}: clients and servers are both reached through {names}"
    hint = 'servers may answer clients directly and not through the gate: set source = "gate"'
    return [Problem(text, hint)]
