import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.system
KEYS = {
    "id", "service_account", "assurance", "owner", "client", "target", "protocol", "operations",
    "bytes_up", "bytes_down",
}  # fmt: skip


def test_the_demo_proves_the_main_job_and_leaves_nothing_behind():
    done = subprocess.run(
        [str(ROOT / "run"), "demo", "--once", "--json"],
        capture_output=True, text=True, check=False, timeout=115,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    story = json.loads(done.stdout)
    assert story["verify"]["ok"]
    assert story["verify"]["leaves"] > 2 * len(story["sessions"])  # each one's beginning and end
    accounts = {session["service_account"] for session in story["sessions"]}
    assert accounts == {"ci-deployer", "backup-job", "report-job"}
    assert story["api"] == {"url": "https://203.0.113.1:8443"}
    targets = {session["target"] for session in story["sessions"]}
    assert {f"198.51.100.10:{port}" for port in (80, 443, 5432, 6379)} == targets
    for session in story["sessions"]:
        assert set(session) == KEYS
        assert session["assurance"] == "kernel"
        assert {"exe", "pid", "cgroup"} <= set(session["owner"])
        assert session["bytes_up"] > 0
        assert session["bytes_down"] > 0
    protocols = {session["protocol"] for session in story["sessions"]}
    assert protocols == {"postgresql", "http1", "opaque"}
    for path in ("/run/narrows-lab", "/var/lib/narrows-lab", "/run/netns/narrows-gate"):
        assert not Path(path).exists()
