"""`narrows serve gate|seal|review`: one process of the appliance, until SIGTERM."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from appliance.cli import settings

if TYPE_CHECKING:
    import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's words."""
    settings.add_config(parser)
    parser.add_argument("process", choices=["gate", "seal", "review"])
    parser.add_argument("--worker", type=int, default=0, help="number of the gate worker")


def run(words: argparse.Namespace) -> int:
    """Run the process in the foreground."""
    from appliance import daemon

    logging.basicConfig(level=logging.INFO, format=f"{words.process} %(levelname)s %(message)s")
    config = settings.chosen(words)
    if words.process == "gate":
        return daemon.gate(config, words.worker)
    return daemon.seal(config) if words.process == "seal" else daemon.review(config)
