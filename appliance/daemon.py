"""The long-running processes: builds the objects of a gate worker, of the seal or of the review
API, and runs them until SIGTERM.

The only place where the parts of a process are put together. `appliance.cli` calls `gate`, `seal`
and `review`; systemd units or the lab's supervisor start and restart the processes.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import signal
import time
from typing import TYPE_CHECKING

from appliance.attribution import Attributor, Register, ReplayCache, SensorLink, check_overlaps
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
SEAL_S = 0.2


def gate(config: Config, number: int) -> int:
    """Run gate worker `number` until SIGTERM or SIGINT; return the exit code. AlreadyRuns when
    another process does.
    """
    check_overlaps(config.account, config.file)
    store = Store(config.paths.state, config.paths.run)
    store.prepare()
    _all_descriptors()
    own = redirect.own_addresses()  # netlink before the loop: pyroute2 runs a loop of its own
    discover()  # its imports take a while: no session is to wait for them
    with alone(store.run, number):
        loop = GateLoop()
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            return runner.run(_gate(config, number, store, own, loop))


async def _gate(config: Config, number: int, store: Store, own: set[str], loop: GateLoop) -> int:
    keys = Keys.load_or_create(config.paths.state)
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
    await _until_signal(loop)
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


def seal(config: Config) -> int:
    """Run the seal until SIGTERM or SIGINT; return the exit code."""
    from capture.seal import Seal
    from capture.sealed import RewriteSettings

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


def review(config: Config) -> int:
    """Run the review API until SIGTERM or SIGINT; return the exit code."""
    _all_descriptors()
    return asyncio.run(_review(config))


async def _review(config: Config) -> int:
    from appliance.web.server import Server

    store = Store(config.paths.state, config.paths.run)
    store.prepare()
    server = Server(config, store, Keys.load_or_create(config.paths.state))
    await server.start()
    log.info("the review API listens on %s, port %d", config.review.address, server.port)
    await _until_signal(asyncio.get_running_loop())
    await server.stop()
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


def _expire(loop: asyncio.AbstractEventLoop, table: OwnerTable) -> None:
    table.expire(time.monotonic_ns())
    loop.call_later(EXPIRE_S, _expire, loop, table)


async def _until_signal(loop: asyncio.AbstractEventLoop) -> None:
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    await ended.wait()


def _all_descriptors() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
