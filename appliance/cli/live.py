"""`narrows live`: the sessions that run now, as every gate worker counts them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from appliance import live
from appliance.cli import settings
from appliance.cli.outcome import FAILED, OK, UNAVAILABLE, Refusal
from appliance.cli.printable import printable
from appliance.cli.reading import evidence
from appliance.cli.session_json import session_object
from capture import index_query, plainjson
from capture.frames import session_number
from capture.index_query import endpoint
from capture.moment import rfc3339

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from capture.index import Index

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
            sessions = [_session(index, told) for told in found]
    if words.json:
        print(plainjson.dumps(sessions))
    else:
        _print(sessions)
    return FAILED if silent else OK


def ask_workers(run: Path) -> tuple[list[dict[str, Any]], int]:
    """Return what the workers say of their sessions, and how many did not answer.

    Refusal when none does.
    """
    found: list[dict[str, Any]] = []
    workers = live.workers(run)
    silent = 0
    for path in workers:
        try:
            found += live.ask(path, {"do": "list"})["sessions"]
        except (OSError, ValueError, KeyError) as wrong:
            silent += 1
            print(f"narrows: {path.name} does not answer: {wrong}", file=sys.stderr)
    if silent == len(workers):
        hint = "is it running, and are you root?"
        raise Refusal("no gate worker answers", hint, code=UNAVAILABLE)
    return found, silent


def _session(index: Index, told: dict[str, Any]) -> dict[str, Any]:
    """Return the session object, with the worker's own counts; the index may not know it yet."""
    known = index_query.session(index, session_number(told["id"]))
    base: dict[str, Any] = {} if known is None else session_object(known)
    return base | {
        "id": told["id"],
        "client": endpoint(*told["client"]),
        "target": endpoint(*told["target"]),
        "protocol": told["protocol"] or None,
        "route": told["route"],
        "started": rfc3339(told["started"]),
        "state": "running",
        "operations": told["operations"],
        "bytes_up": told["bytes_up"],
        "bytes_down": told["bytes_down"],
        "unsent": told["unsent"],
    }


def _print(sessions: list[dict[str, Any]]) -> None:
    names = ("session", "started", "account", "protocol", "target", "ops", "up", "down", "unsent")
    print(_ROW.format(*names))
    for session in sessions:
        account = session.get("service_account") or "unknown"
        texts = (account, session["protocol"] or "-", session["target"])
        counts = [session[name] for name in ("operations", "bytes_up", "bytes_down", "unsent")]
        started = session["started"][:19] + "Z"
        print(_ROW.format(session["id"], started, *map(printable, texts), *counts))
