"""docs/cli.md lists every command, verb, option and exit code, and nothing that is not there."""

import argparse
import importlib
import re
from pathlib import Path

import pytest

from appliance.cli import COMMANDS, outcome
from appliance.config import EXIT_CONFIG

PAGE = (Path(__file__).parents[3] / "docs" / "cli.md").read_text(encoding="utf-8")
OF_ALL = {"--help", "-h", "--config"}  # described once, at the top


def parsers(name):
    """Yield (verb, parser) of a command; "" is the command itself."""
    parser = argparse.ArgumentParser()
    importlib.import_module(f"appliance.cli.{name}").arguments(parser)
    yield "", parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def section(name):
    return PAGE.split(f"## narrows {name}\n", 1)[1].split("\n## ", 1)[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_verb_and_option_of_a_command_is_documented(name):
    text = section(name)
    for verb, parser in parsers(name):
        assert re.search(rf"\b{verb}\b", text), verb
        for option in parser._option_string_actions.keys() - OF_ALL:
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), f"{verb} {option}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_that_is_documented_is_there(name):
    known = set(OF_ALL)
    for _, parser in parsers(name):
        known |= parser._option_string_actions.keys()
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", section(name))) <= known


def test_every_reading_command_prints_json():
    for name, verbs in {
        "sessions": ["list", "show"], "evidence": ["verify", "log"], "live": [""],
        "config": ["show"], "redirect": ["plan", "status"], "lab": ["status"], "doctor": [""],
    }.items():  # fmt: skip
        found = dict(parsers(name))
        for verb in verbs:
            assert "--json" in found[verb]._option_string_actions, f"{name} {verb}"


def test_every_exit_code_is_documented():
    table = PAGE.split("## Exit codes", 1)[1].split("\n## ", 1)[0]
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    codes = {value for name, value in vars(outcome).items() if name.isupper()}
    assert listed == codes | {EXIT_CONFIG, 127, 130}


def test_every_key_of_the_session_object_is_documented(narrows):
    with narrows.evidence.writer() as gate:
        gate.open()
        gate.commit()
        [session] = narrows("sessions", "list", "--json").json()
    for key in [*session, *session["counts"]]:
        assert f"`{key}`" in PAGE
