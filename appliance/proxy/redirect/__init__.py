"""Transparent redirect: `plan` says what would change, `apply` does it, `undo` takes it back.

The command line and the gate call it, inside the network namespace that routes. Only netlink is used. Every change is a
`Step`; in `apply` the guard comes first and the rule set is one transaction, in `undo` the guard goes last: an interruption
after any step leaves redirected clients closed, never unrecorded.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from appliance.proxy.redirect import nft, routing, rules

if TYPE_CHECKING:
    from collections.abc import Callable

    from appliance.config import Config

__all__ = ["RedirectError", "Step", "apply", "bypassed", "check", "own_addresses", "plan", "state", "undo", "undo_steps"]


class RedirectError(Exception):
    """The kernel refused the redirect, or applied something else than was asked for."""


@dataclass(frozen=True, slots=True)
class Step:
    """One change; `text` says it to a person."""

    text: str
    run: Callable[[], None]


def plan(config: Config) -> list[Step]:
    """Return the steps that bring the kernel from what it has to what the configuration says, in order."""
    steps = []
    present, wanted = routing.present(), routing.wanted(config)
    if not any(rule.interface for rule in wanted):
        raise RedirectError("no interface leads to [redirect] clients: add their route first")
    for rule in wanted:
        if rule not in present:
            steps.append(Step(f"add {_say(rule)}", lambda rule=rule: routing.add(rule)))  # type: ignore[misc]
    if not routing.local_routes_present():
        steps.append(Step(f"add local routes in table {routing.LOCAL_TABLE}", routing.add_local_routes))
    batch, _ = rules.build(config)
    applied = [names for names, _, _ in nft.dump(rules.TABLE)]
    if applied != batch.shape or rules.stamp(config) not in nft.set_names(rules.TABLE):
        verb = "replace" if nft.table_exists(rules.TABLE) else "make"
        text = f"{verb} nftables table inet {rules.TABLE} ({len(batch.shape)} rules)"
        steps.append(Step(text, lambda: _commit(config)))
    for rule in present:
        if rule not in wanted:
            steps.append(Step(f"remove {_say(rule)}", lambda rule=rule: routing.remove(rule)))  # type: ignore[misc]
    return steps


def apply(config: Config) -> list[str]:
    """Apply the configuration and compare what the kernel has with it; return what was done.

    Idempotent. Raises RedirectError when the kernel refuses, or reads back something else.
    """
    try:
        steps = plan(config)
        for step in steps:
            step.run()
        left = plan(config)
    except NetlinkError as refused:
        raise RedirectError(f"the kernel refused the redirect: {refused}") from refused
    if left:
        raise RedirectError(f"the kernel applied something else: still to do: {left[0].text}")
    return [step.text for step in steps]


def undo_steps() -> list[Step]:
    """Return the steps that remove everything of ours, the guard last."""
    steps = []
    if nft.table_exists(rules.TABLE):
        steps.append(Step(f"remove nftables table inet {rules.TABLE}", _delete_table))
    present = sorted(routing.present(), key=lambda rule: bool(rule.interface))
    if routing.local_routes_present():
        steps.append(Step(f"empty table {routing.LOCAL_TABLE}", routing.remove_local_routes))
    for rule in present:
        steps.append(Step(f"remove {_say(rule)}", lambda rule=rule: routing.remove(rule)))  # type: ignore[misc]
    return steps


def undo() -> list[str]:
    """Remove everything of ours; return what was done."""
    steps = undo_steps()
    for step in steps:
        step.run()
    return [step.text for step in steps]


def state(config: Config) -> dict[str, tuple[int, int]]:
    """Return (packets, bytes) of each counted purpose of the applied rule set; empty when it is not ours."""
    batch, purposes = rules.build(config)
    applied = nft.dump(rules.TABLE)
    if [names for names, _, _ in applied] != batch.shape:
        return {}
    return {
        purpose: (sum(applied[n][1] for n in numbers), sum(applied[n][2] for n in numbers))
        for purpose, numbers in purposes.items()
    }


def bypassed(config: Config) -> list[tuple[str, int, int]]:
    """Return (route, packets, bytes) that passed unrecorded since the rules were applied."""
    return [
        (purpose.removeprefix("bypass:"), packets, size)
        for purpose, (packets, size) in state(config).items()
        if purpose.startswith("bypass:") and packets
    ]


def renew(config: Config) -> None:
    """Replace the rule set, which sets its counters to zero. One transaction: nothing passes in between."""
    _commit(config)


def own_addresses() -> set[str]:
    """Return every address of this network namespace, as text."""
    with IPRoute() as ip:
        return {str(message.get_attr("IFA_ADDRESS")) for message in ip.get_addr()}


def check(config: Config) -> list[str]:
    """Return what would keep sessions from working, each with what to do; empty when nothing is found."""
    problems = []
    for path, wanted, hint in (
        ("net/ipv4/ip_forward", "1", "sysctl -w net.ipv4.ip_forward=1"),
        ("net/ipv4/conf/all/rp_filter", "0", "strict filters drop the return path: sysctl -w net.ipv4.conf.all.rp_filter=0"),
    ):
        with contextlib.suppress(OSError):
            value = Path("/proc/sys", path).read_text(encoding="ascii").strip()
            if value != wanted:
                problems.append(f"{path.replace('/', '.')} is {value}: {hint}")
    if not routing.client_interfaces(config):
        problems.append("no interface leads to [redirect] clients: add their route")
    if any(r.source == "client" for r in config.route) and not config.redirect.clients:
        problems.append('source = "client" needs [redirect] clients')
    return problems


def _say(rule: routing.PolicyRule) -> str:
    version = "IPv6" if rule.family == 10 else "IPv4"
    if rule.interface:
        return f"{version} rule {rule.priority}: from {rule.interface} unreachable (guard)"
    return f"{version} rule {rule.priority}: mark {rule.mark} to table {rule.table}"


def _commit(config: Config) -> None:
    batch, _ = rules.build(config)
    batch.commit()


def _delete_table() -> None:
    batch = nft.Batch(rules.TABLE)
    batch.table()
    batch.delete_table()
    batch.commit()
