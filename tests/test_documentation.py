"""The documents are true as far as a program can tell."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest

from appliance import config
from appliance.cli import COMMANDS
from appliance.protocols import discover
from capture import records

ROOT = Path(__file__).parents[1]
DOCS = sorted([ROOT / "README.md", ROOT / "SECURITY.md", *(ROOT / "docs").rglob("*.md")])


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def tables(kind, seen=None):
    seen = seen if seen is not None else {}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        for inner in [hints[field.name], *typing.get_args(hints[field.name])]:
            if dataclasses.is_dataclass(inner) and inner is not config.Ports:
                seen[field.name] = inner
                tables(inner, seen)
    return seen


@pytest.mark.parametrize("name", tables(config.Config))
def test_every_key_of_the_configuration_is_documented(name):
    page = text("docs/configuration.md")
    heading = "Selectors of `match`" if name == "match" else f"[{name}]"
    assert heading in page
    section = page.split(heading, 1)[1]
    section = section if name == "match" else section.split("\n## ", 1)[0]
    for field in dataclasses.fields(tables(config.Config)[name]):
        assert f"| `{field.name}` |" in section


def test_every_default_that_is_documented_is_the_real_one():
    page = text("docs/configuration.md")
    for name, kind in tables(config.Config).items():
        if name in {"match", "route", "account"}:
            continue
        section = page.split(f"## [{name}]", 1)[1].split("\n## ", 1)[0]
        for key, default in re.findall(r"\| `(\w+)` \| `([^`]*)` \|", section):
            value = getattr(kind(), key)
            if isinstance(value, bool):
                shown = str(value).lower()
            elif isinstance(value, tuple):
                shown = "[]"
            elif isinstance(value, str | Path):
                shown = f'"{value}"'
            else:
                shown = str(value)
            assert default == shown, key


def test_every_command_is_documented():
    page = text("docs/cli.md")
    for name in COMMANDS:
        assert f"narrows {name}" in page


def test_every_record_type_is_documented():
    page = text("docs/evidence-format.md")
    for kind in records.KINDS:
        assert kind.__name__ in page
        for field in dataclasses.fields(kind):
            assert field.name in page.split(kind.__name__, 1)[1]


def test_every_protocol_has_a_page():
    for name in discover():
        assert (ROOT / "docs" / "protocols" / f"{name}.md").exists()


def test_the_readme_shows_commands_that_exist():
    shown = set(re.findall(r"\./run (\w+)(?: (\w+))?", text("README.md")))
    script = text("run")
    for command, word in shown:
        assert re.search(rf"^    {command}\)", script, re.MULTILINE), command
        if command == "narrows" and word:
            assert word in COMMANDS


def test_the_readme_fits_one_screen():
    assert len(text("README.md").splitlines()) <= 60
