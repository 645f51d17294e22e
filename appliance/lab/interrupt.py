"""Signals that end the demo or the bench as Ctrl-C does, so that what they made is taken down."""

from __future__ import annotations

import os
import signal


def interruptible(*numbers: signal.Signals) -> None:
    """Let each signal raise KeyboardInterrupt in this process.

    pyroute2 forks children for work in other namespaces and ends them with SIGTERM. A child that
    took it for its own interruption would unwind its parent's stack and take down the parent's
    hosts under it: in a child the signal ends the child.
    """
    owner = os.getpid()

    def interrupt(number: int, _frame: object) -> None:
        if os.getpid() != owner:
            os._exit(128 + number)
        raise KeyboardInterrupt

    for number in numbers:
        signal.signal(number, interrupt)
