"""The long-running processes: builds the objects of a gate worker or of the seal, and runs them
until SIGTERM.

The only place where the parts of a process are put together. `appliance.cli` calls `gate` and
`seal`; systemd units or the lab's supervisor start and restart the processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import signal
import time
from typing import TYPE_CHECKING, Any, TypeVar

from appliance.attribution import Attributor, Register, ReplayCache, SensorLink, check_overlaps
from appliance.live import ControlSocket
from appliance.proxy import redirect
from appliance.proxy.loop import GateLoop
from appliance.proxy.worker import Worker
from capture.crypt import Keys
from capture.errors import EvidenceError
from capture.segment import SegmentWriter
from capture.settings import WriterSettings
from capture.store import Store
from ebpf.table import OwnerTable

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from appliance.config import Config

Answer = TypeVar("Answer")

log = logging.getLogger("narrows.daemon")

EXPIRE_S = 5.0
FLOWS_S, CROWDED_S = 10.0, 1.0
SEAL_S = 0.2


def gate(config: Config, number: int) -> int:
    """Run gate worker `number` until SIGTERM or SIGINT; return the exit code."""
    check_overlaps(config.account, config.file)
    _all_descriptors()
    own = redirect.own_addresses()  # netlink before the loop: pyroute2 runs a loop of its own
    loop = GateLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(_gate(config, number, own, loop))


async def _gate(config: Config, number: int, own: set[str], loop: GateLoop) -> int:
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
    worker.start(writer)
    stopping = asyncio.Event()
    kernel = loop.create_task(_record_kernel(config, writer, stopping)) if number == 0 else None
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
    stopping.set()
    if kernel is not None:
        await kernel
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


def sensor(config: Config) -> int:
    """Run the sensor until SIGTERM or SIGINT; return the exit code."""
    from ebpf import procfs
    from ebpf.sensor import SensorSettings, run

    settings = SensorSettings(
        cgroup=procfs.cgroup_mount() / config.sensor.cgroup.strip("/"),
        socket=config.paths.run / "sensor.sock",
        blob=config.paths.blob,
        prefixes=config.sensor.prefixes,
        covers=config.sensor.covers,
        host=config.sensor.host,
    )
    return run(settings)


def _settings(config: Config) -> WriterSettings:
    evidence = config.evidence
    return WriterSettings(
        chunk_count=evidence.chunk_count,
        segment_bytes=evidence.segment_bytes,
        commit_s=evidence.commit_ms / 1000,
        reserve_bytes=evidence.reserve_bytes,
    )


async def _record_kernel(config: Config, writer: SegmentWriter, stopping: asyncio.Event) -> None:
    """Record what the kernel lets pass by itself: bypasses at start, flows now and at the stop.

    Records are written on the loop; netlink is asked on threads, because pyroute2 runs a loop of
    its own.
    """
    await _try("the redirect is not checked", _warn(config))
    with redirect.alone(config.paths.run, wait=False) as mine:
        if mine:
            await _try("what passed without a gate is not recorded yet", _record_bypass(writer))
    crowded = stopped = False
    while not stopped:
        with contextlib.suppress(TimeoutError):
            stopped = await asyncio.wait_for(stopping.wait(), CROWDED_S if crowded else FLOWS_S)
        with redirect.alone(config.paths.run, wait=False) as mine:
            if mine:
                flows = await _try("flows are not recorded yet", _record_flows(writer))
                crowded = (flows or 0) > redirect.CROWD


async def _record_flows(writer: SegmentWriter) -> int:
    meter = redirect.FlowMeter()
    return await redirect.record_flows(meter, lambda flow: writer.record(0, flow, flow.until))


async def _warn(config: Config) -> None:
    for problem in await asyncio.to_thread(redirect.check, config):
        log.warning("redirect: %s", problem)


async def _record_bypass(writer: SegmentWriter) -> None:
    """Record what passed while no gate was there, and start the kernel's counters anew.

    The listeners are open already, so nothing more passes. The records are in memory that survives
    the death of every process; loss of power takes the counters as well, so the disk is not waited
    for.
    """
    gaps = await asyncio.to_thread(redirect.bypass_gaps)
    for gap in gaps:
        writer.record(0, gap, gap.until)
    for late in await asyncio.to_thread(redirect.settle_bypass, gaps):
        writer.record(0, late, late.until)


async def _try(what: str, work: Coroutine[Any, Any, Answer]) -> Answer | None:
    """Do a part of a task that must not end; `what` is logged when kernel or disk refuse it."""
    try:
        return await work
    except (EvidenceError, redirect.NetlinkError, OSError):
        log.exception("%s", what)
        return None


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
