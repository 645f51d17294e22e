"""`narrows redirect plan|apply|undo|status`: send client subnets through the gate, or let them go.

While the lab is up and no other configuration is named, it is the lab gate's redirect. What changes
is recorded as a decision, and `undo` records first what the kernel counted and nobody recorded yet.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

from appliance.cli import settings
from appliance.cli.outcome import FAILED, NOT_FOUND, OK, REFUSED, UNAVAILABLE, Refusal
from appliance.proxy import redirect
from capture.access import actor
from capture.crypt import Keys
from capture.errors import EvidenceError
from capture.records import Decision
from capture.segment import SegmentWriter
from capture.settings import SMALL
from capture.store import Store

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from appliance.config import Config
    from appliance.proxy.redirect import Step

_VERBS = {
    "plan": "print what apply would change",
    "apply": "put the redirect in place, or repair it",
    "undo": "remove the redirect: clients are routed as if there were no gate",
    "status": "say whether the redirect is in place, and what it counted",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's words."""
    verbs = parser.add_subparsers(required=True, metavar="plan|apply|undo|status", dest="verb")
    for verb, text in _VERBS.items():
        words = verbs.add_parser(verb, help=text, description=text.capitalize() + ".")
        settings.add_config(words)
        words.add_argument("--json", action="store_true", help="print one JSON document")
        if verb == "undo":
            hint = "go on when what passed unrecorded cannot be recorded"
            words.add_argument("--unrecorded", action="store_true", help=hint)


def run(words: argparse.Namespace) -> int:
    """Run one verb."""
    config = settings.chosen(words)
    settings.enter_gate(words)
    if os.geteuid() != 0:
        raise Refusal(f"redirect {words.verb} needs root", "sudo narrows ...", code=UNAVAILABLE)
    try:
        match words.verb:
            case "plan":
                return _plan(config, as_json=words.json)
            case "apply":
                return _apply(config, as_json=words.json)
            case "undo":
                return _undo(config, words)
            case _:
                return _status(config, as_json=words.json)
    except redirect.RedirectError as wrong:
        raise Refusal(str(wrong), "narrows redirect status says what is there") from wrong
    except redirect.NetlinkError as refused:
        raise Refusal(f"the kernel refused: {refused}", "narrows doctor") from refused


def _plan(config: Config, *, as_json: bool) -> int:
    _show(redirect.plan(config), _problems(config), as_json=as_json, nothing="nothing to change")
    return OK


def _apply(config: Config, *, as_json: bool) -> int:
    steps, lost = redirect.plan(config), redirect.lost_counts()
    done = redirect.apply(config)
    if done:
        try:
            with closing(_writer(config)) as writer:
                if lost is not None:
                    writer.record(0, lost, lost.until)
                _decide(writer, "redirect-apply", done)
        except EvidenceError as wrong:
            print(f"narrows: applied, but that is not recorded: {wrong}", file=sys.stderr)
    _show(steps if done else [], _problems(config), as_json=as_json, nothing="nothing changed")
    return OK


def _undo(config: Config, words: argparse.Namespace) -> int:
    steps = redirect.undo_steps()
    if steps:
        try:
            _record_and_undo(config)
        except EvidenceError as wrong:
            if not words.unrecorded:
                redirect.apply(config)
                hint = "mend that, or give --unrecorded to lose what was not recorded"
                raise Refusal(f"not undone: {wrong}", hint, code=REFUSED) from wrong
            redirect.undo()
            print(f"narrows: undone, but that is not recorded: {wrong}", file=sys.stderr)
    _show(steps, [], as_json=words.json, nothing="nothing to undo")
    return OK


def _record_and_undo(config: Config) -> None:
    """Close client subnets, record what the kernel counted, and open them."""
    with closing(_writer(config)) as writer, redirect.alone(config.paths.run, wait=True):
        redirect.close()
        for gap in redirect.bypass_gaps():
            writer.record(0, gap, gap.until)
        for counted in redirect.FlowMeter().rest():
            writer.record(0, counted.flow, counted.flow.until)
        _decide(writer, "redirect-undo", [step.text for step in redirect.undo_steps()])
        redirect.undo()


def _status(config: Config, *, as_json: bool) -> int:
    steps, ours = redirect.plan(config), redirect.undo_steps()
    state = "in place" if not steps else "partly in place" if ours else "not in place"
    counters = redirect.counted()
    if as_json:
        counts = {name: {"packets": p, "bytes": b} for name, (p, b) in counters.items()}
        missing = [_described(step) for step in steps]
        document = {"state": state, "missing": missing, "counters": counts}
        print(json.dumps({**document, "problems": _texts(_problems(config))}))
    else:
        print(state)
        for name, (packets, size) in sorted(counters.items()):
            print(f"{name:24} {packets:>12} packets {size:>15} bytes")
        _warn(_problems(config))
    return OK if not steps else FAILED if ours else NOT_FOUND


def _writer(config: Config) -> SegmentWriter:
    """Return a writer of evidence of this command's own; EvidenceError when there can be none."""
    try:
        store = Store(config.paths.state, config.paths.run)
        store.prepare()
        keys = Keys.load_or_create(config.paths.state)
        return SegmentWriter(store, keys, "cli", role="cli", settings=SMALL)
    except OSError as refused:
        raise EvidenceError(f"evidence cannot be written: {refused}") from refused


def _decide(writer: SegmentWriter, action: str, done: Sequence[str]) -> None:
    """Record who did it, durable when this returns."""
    writer.record(0, Decision(actor(), action, "; ".join(done), "done"), time.time_ns())
    writer.wait_durable()


def _problems(config: Config) -> list[redirect.Problem]:
    return redirect.check(config)


def _texts(problems: Sequence[redirect.Problem]) -> list[dict[str, str]]:
    return [{"problem": found.problem, "hint": found.hint} for found in problems]


def _described(step: Step) -> dict[str, Any]:
    return {"step": step.text, "details": list(step.details)}


def _show(
    steps: Sequence[Step], problems: Sequence[redirect.Problem], *, as_json: bool, nothing: str
) -> None:
    if as_json:
        described = [_described(step) for step in steps]
        print(json.dumps({"steps": described, "problems": _texts(problems)}))
        return
    if not steps:
        print(nothing)
    for step in steps:
        print(step.text)
        for detail in step.details:
            print(f"  {detail}")
    _warn(problems)


def _warn(problems: Sequence[redirect.Problem]) -> None:
    for found in problems:
        print(f"narrows: {found}", file=sys.stderr)
