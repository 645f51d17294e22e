"""The long-running processes: builds the objects of a gate worker or of the seal, and runs them
until SIGTERM.

The only place where the parts of a process are put together. `appliance.cli` calls `gate` and
`seal`; systemd units or the lab's supervisor start and restart the processes.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import signal
import time
from typing import TYPE_CHECKING

import uvloop

from appliance.attribution import Attributor, Register, ReplayCache, SensorLink, check_overlaps
from appliance.live import ControlSocket
from appliance.proxy import redirect
from appliance.proxy.worker import Worker
from capture.crypt import Keys
from capture.errors import EvidenceError
from capture.segment import SegmentWriter
from capture.settings import WriterSettings
from capture.store import Store
from ebpf.table import OwnerTable

if TYPE_CHECKING:
    from appliance.config import Config

log = logging.getLogger("narrows.daemon")

EXPIRE_S = 5.0
SEAL_S = 0.2


def gate(config: Config, number: int) -> int:
    """Run gate worker `number` until SIGTERM or SIGINT; return the exit code."""
    check_overlaps(config.account, config.file)
    _all_descriptors()
    own = redirect.own_addresses()  # netlink before the loop: pyroute2 runs a loop of its own
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_gate(config, number, own))


async def _gate(config: Config, number: int, own: set[str]) -> int:
    loop = asyncio.get_running_loop()
    store = Store(config.paths.state, config.paths.run)
    store.prepare()
    keys = Keys.load_or_create(config.paths.state)
    table = OwnerTable()
    replays = ReplayCache(config.paths.run / "replay", config.attribution.replay_entries)
    moved: list[Attributor] = []
    link = SensorLink(
        loop, config.paths.run / "sensor.sock", table, lambda: [a.moved() for a in moved] and None
    )  # fmt: skip
    attributor = Attributor(
        loop, Register(config.account), table, link, replays, config.attribution.wait_ms / 1000
    )  # fmt: skip
    moved.append(attributor)
    worker = Worker(config, number, loop, keys, attributor, own)
    writer = SegmentWriter(
        store, keys, f"gate-{number}", role="gate", worker=number, settings=_settings(config),
        wake=worker.wake, config_sha256=config.sha256,
    )  # fmt: skip
    if number == 0:
        await asyncio.to_thread(_record_bypass, writer)
    worker.start(writer)
    control = ControlSocket(worker, config.paths.run / f"gate-{number}.sock")
    await control.start()
    loop.call_later(EXPIRE_S, _expire, loop, table)
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 50)
    log.info("gate worker %d is ready", number)
    await _until_signal(loop)
    await control.stop()
    stopped = loop.create_future()
    worker.stop(lambda: stopped.done() or stopped.set_result(None))
    await asyncio.wait_for(stopped, 30)
    link.close()
    writer.close("stopped")
    return 0


def seal(config: Config) -> int:
    """Run the seal until SIGTERM or SIGINT; return the exit code."""
    from capture.seal import Seal

    store = Store(config.paths.state, config.paths.run)
    store.prepare()
    keys = Keys.load_or_create(config.paths.state)
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: stopping.append(number))
    sealer = Seal(store, keys, checkpoint_s=float(config.evidence.checkpoint_s))
    log.info("the seal is ready")
    while not stopping:
        busy = sealer.step()
        if not busy:
            time.sleep(SEAL_S)
    sealer.close()
    return 0


def _settings(config: Config) -> WriterSettings:
    evidence = config.evidence
    return WriterSettings(
        chunk_count=evidence.chunk_count,
        segment_bytes=evidence.segment_bytes,
        commit_s=evidence.commit_ms / 1000,
        reserve_bytes=evidence.reserve_bytes,
    )


def _record_bypass(writer: SegmentWriter) -> None:
    """Record what passed while no gate was there; durable before the counters start anew.

    Called on a thread: netlink has a loop of its own, and the disk is waited for. When the disk
    does not take it, the counters stay as they are and the next start records them.
    """
    gaps = redirect.bypass_gaps()
    try:
        for gap in gaps:
            writer.record(0, gap, gap.until)
        if gaps:
            writer.wait_durable()
        for late in redirect.settle_bypass(gaps):
            writer.record(0, late, late.until)
    except EvidenceError:
        log.exception("what passed without a gate is not recorded yet")


def _expire(loop: asyncio.AbstractEventLoop, table: OwnerTable) -> None:
    table.expire(time.monotonic_ns())
    loop.call_later(EXPIRE_S, _expire, loop, table)


async def _until_signal(loop: asyncio.AbstractEventLoop) -> None:
    ended = loop.create_future()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: ended.done() or ended.set_result(None))
    await ended


def _all_descriptors() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
