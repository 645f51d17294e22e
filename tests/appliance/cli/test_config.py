import dataclasses
import json
import re
import typing

from appliance import config
from appliance.cli.example import EXAMPLE
from appliance.config import load


def test_the_example_is_valid_and_is_what_the_command_prints(narrows, capfd):
    from appliance.cli import main

    assert main(["config", "example"]) == 0
    assert capfd.readouterr().out == EXAMPLE
    narrows.config.write_text(EXAMPLE)
    answer = narrows("config", "check")
    assert answer.code == 0
    assert answer.out.startswith(f"{narrows.config}: valid, SHA-256 ")


def test_every_key_is_in_the_example_with_its_default(tmp_path):
    hints = typing.get_type_hints(config.Config)
    for table in ("paths", "gate", "redirect", "evidence", "attribution", "sensor", "review"):
        section = EXAMPLE.split(f"[{table}]\n", 1)[1].split("\n\n", 1)[0]
        for field in dataclasses.fields(hints[table]):
            assert re.search(rf"^(# )?{field.name} = ", section, re.MULTILINE), field.name
    for kind in (config.Route, config.Account, config.Match):
        for field in dataclasses.fields(kind):
            assert re.search(rf"\b{field.name} = ", EXAMPLE), field.name
    most = EXAMPLE.split("# container")[0]
    with_defaults = re.sub(r"^# (\w+ = .*)$", r"\1", most, flags=re.MULTILINE)
    (tmp_path / "plain.toml").write_text(EXAMPLE)
    (tmp_path / "full.toml").write_text(with_defaults)
    plain, full = load(tmp_path / "plain.toml"), load(tmp_path / "full.toml")
    same = {"file": "", "sha256": ""}
    assert dataclasses.replace(plain, **same) == dataclasses.replace(full, **same)


def test_what_is_in_force_is_shown_as_a_configuration_that_means_the_same(narrows, tmp_path):
    narrows.config.write_text(EXAMPLE)
    shown = narrows("config", "show").out
    again = tmp_path / "again.toml"
    again.write_text(shown)
    same = {"file": "", "sha256": ""}
    first, second = load(narrows.config), load(again)
    assert dataclasses.replace(first, **same) == dataclasses.replace(second, **same)


def test_what_is_in_force_is_shown_as_json(narrows):
    narrows.config.write_text(EXAMPLE)
    told = json.loads(narrows("config", "show", "--json").out)
    assert told["file"] == str(narrows.config)
    assert told["gate"]["listen_port"] == 15001
    assert told["route"][0]["ports"] == ["5432", "6432-6439"]
    assert told["account"][0]["expires"] == "2027-12-31"


def test_a_configuration_that_cannot_be_used_is_one_line_and_exit_code_78(narrows):
    account = '[[account]]\nname = "{}"\nowner = "o"\npurpose = "p"\nmatch = {{ uid = 1 }}\n'
    for text, part in (
        ("[gate]\nworkerz = 2\n", ":2: gate.workerz: unknown key (did you mean 'workers'?)"),
        ("[gate\n", "syntax"),
        (account.format("a") + account.format("b"), "account"),
    ):
        narrows.config.write_text(text)
        for verb in ("check", "show"):
            answer = narrows("config", verb)
            assert (answer.code, answer.out) == (78, "")
            assert part in answer.err
            assert len(answer.err.splitlines()) == 1
