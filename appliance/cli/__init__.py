"""The `narrows` command: one module per command, imported only when it is asked for.

A command module has `arguments(parser)` and `run(words) -> exit code`; `COMMANDS` says what it
does. Errors that a person can mend end in one line on stderr: `Refusal` is raised for them. Exit
codes are listed in docs/cli.md.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from typing import TYPE_CHECKING

from appliance.cli.outcome import BROKEN_PIPE, FAILED, Refusal
from appliance.config import EXIT_CONFIG, ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
COMMANDS = {
    "serve": "run one of the appliance's processes",
    "sensor": "run the sensor of this host",
    "sessions": "list, show or export recorded sessions",
    "evidence": "verify the evidence, or rebuild its index",
    "live": "show the sessions that run now",
    "kill": "end a running session",
    "token": "make, list or revoke tokens of the review API",
    "redirect": "plan, apply or undo the redirect",
    "doctor": "say what this machine lacks",
    "ca": "print the certificate of the gate's authority",
    "config": "check or show the configuration",
    "lab": "three hosts on this machine, and the demo on them",
}


def main(argv: Sequence[str]) -> int:
    """Run one command; return its exit code."""
    chosen = next((word for word in argv if not word.startswith("-")), None)
    parser = _parser(chosen)
    try:
        words = parser.parse_args(argv)
    except SystemExit as ended:
        return int(ended.code or 0)
    try:
        code = int(words.run(words))
        sys.stdout.flush()  # here, where it can still be said that it failed
    except ConfigError as wrong:
        print(f"narrows: {wrong}", file=sys.stderr)
        return EXIT_CONFIG
    except Refusal as refused:
        print(f"narrows: {refused}", file=sys.stderr)
        return refused.code
    except BrokenPipeError:
        _drop_output()  # its reader is gone: nothing more to say
        return BROKEN_PIPE
    except OSError as wrong:
        if wrong.errno not in _DISK_FULL:
            raise
        _drop_output()
        print(f"narrows: the output cannot be written: {wrong.strerror}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return 130
    return code


def _drop_output() -> None:
    """Keep Python from writing what is left in its buffer once more when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="narrows", description="Record, attribute and prove what service accounts did."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary.capitalize() + ".")
        if name == chosen:
            module = importlib.import_module(f"appliance.cli.{name}")
            module.arguments(command)
            command.set_defaults(run=module.run)
    return parser
