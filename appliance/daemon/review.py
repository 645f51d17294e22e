"""The review process: builds its objects, and runs them until SIGTERM."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from appliance.daemon.ending import all_descriptors, until_signal
from appliance.daemon.memory import require_memory
from appliance.web.server import Server
from capture.crypt import Keys
from capture.store import Store

if TYPE_CHECKING:
    from appliance.config import Config

log = logging.getLogger("narrows.daemon")


def run(config: Config) -> int:
    """Run the review API until SIGTERM or SIGINT; return the exit code."""
    all_descriptors()
    return asyncio.run(_review(config))


async def _review(config: Config) -> int:
    store = Store(config.paths.state, config.paths.run)
    store.prepare()
    require_memory(config, store)
    server = Server(config, store, Keys.load_or_create(config.paths.state))
    await server.start()
    log.info("the review API listens on %s, port %d", config.review.address, server.port)
    await until_signal(asyncio.get_running_loop())
    await server.stop()
    return 0
