"""A gate worker: builds its objects, and runs them until SIGTERM."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from typing import TYPE_CHECKING

from appliance.attribution import Attributor, Register, ReplayCache, SensorLink, check_overlaps
from appliance.daemon.ending import all_descriptors, until_signal
from appliance.daemon.memory import require_memory
from appliance.live import ControlSocket, alone
from appliance.protocols import discover
from appliance.proxy import redirect
from appliance.proxy.kernel import follow_addresses, record_kernel
from appliance.proxy.loop import GateLoop
from appliance.proxy.worker import Worker
from capture.crypt import Keys
from capture.segment import SegmentWriter
from capture.settings import WriterSettings
from capture.store import Store
from ebpf.table import OwnerTable

if TYPE_CHECKING:
    from appliance.config import Config

log = logging.getLogger("narrows.daemon")

EXPIRE_S = 5.0


def run(config: Config, number: int) -> int:
    """Run gate worker `number` until SIGTERM or SIGINT; return the exit code. AlreadyRuns when
    another process does.
    """
    check_overlaps(config.account, config.file)
    store = Store(config.paths.state, config.paths.run)
    store.prepare()
    all_descriptors()
    own = redirect.own_addresses()  # netlink before the loop: pyroute2 runs a loop of its own
    discover()  # its imports take a while: no session is to wait for them
    with alone(store.run, number):
        loop = GateLoop()
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            return runner.run(_gate(config, number, store, own, loop))


async def _gate(config: Config, number: int, store: Store, own: set[str], loop: GateLoop) -> int:
    keys = Keys.load_or_create(config.paths.state)
    require_memory(config, store)
    link, attributor = _attribution(config, loop)
    worker = Worker(config, number, loop, keys, attributor, own)
    writer = SegmentWriter(
        store, keys, f"gate-{number}", role="gate", worker=number, settings=_settings(config),
        wake=worker.wake, config_sha256=config.sha256,
    )  # fmt: skip
    await link.greet()  # connections that waited for a gate have their owners asked at once
    worker.start(writer)
    stopping = asyncio.Event()
    kernel = loop.create_task(record_kernel(config, writer, stopping)) if number == 0 else None
    addresses = loop.create_task(follow_addresses(worker, own))
    control = ControlSocket(worker, config.paths.run / f"gate-{number}.sock")
    await control.start()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 50)
    log.info("gate worker %d is ready", number)
    await until_signal(loop)
    await control.stop()
    stopped = asyncio.Event()
    worker.stop(stopped.set)
    await asyncio.wait_for(stopped.wait(), 30)
    addresses.cancel()
    stopping.set()
    if kernel is not None:
        await kernel
    link.close()
    writer.close("stopped")
    return 0


def _attribution(config: Config, loop: GateLoop) -> tuple[SensorLink, Attributor]:
    """Return the link to the sensor and what answers from it; the owners that it names expire."""

    def moved() -> None:
        attributor.moved()

    table = OwnerTable()
    link = SensorLink(loop, config.paths.run / "sensor.sock", table, moved, config.sensor.covers)
    replays = ReplayCache(config.paths.run / "replay", config.attribution.replay_entries)
    wait_s = config.attribution.wait_ms / 1000
    attributor = Attributor(loop, Register(config.account), table, link, replays, wait_s)
    loop.call_later(EXPIRE_S, _expire, loop, table)
    return link, attributor


def _settings(config: Config) -> WriterSettings:
    evidence = config.evidence
    return WriterSettings(
        chunk_count=evidence.chunk_count,
        segment_bytes=evidence.segment_bytes,
        segment_s=evidence.segment_s,
        commit_s=evidence.commit_ms / 1000,
        reserve_bytes=evidence.reserve_bytes,
    )


def _expire(loop: asyncio.AbstractEventLoop, table: OwnerTable) -> None:
    table.expire(time.monotonic_ns())
    loop.call_later(EXPIRE_S, _expire, loop, table)
