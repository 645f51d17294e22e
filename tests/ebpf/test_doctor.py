"""What a machine lacks: this one lacks nothing, and others are told what to do."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
from watching import BLOB

from ebpf import doctor

ROOT = Path(__file__).parents[2]
#: Root, but without capabilities: what a container or a service with too few would find.
POWERLESS = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]


def by_name(checks):
    return {check.name: check for check in checks}


def test_a_machine_that_runs_these_tests_lacks_nothing_that_is_required():
    found = doctor.checks(BLOB)
    assert [check for check in found if check.required and not check.ok] == []
    assert by_name(found)["verifier"].found == "takes all 6 programs"
    assert all(check.why and check.found for check in found)
    assert all(bool(check.do) != check.ok for check in found)


def test_without_a_fitting_blob_the_compiler_is_required_and_the_reason_is_said(tmp_path):
    assert not by_name(doctor.checks(BLOB))["BCC"].required
    found = by_name(doctor.checks(tmp_path / "absent"))
    assert found["BCC"].required
    assert found["kernel headers"].required
    assert not found["compiled programs"].ok
    assert "no blob at" in found["compiled programs"].found
    assert "verifier" not in found


def test_headers_of_another_kernel_are_said_to_be_so():
    found = by_name(doctor.checks(BLOB))["kernel headers"].found
    own = Path("/lib/modules", doctor.platform.release(), "build").exists()
    assert ("of this kernel" if own else "good for compiling only") in found


def test_programs_that_the_verifier_refuses_are_shown_with_its_words(tmp_path):
    blob = json.loads(BLOB.read_text())
    code = base64.b64decode(blob["programs"]["on_connect4"]["code"])
    wrong = bytes([0x18, 0xF0]) + code[2:]  # a load from nowhere
    blob["programs"]["on_connect4"]["code"] = base64.b64encode(wrong).decode()
    (tmp_path / "bad.blob").write_text(json.dumps(blob))
    check = by_name(doctor.checks(tmp_path / "bad.blob"))["verifier"]
    assert (check.ok, check.required) == (False, True)
    assert "on_connect4" in check.found


def test_who_may_nothing_is_told_which_capabilities_are_missing():
    code = (
        "import json; from pathlib import Path; from ebpf.doctor import checks\n"
        f"print(json.dumps({{c.name: [c.ok, c.found] for c in checks(Path({str(BLOB)!r}))}}))"
    )
    done = subprocess.run(
        [*POWERLESS, sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=ROOT,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert not found["privileges"][0]
    assert "CAP_BPF" in found["privileges"][1]
    assert not found["verifier"][0]
    assert not found["fanotify"][0]
    assert found["kernel types"][0]  # anybody may read them


@pytest.mark.parametrize(
    ("release", "fits"),
    [
        ("6.1.0-56-cloud-amd64", True),
        ("5.15.0", True),
        ("5.14.21-150500.55-default", False),
        ("5.4", False),
        ("10.0.1", True),
    ],
)
def test_kernels_before_5_15_are_too_old(release, fits):
    check = doctor._kernel(release)
    assert check.ok == fits
    assert release in check.found


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("[none] integrity confidentiality", True),
        ("none [integrity] confidentiality", True),
        ("none integrity [confidentiality]", False),
        ("", True),
    ],
)
def test_only_confidentiality_locks_the_sensor_out(tmp_path, text, fits):
    (tmp_path / "lockdown").write_text(text)
    assert doctor._lockdown(tmp_path / "lockdown").ok == fits
    assert doctor._lockdown(tmp_path / "absent").ok


def test_what_makes_it_slow_or_blind_is_a_warning(tmp_path):
    (tmp_path / "jit").write_text("0\n")
    (tmp_path / "cookies").write_text("2\n")
    for check in (
        doctor._jit(tmp_path / "jit"),
        doctor._cookies(tmp_path / "cookies"),
        doctor._machine_id(tmp_path / "absent"),
    ):
        assert (check.ok, check.required) == (False, False)
        assert check.do
    (tmp_path / "jit").write_text("1\n")
    assert doctor._jit(tmp_path / "jit").ok
