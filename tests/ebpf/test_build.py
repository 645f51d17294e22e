"""The blob: the same sources give the same bytes, and what is missing is said."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from watching import BLOB

from ebpf import build

ROOT = Path(__file__).parents[2]


def built(out):
    command = [sys.executable, "-m", "ebpf.build", "--force", "--out", out]
    subprocess.run(command, check=True, cwd=ROOT)
    return out.read_bytes()


def test_two_builds_give_the_same_bytes_and_they_are_those_of_the_machine(tmp_path):
    first = built(tmp_path / "one" / "sensor.blob")
    assert first == built(tmp_path / "two.blob")
    assert first == BLOB.read_bytes()


def test_nothing_of_the_builder_is_in_the_blob():
    blob = json.loads(BLOB.read_text())
    assert set(blob) == {"arch", "format", "maps", "programs", "source"}
    for program in blob["programs"].values():
        assert set(program) == {"attach", "attach_type", "code", "fields", "maps", "type"}


def test_a_blob_of_these_sources_is_not_built_again(tmp_path):
    out = tmp_path / "sensor.blob"
    out.write_bytes(BLOB.read_bytes())
    out.chmod(0o400)
    before = out.stat()
    assert build.main(["--out", str(out)]) == 0
    assert out.stat().st_mtime_ns == before.st_mtime_ns


def test_a_blob_of_other_sources_or_none_at_all_is_not_taken_for_current(tmp_path):
    out = tmp_path / "sensor.blob"
    assert not build._is_current(out)
    for text in ("", "[]", json.dumps({"source": "x", "arch": "x86_64"})):
        out.write_text(text)
        assert not build._is_current(out)


def test_each_header_of_ours_is_put_in_once():
    text = build.source_text()
    assert '#include "' not in text
    assert text.count("struct connect_event {") == 1
    assert text.count("u64 siphash(") == 1


def test_every_source_counts_for_the_hash(tmp_path):
    for path in build.PROGRAMS.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = build.source_hash(tmp_path)
    assert before == build.source_hash()
    for path in tmp_path.glob("*.[ch]"):
        text = path.read_text()
        path.write_text(text + "\n/* changed */\n")
        assert build.source_hash(tmp_path) != before
        path.write_text(text)


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        ([], None),
        (["6.1.0-1-cloud-amd64", "6.1.0-9-amd64"], "6.1.0-1-cloud-amd64"),
        (["6.1.0-1-cloud-amd64", "running"], "running"),
        (["6.1.0-8-amd64", "6.1.0-9-amd64"], "6.1.0-9-amd64"),
    ],
)
def test_headers_of_the_running_kernel_come_first_then_the_cloud_kernels(tmp_path, present, chosen):
    for name in present:
        (tmp_path / name / "build").mkdir(parents=True)
    found = build.headers("running", tmp_path)
    assert found == (tmp_path / chosen if chosen else None)


def test_a_build_that_cannot_be_made_leaves_the_old_blob(tmp_path):
    out = tmp_path / "sensor.blob"
    out.write_text("old")
    code = (
        "import sys; sys.modules['bcc'] = None\n"
        "from ebpf.build import main\n"
        "sys.exit(main(['--out', sys.argv[1]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, out], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 1
    assert done.stderr == "ebpf.build: BCC is missing: apt-get install python3-bpfcc\n"
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]
