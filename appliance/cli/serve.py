"""`narrows serve gate|seal|review`: one process of the appliance, until SIGTERM."""

from __future__ import annotations

import argparse
import errno
import logging
from typing import TYPE_CHECKING

from appliance.cli import settings
from appliance.cli.outcome import UNAVAILABLE, Refusal
from appliance.cli.printable import printable
from appliance.live import AlreadyRuns
from capture.errors import EvidenceError

if TYPE_CHECKING:
    from appliance.config import Config

_ADDRESS = frozenset({errno.EADDRINUSE, errno.EADDRNOTAVAIL})


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's words."""
    settings.add_config(parser)
    parser.add_argument("process", choices=["gate", "seal", "review"])
    parser.add_argument("--worker", type=_number, default=0, help="number of the gate worker")


def _number(text: str) -> int:
    if not text.isdecimal() or len(text) > 3:
        raise argparse.ArgumentTypeError(f"{printable(text)} is no number of a worker")
    return int(text)


def run(words: argparse.Namespace) -> int:
    """Run the process in the foreground; Refusal when it cannot be it."""
    logging.basicConfig(level=logging.INFO, format=f"{words.process} %(levelname)s %(message)s")
    config = settings.chosen(words)
    try:
        return _process(words.process, config, words.worker)
    except PermissionError as wrong:
        raise Refusal(str(wrong), "it needs root", code=UNAVAILABLE) from wrong
    except OSError as wrong:
        if wrong.errno not in _ADDRESS:
            raise
        hint = "another process listens there, or it is no address of this host"
        problem = f"the {words.process} cannot listen: {wrong.strerror}"
        raise Refusal(problem, hint, code=UNAVAILABLE) from wrong
    except (AlreadyRuns, EvidenceError) as wrong:
        raise Refusal(f"the {words.process} ends: {wrong}", code=UNAVAILABLE) from wrong


def _process(name: str, config: Config, worker: int) -> int:
    """Run a process, of whose code nothing else was imported."""
    match name:
        case "gate":
            from appliance.daemon import gate

            return gate.run(config, worker)
        case "seal":
            from appliance.daemon import seal

            return seal.run(config)
        case _:
            from appliance.daemon import review

            return review.run(config)
