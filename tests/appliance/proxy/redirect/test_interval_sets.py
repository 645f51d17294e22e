import ipaddress

from hypothesis import given
from hypothesis import strategies as st

from appliance.proxy.redirect.family import IPV4, IPV6
from appliance.proxy.redirect.sets import TYPE_PORT, IntervalSet

RANGES = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)).map(sorted).map(tuple))


def contains(elements, key):
    """Say what the kernel says: the last edge at or below the key begins a range."""
    below = [edge for edge in sorted(elements) if edge[0] <= key]
    # An end and a start at one key do not occur: ranges that touch are one.
    return bool(below) and not below[-1][1]


@given(RANGES)
def test_a_set_of_ranges_has_what_the_ranges_have(ranges):
    made = IntervalSet.of(TYPE_PORT, 2, ranges)
    assert len({key for key, _ in made.elements}) == len(made.elements)
    for number in range(303):
        wanted = any(low <= number <= high for low, high in ranges)
        assert contains(made.elements, number.to_bytes(2, "big")) == wanted


def test_a_range_to_the_last_key_has_no_end():
    made = IntervalSet.of(TYPE_PORT, 2, [(65000, 65535)])
    assert made.elements == {((65000).to_bytes(2, "big"), False)}


NETWORKS = st.one_of(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 32)).map(
        lambda pair: ipaddress.IPv4Network(pair, strict=False)
    ),
    st.tuples(st.integers(0, 2**128 - 1), st.integers(0, 128)).map(
        lambda pair: ipaddress.IPv6Network(pair, strict=False)
    ),
)


@given(st.lists(NETWORKS, max_size=6), st.data())
def test_addresses_of_networks_are_those_of_one_ip_version(networks, data):
    for family in (IPV4, IPV6):
        made = family.addresses(networks)
        mine = [network for network in networks if network.version == family.version]
        assert family.sees(networks) == bool(mine)
        probes = [data.draw(st.integers(0, 2 ** (family.size * 8) - 1))]
        for network in mine:
            low, high = int(network.network_address), int(network.broadcast_address)
            probes += [low, high, max(low - 1, 0), min(high + 1, 2 ** (family.size * 8) - 1)]
        for number in probes:
            key = number.to_bytes(family.size, "big")
            address = ipaddress.ip_address(key)
            wanted = any(address in network for network in mine)
            assert contains(made.elements, key) == wanted
