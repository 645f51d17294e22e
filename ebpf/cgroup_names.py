"""What a cgroup path says: systemd unit, container, runtime, pod. Pure.

Owner records carry the answer; `ebpf.cgroups` finds the path. A path that follows none of the forms
says nothing: fields stay empty. Forms, and where they are made:

    system.slice/NAME.service, user.slice/user-UID.slice/user@UID.service/.../NAME.service   systemd
    system.slice/docker-ID.scope, docker/ID                                                  docker
    machine.slice/libpod-ID.scope[/container], libpod_parent/libpod-ID                       podman
    [kubelet.slice/]kubepods...-podUID.slice/cri-containerd-ID.scope, kubepods/.../podUID/ID kubelet
    ...slice:cri-containerd:ID (containerd with the systemd syntax in a cgroupfs path)       kind
    kubepods...-podUID.slice/crio-ID.scope                                                   cri-o
    machine.slice/systemd-nspawn@NAME.service[/payload], machine-NAME.scope                  nspawn
    lxc.payload.NAME                                                                         lxc

Containers may be nested; the innermost one counts. What watches over a container from outside
(conmon) is not in it.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

_HEX = r"[0-9a-f]{64}|[0-9a-f]{32}-[0-9]{1,20}"
_UID = r"[0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12}|[0-9a-f]{32}"
_CONTAINER: Final = re.compile(rf"(?:^|[/:-])({_HEX})(?:\.scope)?(?=/|$)")
_MONITOR: Final = re.compile(r"(?:^|/)(?:libpod|crio)-conmon-[^/]*")
_RUNTIME: Final = re.compile(r"(?:^|[/:])(cri-containerd|crio|docker|libpod|nerdctl|buildkit)[-:/]")
_POD: Final = re.compile(rf"(?:^|[/-])pod({_UID})(?:\.slice)?(?=[/:]|$)")
_MACHINE: Final = re.compile(
    r"(?:^|/)(?:systemd-nspawn@(?P<nspawn>[^/]+)\.service|machine-(?P<machine>[^/]+)\.scope"
    r"|lxc\.payload\.(?P<lxc>[^/]+))(?=/|$)"
)
_UNIT: Final = re.compile(r"_?([^/]+\.(?:service|scope|socket|mount|swap))")
_USER_MANAGER: Final = re.compile(r"user@\d+\.service")
_NAMES: Final = {"cri-containerd": "containerd", "crio": "cri-o", "libpod": "podman"}


class CgroupName(NamedTuple):
    """What is known from the path; empty where it says nothing."""

    unit: str = ""  #: systemd unit, spelt as systemctl does; "" inside a container
    container: str = ""  #: id, or the name of a machine
    runtime: str = ""  #: docker, containerd, cri-o, podman, nerdctl, buildkit, nspawn, libvirt, lxc
    pod: str = ""  #: UID of the Kubernetes pod, with dashes


def classify(path: str) -> CgroupName:
    """Return what a cgroup path (from the root of the hierarchy) says."""
    pods = _POD.findall(path)
    pod = pods[-1].replace("_", "-") if pods else ""
    containers = list(_CONTAINER.finditer(_MONITOR.sub("/", path)))
    machines = list(_MACHINE.finditer(path))
    if machines and (not containers or machines[-1].start() > containers[-1].start()):
        return CgroupName("", *_machine(machines[-1]), pod)
    if containers:
        return CgroupName("", containers[-1][1], _runtime(path[: containers[-1].end()]), pod)
    return CgroupName(_unit(path), "", "", pod)


def _runtime(path: str) -> str:
    """Return who runs the container that `path` ends with; "" where the path does not say."""
    at = path.rfind("/")
    named: list[str] = _RUNTIME.findall(path[at:]) or _RUNTIME.findall(path)
    return _NAMES.get(named[-1], named[-1]) if named else ""


def _machine(found: re.Match[str]) -> tuple[str, str]:
    name = _unescaped(found["nspawn"] or found["machine"] or found["lxc"])
    if found["lxc"]:
        return name, "lxc"
    if found["machine"] and name.startswith(("qemu-", "lxc-")):
        driver, _, rest = name.partition("-")
        return rest.partition("-")[2] or rest, "libvirt" if driver == "qemu" else "lxc"
    return name, "nspawn"


def _unescaped(name: str) -> str:
    return re.sub(r"\\x([0-9a-f]{2})", lambda m: chr(int(m[1], 16)), name)


def _unit(path: str) -> str:
    """Return the unit as systemd tells it: the first name below the slices; below a user's manager
    that of the user's own unit.
    """
    found = ""
    for name in path.split("/"):
        if not name or name.endswith(".slice"):
            continue
        unit = _UNIT.fullmatch(name)
        if unit is None:
            break
        found = unit[1]
        if not _USER_MANAGER.fullmatch(found):
            break
    return found
