"""docs/operations.md and docs/threat-model.md are true as far as a program can tell."""

import re
from pathlib import Path

import pytest

from appliance.cli import COMMANDS, outcome
from appliance.config import EXIT_CONFIG
from appliance.web.connections import MOST, MOST_OF_PEER
from appliance.web.failures import PER_PEER
from appliance.web.server import ROUTES
from appliance.web.tokens import FILE, Role
from capture.settings import WriterSettings

ROOT = Path(__file__).parents[1]
PAGE, THREATS, API, FORMAT = (
    (ROOT / "docs" / name).read_text(encoding="utf-8")
    for name in ("operations.md", "threat-model.md", "api.md", "evidence-format.md")
)
METRIC = re.compile(r"`(narrows_\w+)`")


def test_every_metric_is_something_to_watch_and_no_other():
    assert set(METRIC.findall(PAGE)) == set(METRIC.findall(API))


def test_every_exit_code_is_explained():
    codes = {getattr(outcome, name) for name in dir(outcome) if name.isupper()} | {EXIT_CONFIG, 130}
    section = PAGE.split("## Exit codes", 1)[1]
    assert set(map(int, re.findall(r"^\| (\d+) \|", section, re.MULTILINE))) == codes


@pytest.mark.parametrize("page", [PAGE, THREATS], ids=["operations", "threats"])
def test_commands_roles_routes_and_tests_that_are_named_exist(page):
    for command in re.findall(r"`narrows (\w+)", page):
        assert command in COMMANDS, command
    paths = {route.path for route in ROUTES}
    for path in re.findall(r"`GET (?:/api/v1)?(/[\w/{}]+)`", page):
        assert path in paths, path
    for named in re.findall(r"`(tests/[\w/.]+)`", page):
        assert (ROOT / named).exists(), named


@pytest.mark.parametrize("page", [PAGE, THREATS], ids=["operations", "threats"])
def test_every_link_to_a_heading_finds_it(page):
    for target, heading in re.findall(r"\]\(([\w.-]*)#([\w-]+)\)", page):
        text = page if not target else (ROOT / "docs" / target).read_text(encoding="utf-8")
        headings = {
            re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
            for line in text.splitlines() if line.startswith("#")
        }  # fmt: skip
        assert heading in headings, (target, heading)


def test_bounds_and_files_are_the_real_ones():
    assert f"more than {MOST} connections, or {MOST_OF_PEER} of one address" in PAGE
    assert f"{MOST} connections, {MOST_OF_PEER} from one address" in API
    assert PER_PEER == 10, "at most ten lines of log a minute"
    assert f"in {WriterSettings().spare_bytes >> 20} MiB that are held back for them" in PAGE
    assert f"`{FILE}`" in PAGE
    for name in ("appliance.key", "digest.key", "ledger.key", "ledger.pub"):
        assert f"| `{name}` |" in PAGE
        assert f"| `{name}` |" in FORMAT
    assert {role.value for role in Role} == {"viewer", "reviewer", "responder", "admin"}
