"""Policy routing: marked packets reach the local listeners, and the guard keeps everything else of
clients out.

    100  iif lo goto 105              what this host itself sends is none of the guard's business
    101  fwmark 0x4e01 lookup 7100    to a socket of ours: table 7100 makes every address local
    102  fwmark 0x4e02 goto 105       what the rule set lets pass goes on as if there were no gate
    103  from CLIENTS unreachable     the guard: no client subnet is routed,
    104  to CLIENTS unreachable       neither way
    105  nop                          where the other rules of this host go on

The guard does not depend on nftables, so even `nft flush ruleset` fails closed. Local addresses
match the kernel's rule 0 first, so the gate itself stays reachable. Rule 100 comes first because
answers may carry the mark of what they answer (fwmark_reflect, tcp_fwmark_accept), and because the
check of a packet's source asks as if from lo (src_valid_mark): neither may end in table 7100.

Everything goes in, or out, in one system call: the kernel has taken all of it or none when a
process dies. What is ours carries PROTOCOL and is found by it; nothing else is touched.
"""

from __future__ import annotations

import ipaddress
import socket
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyroute2 import IPRoute
from pyroute2.netlink import NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST
from pyroute2.netlink.rtnl import RTM_DELROUTE, RTM_DELRULE, RTM_NEWROUTE, RTM_NEWRULE
from pyroute2.netlink.rtnl.fibmsg import fibmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from appliance.proxy.redirect.netlink import enlarge
from appliance.proxy.redirect.rules import MARK_LOCAL, MARK_PASS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from appliance.config import Config, Network

LOCAL_TABLE = 7100
PROTOCOL = 0x4E  #: FRA_PROTOCOL and RTA_PROTOCOL of everything here
LOOPBACK, LOCAL, PASS, FROM_CLIENTS, TO_CLIENTS, END = range(100, 106)
_FIRST = LOOPBACK
_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_TO_TABLE, _GOTO, _NOP, _UNREACHABLE = 1, 2, 3, 7
_TABLE_COMPAT = 252  # RT_TABLE_COMPAT: the number stands in FRA_TABLE
_LOCAL_ROUTE, _SCOPE_HOST, _UNIVERSE = 2, 254, 0


@dataclass(frozen=True, slots=True, order=True)
class PolicyRule:
    """One rule of ours; what does not apply is zero or empty."""

    family: int
    priority: int
    action: int
    mark: int = 0
    table: int = 0
    target: int = 0  #: of a goto
    interface: str = ""
    source: str = ""  #: "address/length"
    destination: str = ""

    def __str__(self) -> str:
        version = "IPv6" if self.family == socket.AF_INET6 else "IPv4"
        parts = [f"{version} rule {self.priority}:"]
        parts += [f"from {self.source}"] * bool(self.source)
        parts += [f"to {self.destination}"] * bool(self.destination)
        parts += [f"iif {self.interface}"] * bool(self.interface)
        parts += [f"fwmark {self.mark:#x}"] * bool(self.mark)
        match self.action:
            case 1:
                parts.append(f"lookup {self.table}")
            case 2:
                parts.append(f"goto {self.target}")
            case 3:
                parts.append("nop")
            case _:
                parts.append("unreachable (guard)")
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class Changes:
    """What to add and what to remove."""

    add: tuple[PolicyRule, ...] = ()
    remove: tuple[PolicyRule, ...] = ()
    add_local: tuple[int, ...] = ()  #: families whose route of LOCAL_TABLE is missing
    remove_local: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.add or self.remove or self.add_local or self.remove_local)

    def texts(self) -> list[str]:
        """Say each change to a person."""
        texts = [f"add {rule}" for rule in self.add]
        texts += [f"add {_version(f)} local route to table {LOCAL_TABLE}" for f in self.add_local]
        texts += [f"remove {rule}" for rule in self.remove]
        texts += [
            f"remove {_version(f)} local route from table {LOCAL_TABLE}" for f in self.remove_local
        ]
        return texts


def wanted(clients: Iterable[Network]) -> list[PolicyRule]:
    """Return the rules that guard the client subnets, in the order in which they may be added one
    by one.
    """
    networks = list(clients)
    rules = []
    for family in _FAMILIES:
        version = 6 if family == socket.AF_INET6 else 4
        mine = sorted(map(str, _collapsed(n for n in networks if n.version == version)))
        rules += [
            PolicyRule(family, END, _NOP),
            PolicyRule(family, LOOPBACK, _GOTO, target=END, interface="lo"),
            PolicyRule(family, LOCAL, _TO_TABLE, mark=MARK_LOCAL, table=LOCAL_TABLE),
            PolicyRule(family, PASS, _GOTO, mark=MARK_PASS, target=END),
            *(PolicyRule(family, FROM_CLIENTS, _UNREACHABLE, source=text) for text in mine),
            *(PolicyRule(family, TO_CLIENTS, _UNREACHABLE, destination=text) for text in mine),
        ]
    return rules


def _collapsed(networks: Iterable[Network]) -> list[Network]:
    """Return the fewest networks of one IP version that cover the same addresses."""
    return list(ipaddress.collapse_addresses(networks))  # type: ignore[type-var]  # all one version


def present() -> list[PolicyRule]:
    """Return our rules that are in the kernel."""
    found = []
    with IPRoute() as ip:
        for family in _FAMILIES:
            found += [_read(family, rule) for rule in ip.get_rules(family=family) if _ours(rule)]
    return found


def foreign_before_guard() -> list[int]:
    """Return the priorities of rules that are not ours and come before the guard, without the
    kernel's own rule 0.
    """
    with IPRoute() as ip:
        rules = [rule for family in _FAMILIES for rule in ip.get_rules(family=family)]
    priorities = {rule.get_attr("FRA_PRIORITY") or 0 for rule in rules if not _ours(rule)}
    return sorted(priority for priority in priorities if 0 < priority <= END)


def changes(config: Config) -> Changes:
    """Return what is missing of the rules that the configuration needs, and what of ours it does
    not need.
    """
    want, have = Counter(wanted(config.redirect.clients)), Counter(present())
    missing = [rule for rule in wanted(config.redirect.clients) if rule not in have]
    surplus = tuple((have - want).elements())
    local = local_routes()
    return Changes(tuple(missing), surplus, tuple(f for f in _FAMILIES if f not in local))


def removal() -> Changes:
    """Return the changes that remove everything of ours; the guard is their last."""
    rules = sorted(present(), key=lambda rule: (rule.action == _UNREACHABLE, rule.priority))
    return Changes(
        remove=tuple(rules), remove_local=tuple(f for f in _FAMILIES if f in local_routes())
    )


def make(change: Changes) -> None:
    """Make the changes in one system call. Raises NetlinkError when the kernel refuses one of
    them.
    """
    with IPRoute() as ip:
        loopback = ip.link_lookup(ifname="lo")[0]
        add = NLM_F_CREATE | NLM_F_EXCL
        messages = [_route_message(f, RTM_NEWROUTE, add, loopback) for f in change.add_local]
        messages += [_rule_message(rule, RTM_NEWRULE, add) for rule in change.add]
        messages += [_rule_message(rule, RTM_DELRULE, 0) for rule in change.remove]
        messages += [_route_message(f, RTM_DELROUTE, 0, loopback) for f in change.remove_local]
        if messages:
            enlarge(ip)
            ip.nlm_request_batch(messages)


def local_routes() -> list[int]:
    """Return the families whose every address LOCAL_TABLE makes local, by a route of ours."""
    found: list[int] = []
    with IPRoute() as ip:
        for family in _FAMILIES:
            for route in ip.get_routes(family=family, table=LOCAL_TABLE):
                if (
                    route["type"] == _LOCAL_ROUTE
                    and not route["dst_len"]
                    and route["proto"] == PROTOCOL
                ):
                    found.append(family)
    return found


def _ours(rule: Any) -> bool:
    priority = rule.get_attr("FRA_PRIORITY") or 0
    return rule.get_attr("FRA_PROTOCOL") == PROTOCOL and _FIRST <= priority <= END


def _read(family: int, rule: Any) -> PolicyRule:
    def prefix(name: str, length: int) -> str:
        return f"{rule.get_attr(name)}/{length}" if rule.get_attr(name) else ""

    to_table = rule["action"] == _TO_TABLE
    return PolicyRule(
        family,
        rule.get_attr("FRA_PRIORITY") or 0,
        rule["action"],
        rule.get_attr("FRA_FWMARK") or 0,
        (rule.get_attr("FRA_TABLE") or rule["table"]) if to_table else 0,
        rule.get_attr("FRA_GOTO") or 0,
        rule.get_attr("FRA_IIFNAME") or "",
        prefix("FRA_SRC", rule["src_len"]),
        prefix("FRA_DST", rule["dst_len"]),
    )


def _rule_message(rule: PolicyRule, kind: int, flags: int) -> Any:
    message = fibmsg()
    message["family"], message["action"] = rule.family, rule.action
    attributes: list[tuple[str, object]] = [
        ("FRA_PRIORITY", rule.priority),
        ("FRA_PROTOCOL", PROTOCOL),
    ]
    if rule.table:
        message["table"] = _TABLE_COMPAT
        attributes.append(("FRA_TABLE", rule.table))
    if rule.target:
        attributes.append(("FRA_GOTO", rule.target))
    if rule.mark:
        attributes.append(("FRA_FWMARK", rule.mark))
    if rule.interface:
        attributes.append(("FRA_IIFNAME", rule.interface))
    for name, field, value in (
        ("FRA_SRC", "src_len", rule.source),
        ("FRA_DST", "dst_len", rule.destination),
    ):
        if value:
            address, _, length = value.partition("/")
            message[field] = int(length)
            attributes.append((name, address))
    return _finished(message, attributes, kind, flags)


def _route_message(family: int, kind: int, flags: int, loopback: int) -> Any:
    message = rtmsg()
    message["family"], message["proto"], message["type"] = family, PROTOCOL, _LOCAL_ROUTE
    message["table"] = _TABLE_COMPAT
    message["scope"] = _SCOPE_HOST if family == socket.AF_INET else _UNIVERSE
    return _finished(message, [("RTA_TABLE", LOCAL_TABLE), ("RTA_OIF", loopback)], kind, flags)


def _finished(message: Any, attributes: list[tuple[str, object]], kind: int, flags: int) -> Any:
    message["attrs"] = attributes
    message["header"]["type"] = kind
    message["header"]["flags"] = NLM_F_REQUEST | NLM_F_ACK | flags
    return message


def _version(family: int) -> str:
    return "IPv6" if family == socket.AF_INET6 else "IPv4"
