"""Where the output goes may be narrower than what there is to say."""

import os
import subprocess
import sys

import pytest

from capture.frames import session_name


@pytest.fixture
def session(narrows):
    with narrows.evidence.writer() as gate:
        made = gate.open(protocol="postgresql")
        gate.select(made, 1, "select '\U0001f600\u00e9' from a")
        gate.select(made, 2, "select 2 from b")
        gate.close(made)
    return session_name(made)


def run(narrows, *words, stdout=subprocess.PIPE, **environment):
    return subprocess.run(
        [sys.executable, "-m", "appliance", *words, "--config", str(narrows.config)],
        stdout=stdout, stderr=subprocess.PIPE, check=False,
        env={**os.environ, "PYTHONUNBUFFERED": "", **environment},
    )  # fmt: skip


@pytest.mark.parametrize("charset", ["ascii", "latin-1", "utf-8"])
def test_a_conversation_is_told_to_its_end_on_any_terminal(narrows, session, charset):
    done = run(narrows, "sessions", "show", session, PYTHONIOENCODING=charset)
    assert (done.returncode, done.stderr) == (0, b"")
    out = done.stdout.decode(charset)
    assert ("\U0001f600" if charset == "utf-8" else "\\U0001f600") in out
    assert ("\\xe9" if charset == "ascii" else "\u00e9") in out
    assert "select 2 from b" in out


def test_a_full_disk_under_the_output_is_one_line(narrows, session):
    for words in (["list"], ["list", "--json"], ["show", session], ["export", "--all"]):
        with open("/dev/full", "wb") as full:
            done = run(narrows, "sessions", *words, stdout=full)
        assert done.returncode == 1, words
        assert done.stderr == b"narrows: the output cannot be written: No space left on device\n"


def test_a_reader_that_left_is_told_apart_from_what_verify_says(narrows, session):
    for words in (["sessions", "show", session, "--all"], ["evidence", "verify"]):
        reader, writer = os.pipe()
        os.close(reader)
        done = run(narrows, *words, stdout=writer)
        os.close(writer)
        assert (done.returncode, done.stderr) == (141, b"")
