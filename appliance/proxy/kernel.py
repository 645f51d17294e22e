"""What a gate tells of its kernel: addresses, the redirect's state, what passed by itself.

`appliance.daemon` runs both tasks beside the data path. Records are written on the loop; netlink is
asked on threads, because pyroute2 runs a loop of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, TypeVar

from appliance.proxy import redirect
from capture.errors import EvidenceError

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from appliance.config import Config
    from appliance.proxy.worker import Worker
    from capture.segment import SegmentWriter

Answer = TypeVar("Answer")

log = logging.getLogger("narrows.gate")

ADDRESSES_S = 5.0
FLOWS_S, CROWDED_S = 10.0, 1.0


async def follow_addresses(worker: Worker, own: set[str]) -> None:
    """Tell the worker when this host's addresses are others than `own`."""
    while True:
        await asyncio.sleep(ADDRESSES_S)
        asked = asyncio.to_thread(redirect.own_addresses)
        found = await _try("this host's addresses are not known", asked)
        if found and found != own:
            own = found
            worker.own_addresses_are(own)


async def record_kernel(config: Config, writer: SegmentWriter, stopping: asyncio.Event) -> None:
    """Record what the kernel lets pass by itself: bypasses at start, flows now and at the stop."""
    await _try("the redirect is not checked", _warn(config))
    with redirect.alone(config.paths.run, wait=False) as mine:
        if mine:
            await _try("what passed without a gate is not recorded yet", _record_bypass(writer))
    crowded = stopped = lost = False
    while not stopped:
        found = await _try("lost counts are not recorded", _record_lost(writer, known=lost))
        lost = lost if found is None else found
        with contextlib.suppress(TimeoutError):
            stopped = await asyncio.wait_for(stopping.wait(), CROWDED_S if crowded else FLOWS_S)
        with redirect.alone(config.paths.run, wait=False) as mine:
            if mine:
                flows = await _try("flows are not recorded yet", _record_flows(writer))
                crowded = (flows or 0) > redirect.CROWD


async def _record_lost(writer: SegmentWriter, *, known: bool) -> bool:
    """Record once that somebody removed the rule set; return whether it is gone."""
    gap = await asyncio.to_thread(redirect.lost_counts)
    if gap is not None and not known:
        log.error("%s: client subnets are closed until narrows redirect apply", gap.detail)
        writer.record(0, gap, gap.until)
    return gap is not None


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
