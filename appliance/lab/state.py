"""What is known of the running lab, in one file: /run/narrows-lab/lab.json.

`appliance.lab.running` writes it; the command line reads it to find the lab's gate.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path("/run/narrows-lab")


@dataclass(frozen=True, slots=True)
class LabState:
    """A lab that is up."""

    config: Path  #: the gate's configuration
    namespace: str  #: the gate's network namespace
    supervisor: int  #: process id; 0 when the lab is up without a gate
    folder: Path


def running(folder: Path = FOLDER) -> LabState | None:
    """Return the lab that is up, or None; one that was left by a crash is not up."""
    try:
        found = json.loads((folder / "lab.json").read_text(encoding="utf-8"))
        state = LabState(
            Path(found["config"]), str(found["namespace"]), int(found["supervisor"]), folder
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not Path("/run/netns", state.namespace).exists():
        return None
    return state


def write(state: LabState) -> None:
    """Write the file, whole or not at all."""
    text = json.dumps({
        "config": str(state.config),
        "namespace": state.namespace,
        "supervisor": state.supervisor,
    })  # fmt: skip
    scratch = state.folder / ".lab.json.new"
    scratch.write_text(text + "\n", encoding="utf-8")
    os.replace(scratch, state.folder / "lab.json")
