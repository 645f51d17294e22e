"""Joins an accepted connection to its owner and its service account: one answer per session, never a guess.

In this order: the verified SYN option; the connect event with the same 5-tuple; a short wait for either, only for clients
that a sensor covers; then `Unknown(reason)`. A client that no sensor covers can be known by its network address alone.
"""

from __future__ import annotations

import ipaddress
import time
from typing import TYPE_CHECKING, Any, Protocol

from appliance.attribution import synopt
from capture.records import Alarm, Attributed

if TYPE_CHECKING:
    from collections.abc import Callable

    from appliance.attribution.accounts import Register
    from appliance.attribution.replay import ReplayCache
    from appliance.attribution.sensor_link import SensorLink
    from ebpf.table import OwnerTable

Answer = tuple[Attributed, list[Alarm]]
ASK_AFTER_S = 0.005


class Loop(Protocol):
    """What attribution asks of the event loop."""

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> Any:
        """Call once after `delay` seconds."""
        ...

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> Any:
        """Call whenever `fd` is readable."""
        ...

    def remove_reader(self, fd: Any) -> Any:
        """Stop."""
        ...


class _Waiting:
    """A connection whose owner is not known yet."""

    __slots__ = ("client", "done", "handle", "since", "target", "timer")

    def __init__(
        self, client: tuple[str, int], target: tuple[str, int], handle: int | None, done: Any
    ) -> None:
        self.client, self.target, self.handle, self.done = client, target, handle, done
        self.since = time.monotonic_ns()
        self.timer: Any = None


class Attributor:
    """Answers who a connection belongs to."""

    def __init__(
        self, loop: Loop, register: Register, table: OwnerTable, link: SensorLink | None, replays: ReplayCache,
        wait_s: float,
    ) -> None:  # fmt: skip
        self._loop, self._register, self._table = loop, register, table
        self._link, self._replays, self._wait_s = link, replays, wait_s
        self._waiting: list[_Waiting] = []
        self._covers: tuple[list[str], list[Any]] = ([], [])

    @property
    def lost(self) -> int:
        """Return how many events the sensor lost, by its own count."""
        return self._link.lost if self._link is not None else 0

    def begin(
        self, client: tuple[str, int], target: tuple[str, int], saved_syn: bytes,
        done: Callable[[Attributed, list[Alarm]], None],
    ) -> Answer | None:  # fmt: skip
        """Return the answer at once, or None; then `done` is called with it later, within the configured wait."""
        handle = None
        if self._link is not None and (option := synopt.find(saved_syn)) is not None:
            handle = option.handle
            wrong = self._wrong(option)
            if wrong is not None:
                found, _ = self._register.match(None, client[0])
                facts = {"client": f"{client[0]}:{client[1]}", "handle": f"{handle:016x}"}
                names = tuple(account.name for account in found)
                return Attributed(None, "none", "syn", wrong, names), [Alarm(wrong, facts)]
        if not self._covered(client[0]):
            return self._network(client[0])
        waiting = _Waiting(client, target, handle, done)
        answer = self._known(waiting)
        if answer is None and self._link is not None:
            self._link.drain()
            answer = self._known(waiting)
        if answer is not None:
            return answer
        if self._link is None or not self._link.connected:
            return Attributed(None, "none", "none", "no-sensor"), []
        self._waiting.append(waiting)
        waiting.timer = self._loop.call_later(self._wait_s, self._late, waiting)
        if handle is not None:
            self._loop.call_later(ASK_AFTER_S, self._ask, waiting)
        return None

    def moved(self) -> None:
        """The table learned something: look whether it answers who is waiting."""
        for waiting in list(self._waiting):
            answer = self._known(waiting)
            if answer is not None:
                self._answer(waiting, answer)

    def _wrong(self, option: synopt.SynOption) -> str | None:
        assert self._link is not None
        if not synopt.verify(option, self._link.keys):
            return "forged"
        if self._replays.seen(
            hashlib.blake2b(option.message + option.mac, digest_size=16).digest()
        ):
            return "replayed"
        return None

    def _covered(self, client: str) -> bool:
        if self._link is None:
            return False
        if self._covers[0] is not self._link.covers:
            self._covers = (
                self._link.covers,
                [ipaddress.ip_network(text) for text in self._link.covers],
            )
        address = ipaddress.ip_address(client)
        return any(address in network for network in self._covers[1])

    def _known(self, waiting: _Waiting) -> Answer | None:
        how, handle, cgroup_id = "syn", waiting.handle, None
        client, target = waiting.client, waiting.target
        event = self._table.by_tuple(_packed(client[0]), client[1], _packed(target[0]), target[1])
        if event is not None:
            if handle is None:
                how, handle = "event", event[0]
            cgroup_id = event[1]
        if handle is None:
            return None
        owner = self._table.by_handle(handle, cgroup_id)
        if owner is None:
            return None
        waited = time.monotonic_ns() - waiting.since
        return self._account(owner, client[0], how, waited)

    def _account(self, owner: dict[str, Any], client: str, how: str, waited: int) -> Answer:
        valid, expired = self._register.match(owner, client)
        if len(valid) == 1:
            return Attributed(valid[0].name, "kernel", how, None, (), owner, waited), []
        names = tuple(account.name for account in valid or expired)
        if len(valid) > 1:
            alarm = Alarm("ambiguous", {"client": client, "accounts": names})
            return Attributed(None, "kernel", how, "ambiguous", names, owner, waited), [alarm]
        reason = "expired" if expired else "no-account"
        return Attributed(None, "kernel", how, reason, names, owner, waited), []

    def _network(self, client: str) -> Answer:
        valid, expired = self._register.match(None, client)
        names = tuple(account.name for account in valid or expired)
        if len(valid) == 1:
            return Attributed(valid[0].name, "network", "network"), []
        if valid:
            alarm = Alarm("ambiguous", {"client": client, "accounts": names})
            return Attributed(None, "none", "network", "ambiguous", names), [alarm]
        reason = "expired" if expired else "no-sensor"
        return Attributed(None, "none", "none", reason, names), []

    def _ask(self, waiting: _Waiting) -> None:
        if waiting in self._waiting and self._link is not None and waiting.handle is not None:
            self._link.ask(waiting.handle)

    def _late(self, waiting: _Waiting) -> None:
        if waiting in self._waiting:
            waited = time.monotonic_ns() - waiting.since
            reason = "no-owner" if waiting.handle is not None else "timeout"
            self._answer(waiting, (Attributed(None, "none", "none", reason, waited_ns=waited), []))

    def _answer(self, waiting: _Waiting, answer: Answer) -> None:
        self._waiting.remove(waiting)
        if waiting.timer is not None:
            waiting.timer.cancel()
        waiting.done(*answer)


def _packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed
