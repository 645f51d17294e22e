"""The lab's three hosts: network namespaces, veth pairs, addresses and routes, made with pyroute2.

    client 192.0.2.10 ─── 192.0.2.1 gate 198.51.100.1 ─── 198.51.100.10 server
                          203.0.113.1 gate ─── 203.0.113.2 this machine (management, optional)

IPv6 is 2001:db8:1::/64, 2001:db8:2::/64, the same host numbers. Nothing leaves the namespaces. The
lab and every system test use this; tests pass a prefix of their own so that they never meet the lab
or each other.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pyroute2 import IPRoute, NetNS, netns

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Answer = TypeVar("Answer")

CLIENT4, CLIENT6 = "192.0.2.10", "2001:db8:1::10"
SERVER4, SERVER6 = "198.51.100.10", "2001:db8:2::10"
GATE_CLIENT4, GATE_CLIENT6 = "192.0.2.1", "2001:db8:1::1"
GATE_SERVER4, GATE_SERVER6 = "198.51.100.1", "2001:db8:2::1"
MANAGEMENT_GATE, MANAGEMENT_HOST = "203.0.113.1", "203.0.113.2"
ROLES = ("client", "gate", "server")

_CLONE_NEWNET = 0x40000000
_NODAD = 2
_libc = ctypes.CDLL(None, use_errno=True)

_SYSCTLS = {
    "net/ipv4/ip_local_port_range": "2000 65000",
    "net/core/somaxconn": "8192",
    "net/ipv4/tcp_tw_reuse": "1",
    "net/ipv4/tcp_max_syn_backlog": "8192",
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv6/conf/all/accept_dad": "0",
}
_FORWARDING = {"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"}


@dataclass(frozen=True, slots=True)
class Topology:
    """Which namespaces; `management` adds the veth between this machine and the gate."""

    prefix: str = "narrows"
    management: bool = False

    def namespace(self, role: str) -> str:
        """Return the name of a role's namespace."""
        return f"{self.prefix}-{role}"

    @property
    def namespaces(self) -> list[str]:
        """Return the three names."""
        return [self.namespace(role) for role in ROLES]

    @property
    def host_link(self) -> str:
        """Return the name of this machine's end of the management veth."""
        return f"{self.prefix[:10]}-mgmt"

    def exists(self) -> bool:
        """Say whether all three namespaces are there."""
        return all(Path("/run/netns", name).exists() for name in self.namespaces)


def enter(namespace: str) -> None:
    """Move the calling thread into a namespace."""
    fd = os.open(f"/run/netns/{namespace}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(fd, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")
    finally:
        os.close(fd)


def down(topology: Topology) -> None:
    """Remove everything that `up` makes; what is not there is not missed."""
    for name in topology.namespaces:
        with contextlib.suppress(FileNotFoundError, OSError):
            netns.remove(name)
    with IPRoute() as ip:
        for index in ip.link_lookup(ifname=topology.host_link):
            with contextlib.suppress(Exception):
                ip.link("del", index=index)


def up(topology: Topology) -> None:
    """Make the three hosts, after removing what is left of them."""
    down(topology)
    for name in topology.namespaces:
        netns.create(name)
    client, gate, server = topology.namespaces
    for name in topology.namespaces:
        run(name, _set_sysctls, _SYSCTLS | (_FORWARDING if name == gate else {}))
    with IPRoute() as ip:
        _veth(ip, "eth0", client, "client0", gate)
        _veth(ip, "eth0", server, "server0", gate)
        if topology.management:
            ip.link(
                "add",
                ifname=topology.host_link,
                kind="veth",
                peer={"ifname": "mgmt0", "net_ns_fd": gate},
            )
            index = ip.link_lookup(ifname=topology.host_link)[0]
            # Point to point: the rest of that network may be somewhere else for this machine.
            peer4 = {"local": MANAGEMENT_HOST, "address": MANAGEMENT_GATE}
            ip.addr("add", index=index, prefixlen=32, **peer4)
            ip.link("set", index=index, state="up")
    _configure(client, {"eth0": [(CLIENT4, 24), (CLIENT6, 64)]}, [GATE_CLIENT4, GATE_CLIENT6])
    gate_links = {
        "client0": [(GATE_CLIENT4, 24), (GATE_CLIENT6, 64)],
        "server0": [(GATE_SERVER4, 24), (GATE_SERVER6, 64)],
    }
    if topology.management:
        gate_links["mgmt0"] = [(MANAGEMENT_GATE, 24)]
    _configure(gate, gate_links, [])
    _configure(server, {"eth0": [(SERVER4, 24), (SERVER6, 64)]}, [GATE_SERVER4, GATE_SERVER6])


def run(namespace: str, function: Callable[..., Answer], *arguments: Any) -> Answer:
    """Call `function` in a thread that has entered `namespace` and return its answer."""
    answer: list[Answer] = []
    error: list[BaseException] = []

    def inside() -> None:
        try:
            enter(namespace)
            answer.append(function(*arguments))
        except BaseException as wrong:  # noqa: BLE001 - raised again in the caller
            error.append(wrong)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    if error:
        raise error[0]
    return answer[0]


def start(
    namespace: str | None, argv: Sequence[str], *, cgroup: Path | None = None, **options: Any
) -> subprocess.Popen[Any]:
    """Start a program inside a namespace and a cgroup; it joins both before it is executed."""
    procs = None if cgroup is None else str(cgroup / "cgroup.procs")

    def prepare() -> None:
        if procs is not None:
            fd = os.open(procs, os.O_WRONLY)
            os.write(fd, b"0")
            os.close(fd)
        if namespace is not None:
            enter(namespace)

    return subprocess.Popen(
        argv,
        preexec_fn=prepare,  # noqa: PLW1509 - no thread of ours holds a lock that it would need
        **options,
    )


def _veth(ip: IPRoute, near: str, near_ns: str, far: str, far_ns: str) -> None:
    peer = {"ifname": far, "net_ns_fd": far_ns}
    ip.link("add", ifname=near, kind="veth", peer=peer, net_ns_fd=near_ns)


def _configure(name: str, links: dict[str, list[tuple[str, int]]], gateways: list[str]) -> None:
    with NetNS(name) as ip:
        ip.link("set", index=ip.link_lookup(ifname="lo")[0], state="up")
        for link, addresses in links.items():
            index = ip.link_lookup(ifname=link)[0]
            for address, length in addresses:
                flags = {"flags": _NODAD} if ":" in address else {}
                ip.addr("add", index=index, address=address, prefixlen=length, **flags)
            ip.link("set", index=index, state="up")
        for gateway in gateways:
            family = socket.AF_INET6 if ":" in gateway else socket.AF_INET
            destination = "::/0" if ":" in gateway else "0.0.0.0/0"
            ip.route("add", family=family, dst=destination, gateway=gateway)


def _set_sysctls(values: dict[str, str]) -> None:
    for path, value in values.items():
        Path("/proc/sys", path).write_text(value, encoding="ascii")
