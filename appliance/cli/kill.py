"""`narrows kill ID --reason TEXT`: end a running session; the worker records who did it and why."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from appliance import live
from appliance.cli import settings
from appliance.cli.live import ask_workers
from appliance.cli.outcome import NOT_FOUND, OK, USAGE, Refusal
from appliance.cli.printable import printable
from capture.frames import session_number

if TYPE_CHECKING:
    import argparse
    from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's words."""
    parser.add_argument("id", metavar="ID", help="session, or the beginning of its id")
    parser.add_argument("--reason", metavar="TEXT", required=True, help="why, for the record")
    settings.add_config(parser)


def run(words: argparse.Namespace) -> int:
    """End the session; exit 3 when it does not run."""
    if not words.reason.strip():
        raise Refusal("--reason says nothing", "it goes into the evidence", code=USAGE)
    run = settings.chosen(words).paths.run
    name = _running(run, words.id)
    reason = words.reason.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if not live.kill(run, session_number(name), reason):
        raise Refusal(f"session {name} does not run any more", code=NOT_FOUND)
    print(f"session {name} was ended", file=sys.stderr)
    return OK


def _running(run: Path, prefix: str) -> str:
    """Return the id of the one running session that begins with `prefix`."""
    told, _ = ask_workers(run)
    found = [session["id"] for session in told if session["id"].startswith(prefix.lower())]
    shown = printable(prefix)
    if not prefix or len(found) > 1:
        hint = "give more of its letters"
        raise Refusal(f"more than one running session begins with {shown}", hint, code=USAGE)
    if not found:
        hint = "narrows live shows what runs"
        raise Refusal(f"no running session begins with {shown}", hint, code=NOT_FOUND)
    return str(found[0])
