"""`narrows sensor`: who owns the sockets of this host, told to the gate, until SIGTERM."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from appliance.cli import settings

if TYPE_CHECKING:
    import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's words."""
    settings.add_config(parser)


def run(words: argparse.Namespace) -> int:
    """Run the sensor in the foreground."""
    from appliance.daemon import sensor

    logging.basicConfig(level=logging.INFO, format="sensor %(levelname)s %(message)s")
    return sensor.run(settings.chosen(words))
