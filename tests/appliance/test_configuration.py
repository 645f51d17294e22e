"""The configuration's own rules; tests/appliance/cli/test_config.py has the command's."""

import re
from pathlib import Path

import pytest

from appliance.config import BOUNDS, ConfigError, load

ROUTE = '[[route]]\nname = "r"\n'
ACCOUNT = '[[account]]\nowner = "o"\npurpose = "p"\nmatch = { uid = 1 }\n'


def wrong(tmp_path, text):
    path = tmp_path / "narrows.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        load(path)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)
    return refused.value


def beyond(low, high):
    step = 1 if isinstance(low, int) else 0.01
    return [low - step, high + 1, *(["nan", "inf"] if step != 1 else [])]


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, ends in BOUNDS.items() for value in beyond(*ends)]
)
def test_a_number_that_makes_no_sense_is_refused(tmp_path, key, value):
    table, _, name = key.partition(".")
    refused = wrong(tmp_path, f"[{table}]\n{name} = {value}\n")
    assert (refused.key, refused.line) == (key, 2)


@pytest.mark.parametrize("key", BOUNDS)
def test_the_ends_of_a_range_are_taken(tmp_path, key):
    table, _, name = key.partition(".")
    for value in BOUNDS[key]:
        path = tmp_path / "narrows.toml"
        path.write_text(f"[{table}]\n{name} = {value}\n", encoding="utf-8")
        assert getattr(getattr(load(path), table), name) == value


@pytest.mark.parametrize(
    "name", ["", " x", "a/b", "..", "../../x", "\\u001b[31m", "\\u202e", 129 * "x", 65 * "é"]
)
def test_a_name_that_records_and_paths_cannot_hold_is_refused(tmp_path, name):
    for kind, rest in (("route", ""), ("account", ACCOUNT.split("\n", 1)[1])):
        refused = wrong(tmp_path, f'[[{kind}]]\nname = "{name}"\n{rest}')
        assert refused.key == f"{kind}.name"
        assert "is no name" in str(refused)


@pytest.mark.parametrize("protocol", ["sctp", "256", "-1", "6", "TCP", "", "017"])
def test_a_protocol_that_the_kernel_does_not_number_is_refused(tmp_path, protocol):
    refused = wrong(tmp_path, f'{ROUTE}action = "allow"\nprotocol = "{protocol}"\n')
    assert refused.key == "route.protocol"


def test_a_file_that_is_not_there_is_named_once_and_with_a_way_out(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError) as refused:
            load(path)
        assert str(refused.value).count(str(path)) == 1
        assert "--config FILE" in str(refused.value)


def test_tcp_is_never_allowed_past_the_gate_and_nothing_else_is_intercepted(tmp_path):
    assert wrong(tmp_path, f'{ROUTE}action = "allow"\n').key == "route.action"
    assert wrong(tmp_path, f'{ROUTE}protocol = "47"\n').key == "route.action"


def test_every_range_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    for key, (low, high) in BOUNDS.items():
        table, _, name = key.partition(".")
        section = page.split(f"## [{table}]", 1)[1].split("\n## ", 1)[0]
        [row] = re.findall(rf"^\| `{name}` .*$", section, re.MULTILINE)
        assert f"{low} to {high}" in row, key


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('address = "gate.example"', "review.address"),
        ('address = ""', "review.address"),
        ('certificate = "a.pem"\nkey = "/a.key"', "review.certificate"),
        ('certificate = "/a.pem"\nkey = "a.key"', "review.key"),
        ('certificate = "/a.pem"', "review.key"),
        ('key = "/a.key"', "review.key"),
    ],
)
def test_an_address_or_certificate_that_cannot_be_used_is_refused(tmp_path, line, key):
    assert wrong(tmp_path, f"[review]\n{line}\n").key == key
