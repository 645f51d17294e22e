"""`narrows live`: the sessions that run now, as every gate worker counts them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from appliance import live
from appliance.cli import settings
from appliance.cli.outcome import FAILED, OK, UNAVAILABLE, Refusal
from appliance.cli.printable import printable
from appliance.cli.reading import evidence
from capture import plainjson

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from appliance.live import RunningObject

_ROW = "{:13}  {:20}  {:16} {:11} {:21} {:>5} {:>10} {:>10} {:>8}"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's words."""
    settings.add_config(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(words: argparse.Namespace) -> int:
    """Ask every worker; exit 69 when none answers, 1 when some do not."""
    with evidence(words) as opened:
        opened.record("live")
        found, silent = ask_workers(opened.config.paths.run)
        with opened.index() as index:
            sessions = [live.running_object(index, told) for told in found]
    if words.json:
        print(plainjson.dumps(sessions))
    else:
        _print(sessions)
    return FAILED if silent else OK


def ask_workers(run: Path) -> tuple[list[dict[str, Any]], int]:
    """Return what the workers say of their sessions, and how many did not answer.

    Refusal when none does.
    """
    found, silent = live.ask_all(run)
    for name, wrong in silent.items():
        print(f"narrows: {name} does not answer: {wrong}", file=sys.stderr)
    if len(silent) == len(live.workers(run)):
        hint = "is it running, and are you root?"
        raise Refusal("no gate worker answers", hint, code=UNAVAILABLE)
    return found, len(silent)


def _print(sessions: list[RunningObject]) -> None:
    names = ("session", "started", "account", "protocol", "target", "ops", "up", "down", "unsent")
    print(_ROW.format(*names))
    for session in sessions:
        account = session["service_account"] or "unknown"
        texts = (account, session["protocol"] or "-", session["target"])
        counts = (
            session["operations"], session["bytes_up"], session["bytes_down"], session["unsent"]
        )  # fmt: skip
        started = session["started"][:19] + "Z"
        print(_ROW.format(session["id"], started, *map(printable, texts), *counts))
