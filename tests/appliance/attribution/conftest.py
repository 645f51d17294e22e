import asyncio
import ipaddress

import pytest
from speaking_sensor import SpeakingSensor

from appliance.attribution import Attributor, Register, ReplayCache, SensorLink
from appliance.config import Account, Match
from ebpf.table import OwnerTable

ACCOUNTS = (
    Account("backup", "team", "test", match=Match(cgroup="/clients/backup")),
    Account("psql-user", "team", "test", match=Match(uid=2000)),
    Account("psql-exe", "team", "test", match=Match(exe="/usr/bin/psql", uid=2000, unit="x")),
    Account("subnet", "team", "test", match=Match(network=(ipaddress.ip_network("10.0.0.0/8"),))),
)


class Bench:
    """An Attributor on a real loop, with a sensor that can come and go."""

    def __init__(self, tmp_path, accounts=ACCOUNTS, covers=(), wait_s=0.05, *, sensor=True):
        self.path = tmp_path / "sensor.sock"
        self.loop = asyncio.new_event_loop()
        self.sensor = SpeakingSensor(self.path) if sensor else None
        self.table = OwnerTable()
        self.replays = ReplayCache(tmp_path / "replay", 1000)
        networks = [ipaddress.ip_network(text) for text in covers]
        self.link = SensorLink(self.loop, self.path, self.table, self._moved, networks)
        self.attributor = Attributor(
            self.loop, Register(accounts), self.table, self.link, self.replays, wait_s
        )
        if sensor:
            self.until(lambda: self.link.connected)

    def _moved(self):
        self.attributor.moved()

    def until(self, condition, longest_s=20.0):
        async def wait():
            while not condition():  # noqa: ASYNC110 - it may be about another thread
                await asyncio.sleep(0.001)

        self.loop.run_until_complete(asyncio.wait_for(wait(), longest_s))

    def start_sensor(self, **settings):
        self.sensor = SpeakingSensor(self.path, **settings)
        self.until(lambda: self.link.connected)

    def stop_sensor(self):
        self.sensor.close()
        self.sensor = None
        self.until(lambda: not self.link.connected)

    def settle(self):
        """As if the sensor had been away for long."""
        self.link._away_since -= 1000

    def begin(self, client, target, saved):
        """Start; returns a list that holds the answer, now or later."""
        got = []
        answer = self.attributor.begin(client, target, saved, lambda *found: got.append(found))
        if answer is not None:
            got.append(answer)
        return got

    def ask(self, client, target, saved=b""):
        """Return (attributed, alarms), waiting for it if need be."""
        got = self.begin(client, target, saved)
        self.until(lambda: got)
        assert len(got) == 1
        assert self.attributor.waiting == 0
        return got[0]

    def close(self):
        self.link.close()
        if self.sensor is not None:
            self.sensor.close()
        self.loop.close()
        self.replays.close()


@pytest.fixture
def bench(tmp_path):
    made = Bench(tmp_path)
    yield made
    made.close()


@pytest.fixture
def make_bench(tmp_path):
    made = []

    def make(**settings):
        made.append(Bench(tmp_path, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()
