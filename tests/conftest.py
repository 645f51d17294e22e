"""What holds for every test: a skip is only allowed for what this kernel cannot do.

A reason that begins with "kernel:" names it. Any other skip hides a missing installation step or a
test that never runs, and fails the run.
"""

import pytest

ALLOWED = "kernel:"


def pytest_sessionfinish(session, exitstatus):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    hidden = [r for r in reporter.stats.get("skipped", []) if ALLOWED not in str(r.longrepr)]
    if hidden and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        for report in hidden:
            reporter.write_line(f"skipped without a kernel's reason: {report.nodeid}", red=True)
