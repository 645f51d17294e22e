"""Which configuration a command uses: `--config`, $NARROWS_CONFIG, the running lab's, /etc/narrows.

While the lab is up and nothing else is named, commands talk to the lab's gate, inside its network
namespace where the kernel is asked or changed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.config import Config, load
from appliance.lab import state

if TYPE_CHECKING:
    import argparse

DEFAULT = Path("/etc/narrows/narrows.toml")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add `--config` to a command."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration to use")


def find(words: argparse.Namespace) -> Path:
    """Return the path of the configuration that the words mean."""
    if words.config is not None:
        return Path(words.config).absolute()
    if os.environ.get("NARROWS_CONFIG"):
        return Path(os.environ["NARROWS_CONFIG"])
    lab = state.running()
    return lab.config if lab is not None else DEFAULT


def chosen(words: argparse.Namespace) -> Config:
    """Return the configuration that the words mean; ConfigError when it cannot be used."""
    return load(find(words))


def enter_gate(words: argparse.Namespace) -> None:
    """Move into the lab gate's network namespace when it is the lab that the words mean."""
    lab = state.running()
    if lab is not None and lab.namespace and find(words) == lab.config:
        from appliance.lab import topology  # brings pyroute2, which no real gate's reader needs

        topology.enter(lab.namespace)
