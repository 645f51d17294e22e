"""What the system tests stand on: a test that fails leaves nothing for the next one."""

import pytest
from staging import Stage, own_place

pytestmark = pytest.mark.system


def test_a_stage_ends_what_a_test_left_running_and_closes_its_pipes():
    stage = Stage(own_place())
    try:
        stage.up(gate=False)
        left = stage.spawn("client", ["sleep", "100"], stdin=-1, stdout=-1, stderr=-1, text=True)
        left.stdin.write("not flushed when the test failed")
    finally:
        stage.down()
    assert left.returncode is not None
    assert left.stdin.closed
    assert left.stdout.closed
    assert left.stderr.closed
