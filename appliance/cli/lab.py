"""`narrows lab up|down|status|exec|demo`: three hosts on this machine, a real gate between them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.cli.outcome import FAILED, NOT_FOUND, OK, USAGE, Refusal
from appliance.lab import cgroups, topology
from appliance.lab.running import Lab, LabError
from appliance.proxy.redirect import RedirectError

if TYPE_CHECKING:
    import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's words."""
    verbs = parser.add_subparsers(required=True, metavar="up|down|status|exec|demo", dest="verb")
    up = verbs.add_parser("up", help="make the hosts and start the gate")
    up.add_argument("--config", type=Path, metavar="FILE", help="configuration of the gate")
    up.add_argument("--no-gate", action="store_true", help="route without the gate")
    verbs.add_parser("down", help="remove everything that up made")
    status = verbs.add_parser("status", help="say what runs; exit code 3 when the lab is down")
    status.add_argument("--json", action="store_true")
    run_in = verbs.add_parser("exec", help="run a program on one of the hosts")
    run_in.add_argument("--as", dest="account", metavar="NAME", help="service account to run as")
    run_in.add_argument("--on", choices=topology.ROLES, default="client", help="host")
    run_in.add_argument("argv", nargs="+", metavar="CMD")
    demo = verbs.add_parser("demo", help="real servers, real clients, one recorded story")
    demo.add_argument("--once", action="store_true", help="end and remove everything afterwards")
    demo.add_argument("--json", action="store_true", help="print one JSON document")


def run(words: argparse.Namespace) -> int:
    """Run one verb."""
    lab = Lab()
    match words.verb:
        case "up":
            return _up(lab, words)
        case "down":
            lab.down()
            return OK
        case "status":
            return _status(lab, as_json=words.json)
        case "exec":
            return _exec(lab, words)
        case _:
            from appliance.lab.demo import demo

            return demo(lab, once=words.once, as_json=words.json)


def _up(lab: Lab, words: argparse.Namespace) -> int:
    given = ""
    if words.config is not None:
        try:
            given = words.config.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as wrong:
            raise Refusal(f"{words.config} cannot be read: {wrong}") from wrong
    try:
        lab.up(given, gate=not words.no_gate)
    except (LabError, RedirectError) as wrong:
        raise Refusal(str(wrong)) from wrong
    names = ", ".join(lab.place.topology.namespaces)
    print(f"up: {names}; gate {'off' if words.no_gate else 'on'}", file=sys.stderr)
    return OK


def _status(lab: Lab, *, as_json: bool) -> int:
    status = lab.status()
    if as_json:
        print(json.dumps(status))
    else:
        print("up" if status["up"] else "down")
        for process in status["processes"]:
            print(f"{process['role']:12} {process['pid']}")
    return OK if status["up"] else NOT_FOUND


def _exec(lab: Lab, words: argparse.Namespace) -> int:
    if not lab.place.topology.exists():
        raise Refusal("the lab is down", "./run lab up", code=NOT_FOUND)
    try:
        group = lab.cgroup(words.on, words.account)
    except KeyError as unknown:
        names = ", ".join(account.name for account in lab.config.account)
        raise Refusal(f"no account {unknown} is declared", f"known: {names}", code=USAGE) from None
    if words.account is not None and words.on != "client":
        raise Refusal("--as is for the client", "leave one of --as and --on away", code=USAGE)
    argv = words.argv[1:] if words.argv[0] == "--" else words.argv
    (cgroups.make(group) / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
    topology.enter(lab.place.topology.namespace(words.on))
    environment = lab.environment if words.on == "client" else dict(os.environ)
    try:
        os.execvpe(argv[0], argv, environment)  # noqa: S606 - the words are the program, no shell is wanted
    except OSError as wrong:
        print(f"narrows: {argv[0]}: {wrong.strerror}", file=sys.stderr)
        return 127 if isinstance(wrong, FileNotFoundError) else FAILED
