import ipaddress
import socket

from hypothesis import given
from hypothesis import strategies as st

from appliance.proxy.redirect import routing
from appliance.proxy.redirect.routing import wanted

GOTO, UNREACHABLE = 2, 7
CLIENTS = st.lists(
    st.sampled_from(["192.0.2.0/24", "192.0.2.0/25", "10.0.0.0/9", "10.128.0.0/9", "2001:db8::/32"])
    .map(ipaddress.ip_network)
)  # fmt: skip


def numbers(version):
    return socket.AF_INET6 if version == 6 else socket.AF_INET


@given(CLIENTS)
def test_the_guard_closes_exactly_the_client_subnets_both_ways(clients):
    rules = wanted(clients)
    for version in (4, 6):
        mine = [rule for rule in rules if rule.family == numbers(version)]
        for way in ("source", "destination"):
            closed = [getattr(r, way) for r in mine if r.action == UNREACHABLE and getattr(r, way)]
            networks = list(
                ipaddress.collapse_addresses(c for c in clients if c.version == version)
            )
            assert sorted(closed) == sorted(map(str, networks))


@given(CLIENTS)
def test_every_step_of_the_guard_leads_somewhere_when_it_is_added(clients):
    added = set()
    for rule in wanted(clients):
        if rule.action == GOTO:
            assert (rule.family, rule.target) in added
        added.add((rule.family, rule.priority))
    # Nothing is closed before the way that keeps this host itself reachable is there.
    order = [rule.priority for rule in wanted(clients) if rule.family == socket.AF_INET]
    closing = [n for n in order if n in (routing.FROM_CLIENTS, routing.TO_CLIENTS)]
    assert order[-len(closing) :] == closing or not closing


def test_a_rule_says_itself_to_a_person():
    shown = {str(rule) for rule in wanted([ipaddress.ip_network("192.0.2.0/24")])}
    assert "IPv4 rule 100: iif lo goto 105" in shown
    assert "IPv4 rule 103: from 192.0.2.0/24 unreachable (guard)" in shown
    assert "IPv6 rule 101: fwmark 0x4e01 lookup 7100" in shown
