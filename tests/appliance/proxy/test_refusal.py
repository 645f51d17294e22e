"""Destinations that no session may have."""

import ipaddress

import pytest

from appliance.config import Route
from appliance.proxy.refusal import Destinations

ROUTE = Route("all")


@pytest.fixture
def destinations():
    management = [ipaddress.ip_network("203.0.113.0/24")]
    return Destinations([ROUTE], {"192.0.2.1", "2001:db8:1::1"}, management)


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("192.0.2.1", "own-address"),
        ("2001:db8:1::1", "own-address"),
        ("127.0.0.2", "loopback"),
        ("::1", "loopback"),
        ("0.0.0.0", "loopback"),
        ("169.254.1.1", "link-local"),
        ("fe80::1%eth0", "link-local"),
        ("224.0.0.1", "multicast"),
        ("203.0.113.9", "management"),
        ("::ffff:192.0.2.1", "mapped"),
        ("::ffff:203.0.113.9", "mapped"),
        ("::ffff:127.0.0.1", "mapped"),
        ("::ffff:198.51.100.10", "mapped"),
    ],
)
def test_a_way_into_the_gate_is_refused_by_its_name(destinations, host, reason):
    assert destinations.look_up(host, 80) == (None, reason)


@pytest.mark.parametrize("host", ["198.51.100.10", "2001:db8:2::10"])
def test_a_server_has_its_route(destinations, host):
    assert destinations.look_up(host, 80) == (ROUTE, "")
