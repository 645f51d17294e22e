"""schemathesis asks the real server what its description allows, and what it does not.

It runs as the program that it is, on a seed that never changes: what fails once fails always.
"""

import itertools
import subprocess
import sys

import pytest

from appliance.web.failures import Failures
from capture.frames import session_name

#: `/live/events` never ends by itself; tests/appliance/web/test_live_api.py reads it.
ENDLESS = "/live/events"
#: What is only true of an API that makes things, which this one does not.
CHECKS = "use_after_free,ensure_resource_availability"


@pytest.fixture(scope="module")
def filled(shared):
    from capture.seal import Seal

    with shared.evidence.writer() as gate:
        number = gate.open("ci-deployer", "postgresql")
        for op in range(1, 4):
            gate.select(number, op, "select 1")
        gate.close(number)
        gate.commit()
    seal = Seal(shared.evidence.store, shared.evidence.keys, checkpoint_s=0.01)
    while seal.step():
        pass
    seal.close()
    minutes = itertools.count(0.0, 61.0)  # every token that is not good is the first of a minute
    shared.server.review.failures = Failures(lambda: next(minutes))
    shared.name = session_name(number)
    return shared


def schemathesis(api, folder, *words):
    """Run it over the whole API; CompletedProcess."""
    base = f"https://127.0.0.1:{api.port}/api/v1"
    argv = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{base}/openapi.json", "--url", base,
        "--tls-verify", str(api.config.paths.state / "review.crt"),
        "--header", f"Authorization: Bearer {api.tokens['admin']}",
        "--exclude-path", ENDLESS, "--exclude-checks", CHECKS,
        "--seed", "1", "--generation-deterministic",
        "--max-examples", "30", "--request-timeout", "30", "--no-color", *words,
    ]  # fmt: skip
    return subprocess.run(
        argv, cwd=folder, capture_output=True, text=True, check=False, timeout=110
    )


@pytest.mark.system
def test_what_schemathesis_asks_is_answered_as_described(filled, tmp_path):
    done = schemathesis(filled, tmp_path)
    assert done.returncode == 0, done.stdout[-12_000:] + done.stderr
