"""A signal interrupts the process that asked for it, and no child of it."""

import os
import signal
import sys
import time
from subprocess import PIPE, Popen

import pytest

PROGRAM = """
import os, signal, sys, time
from appliance.lab.interrupt import interruptible

interruptible(signal.SIGTERM)
try:
    child = os.fork()
    if not child:
        time.sleep(30)
    print(child, flush=True)
    time.sleep(30)
finally:
    print("taken down", flush=True)
"""


@pytest.fixture
def program():
    with Popen([sys.executable, "-c", PROGRAM], stdout=PIPE, stderr=PIPE, text=True) as started:
        yield started
        started.kill()


def test_a_forked_child_ends_without_taking_its_parents_stage_down(program):
    child = int(program.stdout.readline())
    time.sleep(0.2)  # the child sleeps by now
    os.kill(child, signal.SIGTERM)
    time.sleep(0.2)
    program.send_signal(signal.SIGTERM)
    out, err = program.communicate(timeout=20)
    assert out == "taken down\n"
    assert "KeyboardInterrupt" in err
