"""The seal process: builds its objects, and runs them until SIGTERM."""

from __future__ import annotations

import logging
import signal
import time
from typing import TYPE_CHECKING

from capture.crypt import Keys
from capture.seal import Seal
from capture.sealed import RewriteSettings
from capture.store import Store

if TYPE_CHECKING:
    from appliance.config import Config

log = logging.getLogger("narrows.daemon")

SEAL_S = 0.2


def run(config: Config) -> int:
    """Run the seal until SIGTERM or SIGINT; return the exit code."""
    store = Store(config.paths.state, config.paths.run)
    store.prepare()
    keys = Keys.load_or_create(config.paths.state)
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: stopping.append(number))
    rewrite = RewriteSettings(after_s=config.evidence.rewrite_s)
    sealer = Seal(store, keys, float(config.evidence.checkpoint_s), rewrite)
    log.info("the seal is ready")
    while not stopping:
        busy = sealer.step()
        if not busy:
            time.sleep(SEAL_S)
    sealer.close()
    return 0
