"""What all processes do: end at SIGTERM, and open as many files as they may."""

from __future__ import annotations

import asyncio
import resource
import signal


async def until_signal(loop: asyncio.AbstractEventLoop) -> None:
    """Return at SIGTERM or SIGINT."""
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    await ended.wait()


def all_descriptors() -> None:
    """Raise the limit of open files to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
