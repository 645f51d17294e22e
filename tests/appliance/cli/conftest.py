"""A state directory with evidence in it, and the command line run against it in this process."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "capture"))
from review_evidence import Evidence

from appliance.cli import main
from capture import index_query
from capture.records import KINDS, Access


@dataclass
class Answer:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str

    def json(self):
        return json.loads(self.out)


class Narrows:
    """The command line, with the configuration of one state directory."""

    def __init__(self, path, capfd):
        self.evidence = Evidence(path)
        self.config = path / "narrows.toml"
        self.config.write_text(f'[paths]\nstate = "{path}/state"\nrun = "{path}/run"\n')
        self._capfd = capfd

    def __call__(self, *words):
        self._capfd.readouterr()
        code = main([*words, "--config", str(self.config)])
        out, err = self._capfd.readouterr()
        return Answer(code, out, err)

    def reads(self):
        """Every Access record: (action, sessions, outcome)."""
        with self.evidence.index() as index:
            return [
                (event.fields["action"], event.fields["objects"], event.fields["outcome"])
                for event in index_query.events(index, KINDS[Access])
            ]


@pytest.fixture
def narrows(tmp_path, capfd):
    return Narrows(tmp_path, capfd)
