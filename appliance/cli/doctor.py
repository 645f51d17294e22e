"""`narrows doctor`: what this machine lacks, why it is needed, and how to get it.

The kernel's side of the sensor (`ebpf.doctor`), transparent interception (tried in a network
namespace that is gone afterwards), and, where there is a configuration, what is wrong with the
redirect here. Exit code 1 when something that is required is missing.
"""

from __future__ import annotations

import ctypes
import dataclasses
import ipaddress
import json
import os
import socket
import threading
from typing import TYPE_CHECKING

from appliance.cli import settings
from appliance.cli.outcome import FAILED, OK
from appliance.config import Config, Redirect, Route
from appliance.lab.place import BLOB
from appliance.proxy import redirect
from appliance.proxy.listener import open_listener
from appliance.proxy.redirect import nft, rules
from capture.store import Store
from ebpf import procfs
from ebpf.doctor import Check, checks

if TYPE_CHECKING:
    import argparse

_CLONE_NEWNET = 0x40000000
_TMPFS = "tmpfs"
MOST_USED = 0.8  #: of the numbers of segments and writers, before it is a warning
_ROUTE_WHY = "sessions are lost, or pass around the gate, where the way back is another"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's words."""
    settings.add_config(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(words: argparse.Namespace) -> int:
    """Check everything; say what is missing."""
    config = settings.chosen(words) if settings.find(words).exists() else None
    found = checks(config.paths.blob if config is not None else BLOB if BLOB.exists() else None)
    found.append(_interception())
    if config is not None:
        settings.enter_gate(words)
        found += _redirect(config)
        found.append(_run_directory(config))
        found.append(_numbers(config))
    if words.json:
        print(json.dumps([dataclasses.asdict(check) for check in found], indent=1))
    else:
        _show(found)
    return FAILED if any(check.required and not check.ok for check in found) else OK


def _show(found: list[Check]) -> None:
    width = max(len(check.name) for check in found)
    for check in found:
        state = "ok" if check.ok else "missing" if check.required else "warning"
        print(f"{state:8} {check.name:{width}}  {check.found.splitlines()[0]}")
        if not check.ok:
            print(f"{'':8} {'':{width}}  why: {check.why}\n{'':8} {'':{width}}  do:  {check.do}")


def _interception() -> Check:
    """Open the listeners and write the rules of a small gate, where nobody is redirected by it."""
    problems: list[str] = []

    def attempt() -> None:
        try:
            _intercept()
        except (OSError, redirect.NetlinkError) as wrong:
            problems.append(str(wrong))

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return Check(
        name="interception",
        ok=not problems,
        found=problems[0] if problems else "transparent sockets, saved SYNs, nftables with TPROXY",
        why="clients are redirected without noticing, and SYNs say who sent them",
        do="run as root; boot a kernel with nf_tables, nft_tproxy, nft_socket and nft_fib"
        if problems
        else "",
    )


def _intercept() -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):  # of this thread alone
        code = ctypes.get_errno()
        raise OSError(code, f"no network namespace: {os.strerror(code)}")
    for family in (socket.AF_INET, socket.AF_INET6):
        open_listener(family, 15001).close()
    clients = (ipaddress.ip_network("192.0.2.0/24"), ipaddress.ip_network("2001:db8::/64"))
    small = Config(redirect=Redirect(clients=clients), route=(Route("all"),))
    nft.replace(rules.build(small, ["lo"], "a"), nft.read(redirect.TABLE))


def _redirect(config: Config) -> list[Check]:
    try:
        problems = redirect.check(config)
    except (OSError, redirect.NetlinkError) as wrong:
        text, hint = f"cannot be looked at: {wrong}", "run as root"
        return [Check("redirect", ok=False, found=text, why=_ROUTE_WHY, do=hint)]
    if not problems:
        return [
            Check("redirect", ok=True, found="routes and forwarding fit", why=_ROUTE_WHY, do="")
        ]
    return [
        Check("redirect", ok=False, found=p.problem, why=_ROUTE_WHY, do=p.hint, required=False)
        for p in problems
    ]


def _run_directory(config: Config) -> Check:
    """The run directory, or what it will be made in, must be memory that outlives processes."""
    path = config.paths.run
    while not path.exists():
        path = path.parent
    device = path.stat().st_dev
    kinds = {m.kind for m in procfs.mounts() if os.makedev(*m.device) == device}
    fits = _TMPFS in kinds
    return Check(
        name="run directory",
        ok=fits,
        found=f"{config.paths.run} is on {', '.join(sorted(kinds)) or 'an unknown file system'}",
        why="what was received and is not on disk yet must survive the death of every process",
        do="" if fits else "set paths.run to a directory of a tmpfs, such as /run/narrows",
    )


def _numbers(config: Config) -> Check:
    """Numbers of segments and writers are never used again, and there are 2^24 of them."""
    used = Store(config.paths.state, config.paths.run).used()
    return Check(
        name="segment numbers",
        ok=used < MOST_USED,
        found=f"{used:.1%} are used",
        why="a gate without a number for its next segment refuses all sessions",
        do="" if used < MOST_USED else "keep this state directory, and begin a new one",
        required=False,
    )
