"""One account's selectors: whether they hold for a session, and whether two sets of them overlap.

`appliance.attribution.accounts` uses both. The selectors are those of [account.match]
(`appliance.config.Match`); all that are given must hold. A fact that the owner record lacks holds
for no selector. Pure.

    cgroup       the owner's cgroup path, or it and everything below when the selector ends in "/*"
    unit         the systemd unit
    container    the container id, or its beginning when at least 12 letters are given
    exe          path of the executable
    exe_sha256   digest of the executable
    uid          user id
    network      the client's address
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from appliance.config import Match, Network

SHORTEST_CONTAINER = 12
NETWORK = "network"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def given(match: Match) -> dict[str, Any]:
    """Return the selectors that are given, in the form in which they are compared."""
    found: dict[str, Any] = {}
    if match.cgroup:
        found["cgroup"] = _absolute(match.cgroup)
    for name in ("unit", "container", "exe"):
        if getattr(match, name):
            found[name] = getattr(match, name)
    for name in ("container", "exe_sha256"):
        if getattr(match, name):
            found[name] = getattr(match, name).lower()
    if match.uid >= 0:
        found["uid"] = match.uid
    if match.network:
        found[NETWORK] = match.network
    return found


def holds(selectors: Mapping[str, Any], owner: Mapping[str, Any] | None, client: Address) -> bool:
    """Say whether all selectors hold for a session of `owner` (None: not known) from `client`."""
    for name, wanted in selectors.items():
        if name == NETWORK:
            if not any(client in network for network in wanted):
                return False
        elif owner is None or not _HOLDS[name](wanted, owner.get(name)):
            return False
    return True


def overlap(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Say whether two sets of selectors can be seen to overlap.

    They can when one of them gives every selector that the other gives, and each of those has a
    value that both accept: then sessions of the narrower belong to the wider too. Where each gives
    a selector that the other does not (a uid here, an executable there), only a session can tell,
    and then it is ambiguous.
    """
    wider, narrower = sorted((first, second), key=len)
    return all(
        name in narrower and _MEETS[name](wanted, narrower[name]) for name, wanted in wider.items()
    )


def _absolute(path: str) -> str:
    return "/" + path.strip("/")


def _cgroup_holds(wanted: str, path: object) -> bool:
    if not isinstance(path, str) or not path:
        return False
    path = _absolute(path)
    if not wanted.endswith("/*"):
        return path == wanted
    return path == (wanted[:-2] or "/") or path.startswith(wanted[:-1])


def _cgroups_meet(first: str, second: str) -> bool:
    # What a path or a tree accepts first is its own top.
    return _cgroup_holds(first, second.removesuffix("/*") or "/") or _cgroup_holds(
        second, first.removesuffix("/*") or "/"
    )


def _container_holds(wanted: str, identity: object) -> bool:
    if not isinstance(identity, str):
        return False
    if len(wanted) < SHORTEST_CONTAINER:
        return identity == wanted
    return identity.lower().startswith(wanted)


def _containers_meet(first: str, second: str) -> bool:
    return _container_holds(first, second) or _container_holds(second, first)


def _equal(wanted: Any, fact: Any) -> bool:
    return bool(wanted == fact)


def _networks_meet(first: tuple[Network, ...], second: tuple[Network, ...]) -> bool:
    return any(
        one.version == other.version and one.overlaps(other) for one in first for other in second
    )


_HOLDS: dict[str, Callable[[Any, Any], bool]] = {
    "cgroup": _cgroup_holds,
    "unit": _equal,
    "container": _container_holds,
    "exe": _equal,
    "exe_sha256": _equal,
    "uid": _equal,
}
_MEETS: dict[str, Callable[[Any, Any], bool]] = {
    **_HOLDS,
    "cgroup": _cgroups_meet,
    "container": _containers_meet,
    NETWORK: _networks_meet,
}
