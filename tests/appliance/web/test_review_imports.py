"""The review process holds nothing that it does not need: less to attack, and a quick start."""

import subprocess
import sys

NOT_FOR_READING = {
    "appliance.attribution", "appliance.daemon.gate", "appliance.protocols", "appliance.proxy",
    "appliance.sansio", "appliance.wire", "bcc", "ebpf", "httptools", "postgast", "pyroute2",
    "scapy", "siphash24",
}  # fmt: skip


def test_the_review_process_imports_nothing_of_the_data_path():
    code = "import appliance.cli.serve, appliance.daemon.review, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    there = set(done.stdout.split())
    assert "appliance.web.server" in there
    assert not NOT_FOR_READING & there
