"""Joins an accepted connection to its owner and its account: one answer a session, never a guess.

The gate calls `begin` once per accepted connection. Theory of operation, first that fits:

    option whose MAC is wrong                      Unknown(forged), alarm
    option that was here before                    Unknown(replayed), alarm
    option verified, owner known                   the owner, how = syn
    option verified, owner not known               ask the sensor and wait
    no option, connect event with the 4-tuple      the owner, how = event
    no option, a sensor covers the client          wait for the event
    no option, no sensor covers the client         an account by network, or Unknown(no-sensor)

An owner then belongs to exactly one account, or the answer is Unknown(no-account | ambiguous |
expired), with the owner kept. A wait lasts `wait_s` at most and ends in Unknown: no-owner when the
sensor said that it does not know the handle, no-sensor when there is none connected, timeout
otherwise.

A client that a sensor covers is never known by its network alone: where kernel facts are to be
expected and do not come, somebody may be hiding them. While no sensor is connected such a session
is Unknown(no-sensor) at once. Two exceptions: what the table knows already is used, and for one
second after a start or after losing the sensor the wait is waited, because the next HELLO is on its
way. For the same reason a wrong MAC is called forged only while a sensor is connected: a new sensor
has new keys, and its SYNs may overtake its HELLO.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import socket
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from appliance.attribution import synopt
from capture.records import Alarm, Attributed
from ebpf.events import four_tuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from appliance.attribution.accounts import Register
    from appliance.attribution.replay import ReplayCache
    from appliance.attribution.sensor_link import Loop, SensorLink
    from ebpf.table import OwnerTable

Endpoint = tuple[str, int]
Answer = tuple[Attributed, list[Alarm]]


_MOST_CACHED = 65_536
_DAY_S = 86_400
_ALARMING = frozenset({"ambiguous", "expired"})


class _Waiting:
    """A connection whose owner is not known yet."""

    __slots__ = ("client", "done", "handle", "how", "key", "option", "since", "target", "timer")

    def __init__(self, client: Endpoint, target: Endpoint, done: Any) -> None:
        self.client, self.target, self.done = client, target, done
        self.option: synopt.SynOption | None = None  #: one that no known key could judge
        self.handle: int | None = None
        self.how = "syn"
        self.key = _four_tuple(client, target)
        self.since = time.monotonic_ns()
        self.timer: Any = None


class Attributor:
    """Answers who a connection belongs to."""

    def __init__(
        self,
        loop: Loop,
        register: Register,
        table: OwnerTable,
        link: SensorLink,
        replays: ReplayCache,
        wait_s: float,
    ) -> None:
        self._loop, self._register, self._table = loop, register, table
        self._link, self._replays, self._wait_s = link, replays, wait_s
        self._by_handle: dict[int, set[_Waiting]] = {}
        self._by_key: dict[bytes, set[_Waiting]] = {}
        self._unjudged: set[_Waiting] = set()
        self._answers: dict[tuple[int, str], tuple[dict[str, Any], Attributed]] = {}
        self._by_address: dict[str, Attributed] = {}
        self._covered: dict[str, bool] = {}
        self._covers: Any = None
        self._day = 0
        self._today = dt.date.min

    @property
    def lost(self) -> int:
        """Return how many events the sensor lost, by its own count."""
        return self._link.lost

    @property
    def connected(self) -> bool:
        """Say whether a sensor is connected."""
        return self._link.connected

    @property
    def sensor_pid(self) -> int:
        """Return the process id of the sensor that is connected; 0 without one."""
        return self._link.pid if self._link.connected else 0

    @property
    def waiting(self) -> int:
        """Return how many connections wait for an answer."""
        waiting = [*self._by_handle.values(), *self._by_key.values()]
        return sum(map(len, waiting)) + len(self._unjudged)

    def begin(
        self,
        client: Endpoint,
        target: Endpoint,
        saved_syn: bytes,
        done: Callable[[Attributed, list[Alarm]], None],
    ) -> Answer | None:
        """Return the answer at once, or None: then `done` gets it, once, after `wait_s` at most."""
        option = synopt.find(saved_syn)
        if option is None:
            return self._without_option(client, target, done)
        mac = synopt.verified(option, self._link.keys)
        if mac is None:
            return self._not_verified(option, client, target, done)
        if self._replays.seen(mac):
            return self._refused("replayed", option, client, target)
        self._table.forget(_four_tuple(client, target))
        owner = self._table.by_handle(option.handle)
        if owner is None:
            waiting = _Waiting(client, target, done)
            waiting.handle = option.handle
            return self._ask(waiting)
        return self._owned(owner, option.handle, client, target, "syn")

    def moved(self) -> None:
        """The sensor said something: answer those who waited for it."""
        news = self._link.news()
        if news.hello:
            for waiting in list(self._unjudged):
                self._judge(waiting)
            for handle in self._by_handle:
                self._link.ask(handle)
        if self._by_key:
            for key in news.connects & self._by_key.keys():
                for waiting in list(self._by_key[key]):
                    self._connected(waiting)
        if self._by_handle:
            for handle in news.handles & self._by_handle.keys():
                for waiting in list(self._by_handle[handle]):
                    self._owner_came(waiting)
            for handle in news.unknown & self._by_handle.keys():
                for waiting in list(self._by_handle[handle]):
                    self._give_up(waiting, "no-owner")

    # -- first look --------------------------------------------------------------------------------

    def _without_option(self, client: Endpoint, target: Endpoint, done: Any) -> Answer | None:
        waiting = _Waiting(client, target, done)
        event = self._table.take(waiting.key, time.monotonic_ns())
        if event is None:
            # Events are sent before the SYN leaves: this one may have come and not been read.
            self._link.drain()
            event = self._table.take(waiting.key, time.monotonic_ns())
        if event is not None:
            waiting.handle, waiting.how = event.handle, "event"
            owner = self._table.by_handle(event.handle)
            if owner is None:
                return self._ask(waiting)
            return self._owned(owner, event.handle, client, target, "event")
        if not self._covers_client(client[0]):
            return self._by_network(client, target)
        return self._wait(waiting)

    def _not_verified(
        self, option: synopt.SynOption, client: Endpoint, target: Endpoint, done: Any
    ) -> Answer | None:
        self._link.drain()
        waiting = _Waiting(client, target, done)
        waiting.option = option
        if synopt.verified(option, self._link.keys) is not None:
            return self._verdict(waiting)
        if self._link.connected:
            return self._refused("forged", option, client, target)
        if not self._link.settling and not self._covers_client(client[0]):
            return self._by_network(client, target)
        return self._wait(waiting)

    def _verdict(self, waiting: _Waiting) -> Answer | None:
        """Judge an option that no key could judge before; None when its owner is still to come."""
        option, waiting.option = waiting.option, None
        assert option is not None
        mac = synopt.verified(option, self._link.keys)
        if mac is None:
            return self._refused("forged", option, waiting.client, waiting.target)
        if self._replays.seen(mac):
            return self._refused("replayed", option, waiting.client, waiting.target)
        waiting.handle = option.handle
        owner = self._table.by_handle(option.handle)
        if owner is None:
            return self._ask(waiting)
        return self._owned(owner, option.handle, waiting.client, waiting.target, "syn")

    # -- waiting -----------------------------------------------------------------------------------

    def _ask(self, waiting: _Waiting) -> Answer | None:
        assert waiting.handle is not None
        self._link.drain()
        owner = self._table.by_handle(waiting.handle)
        if owner is not None:
            answer = self._owned(owner, waiting.handle, waiting.client, waiting.target, waiting.how)
            return _after(answer, waiting)
        self._link.ask(waiting.handle)
        return self._wait(waiting)

    def _wait(self, waiting: _Waiting) -> Answer | None:
        if not self._link.connected and not self._link.settling:
            return _after((_unknown("no-sensor", waiting.handle), []), waiting)
        if waiting.timer is None:
            waiting.timer = self._loop.call_later(self._wait_s, self._late, waiting)
        if waiting.option is not None:
            self._unjudged.add(waiting)
        elif waiting.handle is not None:
            self._by_handle.setdefault(waiting.handle, set()).add(waiting)
        else:
            self._by_key.setdefault(waiting.key, set()).add(waiting)
        return None

    def _forget(self, waiting: _Waiting) -> None:
        """Take a connection out of whatever it waits in."""
        self._unjudged.discard(waiting)
        _discard(self._by_handle, waiting.handle, waiting)
        _discard(self._by_key, waiting.key, waiting)

    def _judge(self, waiting: _Waiting) -> None:
        self._forget(waiting)
        answer = self._verdict(waiting)
        if answer is not None:
            self._finish(waiting, answer)

    def _connected(self, waiting: _Waiting) -> None:
        event = self._table.take(waiting.key, time.monotonic_ns())
        if event is None:
            return
        self._forget(waiting)
        waiting.handle, waiting.how = event.handle, "event"
        owner = self._table.by_handle(event.handle)
        if owner is not None:
            self._finish(
                waiting, self._owned(owner, event.handle, waiting.client, waiting.target, "event")
            )
            return
        self._link.ask(event.handle)
        answer = self._wait(waiting)
        if answer is not None:
            self._finish(waiting, answer)

    def _owner_came(self, waiting: _Waiting) -> None:
        assert waiting.handle is not None
        owner = self._table.by_handle(waiting.handle)
        if owner is not None:
            found = self._owned(owner, waiting.handle, waiting.client, waiting.target, waiting.how)
            self._finish(waiting, found)

    def _late(self, waiting: _Waiting) -> None:
        # It may have come while this process had other work: timers run before sockets are read.
        self._link.drain()
        if waiting.timer is not None:
            self._give_up(waiting, "timeout" if self._link.connected else "no-sensor")

    def _give_up(self, waiting: _Waiting, reason: str) -> None:
        if waiting.option is not None and not self._covers_client(waiting.client[0]):
            self._finish(waiting, self._by_network(waiting.client, waiting.target))
        else:
            self._finish(waiting, (_unknown(reason, waiting.handle), []))

    def _finish(self, waiting: _Waiting, answer: Answer) -> None:
        self._forget(waiting)
        if waiting.timer is not None:
            waiting.timer.cancel()
            waiting.timer = None
        waiting.done(*_after(answer, waiting))

    # -- answers -----------------------------------------------------------------------------------

    def _owned(
        self, owner: dict[str, Any], handle: int, client: Endpoint, target: Endpoint, how: str
    ) -> Answer:
        today = self._date()
        cached = self._answers.get((handle, client[0]))
        if cached is not None and cached[0] is owner and cached[1].how == how:
            found = cached[1]
        else:
            match = self._register.match(owner, client[0], today)
            assurance = match.assurance if match.account else "kernel"
            found = Attributed(match.account, assurance, how, match.reason, match.candidates, owner)
            if len(self._answers) >= _MOST_CACHED:
                self._answers.clear()
            self._answers[handle, client[0]] = (owner, found)
        return found, self._alarms(found, client, target)

    def _by_network(self, client: Endpoint, target: Endpoint) -> Answer:
        today = self._date()
        found = self._by_address.get(client[0])
        if found is None:
            match = self._register.match(None, client[0], today)
            if match.account is not None:
                found = Attributed(match.account, match.assurance, "network")
            else:
                reason = "no-sensor" if match.reason == "no-account" else match.reason
                found = Attributed(None, "none", "none", reason, match.candidates)
            if len(self._by_address) >= _MOST_CACHED:
                self._by_address.clear()
            self._by_address[client[0]] = found
        return found, self._alarms(found, client, target)

    def _refused(
        self, reason: str, option: synopt.SynOption, client: Endpoint, target: Endpoint
    ) -> Answer:
        detail = _ends(client, target) | {"claimed_handle": f"{option.handle:016x}"}
        return Attributed(None, "none", "none", reason), [Alarm(reason, detail)]

    def _alarms(self, found: Attributed, client: Endpoint, target: Endpoint) -> list[Alarm]:
        if found.reason not in _ALARMING:
            return []
        return [Alarm(found.reason, _ends(client, target) | {"accounts": list(found.candidates)})]

    def _covers_client(self, client: str) -> bool:
        if self._covers is not self._link.covers:
            self._covers = self._link.covers
            self._covered.clear()
        covered = self._covered.get(client)
        if covered is None:
            address = ipaddress.ip_address(client.partition("%")[0])
            if len(self._covered) >= _MOST_CACHED:
                self._covered.clear()
            covered = self._covered[client] = any(address in net for net in self._covers)
        return covered

    def _date(self) -> dt.date:
        day = int(time.time()) // _DAY_S
        if day != self._day:
            self._day = day
            self._today = dt.datetime.fromtimestamp(day * _DAY_S, dt.UTC).date()
            self._answers.clear()  # an account may have expired
            self._by_address.clear()
        return self._today


def _unknown(reason: str, handle: int | None) -> Attributed:
    """Return an answer without an owner; a handle that was verified is kept in an empty one."""
    owner = None
    if handle is not None:
        owner = {"handle": f"{handle:016x}", "exe": "", "pid": 0, "cgroup": ""}
    return Attributed(None, "none", "none", reason, (), owner)


def _after(answer: Answer, waiting: _Waiting) -> Answer:
    found, alarms = answer
    return replace(found, waited_ns=time.monotonic_ns() - waiting.since), alarms


def _ends(client: Endpoint, target: Endpoint) -> dict[str, Any]:
    return {
        "client": client[0],
        "client_port": client[1],
        "target": target[0],
        "target_port": target[1],
    }


def _discard(waiters: dict[Any, set[_Waiting]], key: Any, waiting: _Waiting) -> None:
    waiting_there = waiters.get(key)
    if waiting_there is not None:
        waiting_there.discard(waiting)
        if not waiting_there:
            del waiters[key]


def _four_tuple(client: Endpoint, target: Endpoint) -> bytes:
    return four_tuple(_packed(client[0]), client[1], _packed(target[0]), target[1])


def _packed(address: str) -> bytes:
    plain = address.partition("%")[0]
    return socket.inet_pton(socket.AF_INET6 if ":" in plain else socket.AF_INET, plain)
