"""The appliance's key as a systemd credential: nothing beside the evidence opens it."""

import os
import secrets
import subprocess
import sys

import pytest
from sealed_evidence import Evidence, evidence, whole_session

from capture.crypt import CREDENTIAL, Keys
from capture.errors import KeyFileError
from capture.reader import Reader, Side


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Return the file that systemd would make of LoadCredential=narrows.appliance-key:..."""
    path = tmp_path / CREDENTIAL
    path.write_text(secrets.token_hex(32) + "\n")
    path.chmod(0o400)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    return path


def test_evidence_is_written_and_read_with_the_key_that_systemd_gave(given, monkeypatch):
    with evidence() as place:
        writer = place.writer()
        session = whole_session(writer, 300, 5_000)
        writer.close()
        place.sealed()
        assert not (place.state / "appliance.key").exists()
        again = Evidence(place.state, place.run)
        reader = Reader(again.store, again.keys, None)
        assert sum(len(piece.data) for piece in reader.stream(session, Side.DOWN)) == 5_000
        assert not reader.damage
        reader.close()
        report = place.verify(key=given)
        assert report.exit_code == 0
        assert report.opened

        monkeypatch.delenv("CREDENTIALS_DIRECTORY")
        with pytest.raises(FileNotFoundError):
            Keys.load(place.state)
        assert not place.verify().opened


def test_the_command_line_verifies_with_the_key_that_systemd_gave(given, tmp_path):
    with evidence() as place:
        writer = place.writer()
        whole_session(writer, 300, 5_000)
        writer.close()
        place.sealed()
        config = tmp_path / "narrows.toml"
        config.write_text(
            f'[paths]\nstate = "{place.state}"\nrun = "{place.run}"\n[[route]]\nname = "all"\n'
        )
        words = ["evidence", "verify", "--config", str(config)]
        done = subprocess.run(
            [sys.executable, "-m", "appliance", *words], capture_output=True, check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"content opened and compared" in done.stdout


def test_another_key_beside_the_evidence_is_refused(given):
    with evidence() as place:
        (place.state / "appliance.key").write_text(secrets.token_hex(32) + "\n")
        (place.state / "appliance.key").chmod(0o600)
        with pytest.raises(KeyFileError, match="different keys"):
            Keys.load_or_create(place.state)


def test_a_credential_that_others_may_read_is_refused(given):
    given.chmod(0o444)
    with pytest.raises(KeyFileError, match="read by others"):
        Keys.load_or_create(given.parent / "state")
