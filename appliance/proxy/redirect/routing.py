"""Policy routing: marked packets to the local listeners, and the guard that keeps everything else of clients out.

The guard says that what comes in on a client's interface goes nowhere but to this host, unless it carries our mark.
It does not depend on nftables, so even `nft flush ruleset` fails closed. Local addresses match the kernel's rule 0 first, so
the gate itself stays reachable. Our rules carry a protocol number of their own and are found by it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from appliance.proxy.redirect.rules import MARK_LOCAL, MARK_ROUTED

if TYPE_CHECKING:
    from appliance.config import Config

LOCAL_TABLE = 7100
MAIN_TABLE = 254
PROTOCOL = 0x4E  #: FRA_PROTOCOL and route protocol of everything here
PRIORITY_LOCAL, PRIORITY_ROUTED, PRIORITY_GUARD = 100, 110, 120
_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_UNREACHABLE, _TO_TABLE = 7, 1


@dataclass(frozen=True, slots=True, order=True)
class PolicyRule:
    """One rule of ours; `interface` only for the guard, `mark` only for the others."""

    family: int
    priority: int
    mark: int
    table: int
    interface: str


def client_interfaces(config: Config) -> list[str]:
    """Return the interfaces on which the client subnets are reached, by the main table's own answer."""
    names = set()
    with IPRoute() as ip:
        for network in config.redirect.clients:
            probe = str(network.network_address + (1 if network.num_addresses > 1 else 0))
            family = socket.AF_INET if network.version == 4 else socket.AF_INET6
            best: tuple[int, int] | None = None
            for route in ip.get_routes(family=family, table=MAIN_TABLE):
                destination = route.get_attr("RTA_DST")
                length, index = route["dst_len"], route.get_attr("RTA_OIF")
                inside = destination is None or ipaddress.ip_address(probe) in ipaddress.ip_network(
                    f"{destination}/{length}", strict=False
                )
                if inside and index is not None and (best is None or length > best[0]):
                    best = (length, index)
            if best is not None:
                names.add(ip.get_links(best[1])[0].get_attr("IFLA_IFNAME"))
    return sorted(names)


def wanted(config: Config) -> list[PolicyRule]:
    """Return the rules that the configuration needs, the guard first."""
    interfaces = client_interfaces(config)
    rules = [PolicyRule(f, PRIORITY_GUARD, 0, 0, name) for f in _FAMILIES for name in interfaces]
    for family in _FAMILIES:
        rules.append(PolicyRule(family, PRIORITY_LOCAL, MARK_LOCAL, LOCAL_TABLE, ""))
        rules.append(PolicyRule(family, PRIORITY_ROUTED, MARK_ROUTED, MAIN_TABLE, ""))
    return rules


def present() -> list[PolicyRule]:
    """Return our rules that are in the kernel."""
    found = []
    with IPRoute() as ip:
        for family in _FAMILIES:
            for rule in ip.get_rules(family=family):
                if rule.get_attr("FRA_PROTOCOL") != PROTOCOL:
                    continue
                guard = rule["action"] == _UNREACHABLE
                found.append(
                    PolicyRule(
                        family,
                        rule.get_attr("FRA_PRIORITY") or 0,
                        rule.get_attr("FRA_FWMARK") or 0,
                        0 if guard else rule.get_attr("FRA_TABLE") or rule["table"],
                        rule.get_attr("FRA_IIFNAME") or "",
                    )
                )
    return found


def _arguments(rule: PolicyRule) -> dict[str, object]:
    arguments: dict[str, object] = {"family": rule.family, "priority": rule.priority, "protocol": PROTOCOL}
    if rule.interface:
        return arguments | {"iifname": rule.interface, "action": "unreachable"}
    return arguments | {"fwmark": rule.mark, "table": rule.table}


def add(rule: PolicyRule) -> None:
    """Add a rule."""
    with IPRoute() as ip:
        ip.rule("add", **_arguments(rule))


def remove(rule: PolicyRule) -> None:
    """Remove a rule of ours; one that is gone is not missed."""
    with IPRoute() as ip, contextlib.suppress(NetlinkError):
        ip.rule("del", **_arguments(rule))


def local_routes_present() -> bool:
    """Say whether the local table delivers everything to this host, for both families."""
    with IPRoute() as ip:
        return all(
            any(True for _ in ip.get_routes(family=family, table=LOCAL_TABLE)) for family in _FAMILIES
        )


def add_local_routes() -> None:
    """Make marked packets local, for both families."""
    with IPRoute() as ip:
        loopback = ip.link_lookup(ifname="lo")[0]
        for family, everything in ((socket.AF_INET, "0.0.0.0/0"), (socket.AF_INET6, "::/0")):
            ip.route(
                "replace", family=family, dst=everything, type="local", oif=loopback, table=LOCAL_TABLE,
                scope=254 if family == socket.AF_INET else 0, proto=PROTOCOL,
            )  # fmt: skip


def remove_local_routes() -> None:
    """Empty the local table."""
    with IPRoute() as ip:
        for family in _FAMILIES:
            with contextlib.suppress(NetlinkError):
                ip.flush_routes(family=family, table=LOCAL_TABLE)
