"""Transparent redirect: `plan` says what would change, `apply` does it, `undo` takes it back.

The command line and the gate call it, inside the network namespace that routes, and never on a
thread with a running event loop: pyroute2 runs one of its own. Only netlink is used, only what is
ours is touched: table inet narrows (`rules`) and the policy rules and routes that carry our
protocol number (`routing`).

Order is safety. Every change is one system call, so the kernel has taken all of it or none when a
process dies:

    apply   1 the guard: from here on client subnets are closed
            2 the rule set
            3 guard rules that are not needed any more
    undo    1 the rule set: client subnets are closed
            2 the guard

After any number of these steps a connection of a client goes through the listener or fails, unless
nothing was applied before and the first step was not reached. A rule set that is gone while the
guard stands (`nft flush ruleset`) fails closed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyroute2.netlink.exceptions import NetlinkError

from appliance.proxy.redirect import nft, routing, rules
from appliance.proxy.redirect.checks import Problem, check, client_interfaces, own_addresses
from appliance.proxy.redirect.counts import bypass_gaps, bypassed, counted, settle_bypass
from appliance.proxy.redirect.rules import MARK_LOCAL, MARK_PASS, TABLE

if TYPE_CHECKING:
    from collections.abc import Callable

    from appliance.config import Config

__all__ = [
    "MARK_LOCAL", "MARK_PASS", "TABLE", "Problem", "RedirectError", "Step", "apply", "bypass_gaps",
    "bypassed", "check", "client_interfaces", "counted", "own_addresses", "plan", "settle_bypass",
    "undo", "undo_steps",
]  # fmt: skip


class RedirectError(Exception):
    """The kernel refused the redirect, or has something else than was asked for."""


@dataclass(frozen=True, slots=True)
class Step:
    """One change, in one system call; `text` says it to a person. `run` raises NetlinkError."""

    text: str
    run: Callable[[], None]


def plan(config: Config) -> list[Step]:
    """Return the steps from what the kernel has to what the configuration says, in order; empty
    when it has it.
    """
    steps = []
    change = routing.changes(config)
    guard = routing.Changes(add=change.add, add_local=change.add_local)
    if guard:
        steps.append(Step(str(guard), lambda: routing.make(guard)))
    table = rules.build(config, client_interfaces(config), rules.generation(nft.read(TABLE)))
    wrong = nft.differences(table)
    if wrong:
        size = sum(len(chain) for chain in table.chains.values())
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        text = f"write table inet {TABLE}, {size} rules: {wrong[0]}{more}"
        steps.append(Step(text, lambda: nft.replace(table)))
    surplus = routing.Changes(remove=change.remove)
    if surplus:
        steps.append(Step(str(surplus), lambda: routing.make(surplus)))
    return steps


def apply(config: Config) -> list[str]:
    """Apply the configuration, read back what the kernel has and compare; return what was done.

    Idempotent, and repairs whatever half of it is there. Raises RedirectError.
    """
    steps = plan(config)
    for step in steps:
        _run(step)
    left = plan(config) if steps else []
    if left:
        raise RedirectError(
            f"the kernel has something else than was applied; still to do: {left[0].text}"
        )
    return [step.text for step in steps]


def undo_steps() -> list[Step]:
    """Return the steps that remove everything of ours, the guard last. Counts that nobody recorded
    go with it.
    """
    steps = []
    if nft.read(TABLE).exists:
        steps.append(Step(f"remove table inet {TABLE}", lambda: nft.remove(TABLE)))
    change = routing.removal()
    if change:
        steps.append(Step(str(change), lambda: routing.make(change)))
    return steps


def undo() -> list[str]:
    """Remove everything of ours; return what was done. Raises RedirectError."""
    steps = undo_steps()
    for step in steps:
        _run(step)
    left = undo_steps()
    if left:
        raise RedirectError(f"the kernel still has something of ours; still to do: {left[0].text}")
    return [step.text for step in steps]


def _run(step: Step) -> None:
    try:
        step.run()
    except NetlinkError as refused:
        raise RedirectError(f"the kernel refused to {step.text}: {refused}") from refused
