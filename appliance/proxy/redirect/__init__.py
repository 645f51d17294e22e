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
    close   the way into the rule set: client subnets are closed, and counts stay as they are
    undo    1 the rule set: client subnets are closed
            2 the guard

After any number of these steps a connection of a client goes through the listener or fails, unless
nothing was applied before and the first step was not reached. A rule set that is gone while the
guard stands (`nft flush ruleset`) fails closed.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyroute2.netlink.exceptions import NetlinkError

from appliance.proxy.redirect import nft, routing, rules
from appliance.proxy.redirect.checks import Problem, check, client_interfaces, own_addresses
from appliance.proxy.redirect.counts import alone, bypass_gaps, counted, lost_counts, settle_bypass
from appliance.proxy.redirect.flows import CROWD, FlowMeter, record_flows
from appliance.proxy.redirect.rules import MARK_LOCAL, MARK_PASS, TABLE

if TYPE_CHECKING:
    from collections.abc import Callable

    from appliance.config import Config

__all__ = [
    "CROWD", "MARK_LOCAL", "MARK_PASS", "TABLE", "FlowMeter", "NetlinkError", "Problem",
    "RedirectError", "Step", "alone", "apply", "bypass_gaps", "check", "client_interfaces",
    "close", "counted", "lost_counts", "own_addresses", "plan", "record_flows", "settle_bypass",
    "undo", "undo_steps",
]  # fmt: skip

_TRIES = 5
#: What the kernel says of something that another process was faster to add or remove.
_CHANGED = {errno.EEXIST, errno.ENOENT, errno.ESRCH}


class RedirectError(Exception):
    """The kernel refused the redirect, or has something else than was asked for."""


@dataclass(frozen=True, slots=True)
class Step:
    """One change, in one system call; `text` and `details` say it to a person. `run` raises
    NetlinkError or nft.Overtaken.
    """

    text: str
    details: tuple[str, ...]
    run: Callable[[], None]


def plan(config: Config) -> list[Step]:
    """Return the steps from what the kernel has to what the configuration says, in order; empty
    when it has it.
    """
    change = routing.changes(config)
    guard = routing.Changes(add=change.add, add_local=change.add_local)
    applied = nft.read(TABLE)
    table = rules.build(config, client_interfaces(config), rules.generation(applied.rules))
    wrong = nft.differences(table, applied)
    surplus = routing.Changes(remove=change.remove)
    steps = [_routing_step("put the guard in place", guard)] if guard else []
    if wrong:
        text = f"write table inet {TABLE}"
        steps.append(Step(text, tuple(wrong), lambda: nft.replace(table, applied)))
    if surplus:
        steps.append(_routing_step("remove what the guard does not need", surplus))
    return steps


def apply(config: Config) -> list[str]:
    """Apply the configuration, read back what the kernel has and compare; return what was done.

    Idempotent, and repairs whatever half of it is there. Raises RedirectError.
    """
    return _carry_out(lambda: plan(config))


def close() -> None:
    """Take the way into the rule set away: the guard closes client subnets, and the counts stand
    still until somebody recorded them. Raises RedirectError.
    """
    for _ in range(_TRIES):
        old = nft.rules_in(TABLE, [rules.BASE])
        try:
            return nft.rewrite(TABLE, old, {name: [] for name in old})
        except nft.Overtaken:
            continue
        except NetlinkError as refused:
            raise RedirectError(f"the kernel refused to close the rule set: {refused}") from refused
    raise RedirectError("somebody else keeps changing the rule set")


def undo_steps() -> list[Step]:
    """Return the steps that remove everything of ours, the guard last. Counts that nobody recorded
    go with it.
    """
    steps = []
    if nft.exists(TABLE):
        steps.append(Step(f"remove table inet {TABLE}", (), lambda: nft.remove(TABLE)))
    change = routing.removal()
    if change:
        steps.append(_routing_step("remove the guard", change))
    return steps


def undo() -> list[str]:
    """Remove everything of ours; return what was done. Raises RedirectError."""
    return _carry_out(undo_steps)


def _routing_step(text: str, change: routing.Changes) -> Step:
    return Step(text, tuple(change.texts()), lambda: routing.make(change))


def _carry_out(find: Callable[[], list[Step]]) -> list[str]:
    """Do the steps that `find` gives until it gives none."""
    done: list[str] = []
    why = "it has something else than was asked for"
    for _ in range(_TRIES):
        steps = find()
        if not steps:
            return done
        for step in steps:
            try:
                step.run()
            except nft.Overtaken as refused:
                why = str(refused)
                break  # by the gate, which turns flow sets, or by somebody else: look again
            except NetlinkError as refused:
                if refused.code not in _CHANGED:
                    text = f"the kernel refused to {step.text}: {refused}"
                    raise RedirectError(text) from refused
                why = str(refused)
                break
            done.append(step.text)
    left = "; ".join((steps[0].text, *steps[0].details[:3]))
    raise RedirectError(f"still to do: {left}; the kernel says: {why}")
