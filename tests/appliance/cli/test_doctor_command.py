"""`narrows doctor`, as an operator sees it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from appliance.lab.place import BLOB

ROOT = Path(__file__).parents[3]
CONFIG = """
[paths]
state = "{folder}/state"
run = "{run}"
blob = "{blob}"
[redirect]
clients = ["192.0.2.0/24"]
[[route]]
name = "all"
"""


def doctor(*words, before=(), config=None):
    environment = {k: v for k, v in os.environ.items() if k != "NARROWS_CONFIG"}
    if config is not None:
        environment["NARROWS_CONFIG"] = str(config)
    command = [*before, sys.executable, "-m", "appliance", "doctor", *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )


def written(folder, run="/dev/shm/nt-doctor", blob=BLOB):
    path = folder / "narrows.toml"
    path.write_text(CONFIG.format(folder=folder, run=run, blob=blob))
    return path


def test_this_machine_is_fit_and_the_answer_says_so(tmp_path):
    done = doctor(before=["unshare", "--net"], config=written(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "missing" not in done.stdout
    assert "ok       verifier" in done.stdout
    assert "ok       interception" in done.stdout
    assert "ok       run directory" in done.stdout
    assert "no route leads to clients 192.0.2.0/24" in done.stdout
    assert "do:  add the route, then apply again" in done.stdout


def test_as_json_it_is_a_list_of_checks(tmp_path):
    done = doctor("--json", config=written(tmp_path))
    found = {check["name"]: check for check in json.loads(done.stdout)}
    assert set(found["verifier"]) == {"name", "ok", "found", "why", "do", "required"}
    assert found["interception"]["ok"]


def test_a_run_directory_on_disk_is_missing_its_memory(tmp_path):
    done = doctor("--json", config=written(tmp_path, run="/var/tmp/nt-doctor"))
    (check,) = [c for c in json.loads(done.stdout) if c["name"] == "run directory"]
    assert not check["ok"]
    assert done.returncode == 1


def test_without_privileges_it_says_what_is_missing_and_fails(tmp_path):
    powerless = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    done = doctor(before=powerless, config=written(tmp_path))
    assert done.returncode == 1
    assert "missing  privileges" in done.stdout
    assert "missing  interception" in done.stdout
    assert done.stderr == ""


def test_it_works_before_there_is_a_configuration(tmp_path):
    environment = {"NARROWS_CONFIG": str(tmp_path / "absent.toml")}
    done = subprocess.run(
        [sys.executable, "-m", "appliance", "doctor"], capture_output=True, text=True, check=False,
        cwd=ROOT, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0
    assert "redirect" not in done.stdout


def test_segment_numbers_that_run_out_are_a_warning(tmp_path):
    config = written(tmp_path)
    evidence = tmp_path / "state" / "evidence"
    evidence.mkdir(parents=True)
    for used, ok in ((1 << 23, True), (15 << 20, False)):
        (evidence / "generation").write_text(f"{used:08x}\n")
        found = json.loads(doctor("--json", config=config).stdout)
        (check,) = [c for c in found if c["name"] == "segment numbers"]
        assert (check["ok"], check["required"]) == (ok, False)
