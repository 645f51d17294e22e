"""What the start-up checks say is true: each problem is shown with packets that do not pass."""

import pytest
from redirect_hosts import CLIENTS, EVERYTHING, HOSTS, SERVERS, Hosts, Relay, Server
from staging import wait_for

from appliance.lab.topology import CLIENT4, SERVER4, SERVER6
from appliance.proxy import redirect

pytestmark = pytest.mark.system

BYPASS = f"""
[redirect]
{CLIENTS}
bypass = ["198.51.100.0/24", "2001:db8:2::/64"]
[[route]]
name = "everything"
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    made = Hosts(tmp_path_factory.mktemp("redirect"))
    try:
        made.up()
        with Server(made, 80):
            yield made
    finally:
        made.down()


@pytest.fixture
def switch(hosts):
    """Return a function that sets a kernel switch of the gate until the test ends."""
    before = []

    def set_to(path, value):
        before.append((path, hosts.sysctl("gate", path, value)))

    yield set_to
    for path, value in reversed(before):
        hosts.sysctl("gate", path, value)


def problems(hosts, text=BYPASS):
    return [str(found) for found in hosts.gate(redirect.check, hosts.config(text))]


def test_nothing_is_wrong_between_two_links(hosts):
    for text in (BYPASS, EVERYTHING):
        assert problems(hosts, text) == []


@pytest.mark.parametrize(
    ("path", "address"),
    [("ipv4/ip_forward", SERVERS[0]), ("ipv6/conf/all/forwarding", SERVERS[1])],
)
def test_without_forwarding_what_bypasses_is_lost_and_said_so(hosts, switch, path, address):
    hosts.apply(BYPASS)
    switch(path, "0")
    assert hosts.connect(address, 80) == "lost"
    (problem,) = problems(hosts)
    assert problem.endswith(f"sysctl -w net.{path.replace('/', '.')}=1")


@pytest.mark.parametrize("value", ["1", "2"])
def test_with_reverse_path_filters_sessions_work_and_bypasses_need_a_switch(hosts, switch, value):
    for interface in ("client0", "server0"):
        switch(f"ipv4/conf/{interface}/rp_filter", value)
    hosts.apply()
    with Relay(hosts):
        assert hosts.connect(SERVER4, 80, wait_s=2) == f"relayed server {CLIENT4}"
    hosts.apply(BYPASS)
    assert hosts.connect(SERVER4, 80) == "lost"
    (problem,) = problems(hosts)
    assert problem.endswith("sysctl -w net.ipv4.conf.all.src_valid_mark=1")
    switch("ipv4/conf/all/src_valid_mark", "1")
    assert problems(hosts) == []
    assert hosts.connect(SERVER4, 80) == f"server {CLIENT4}"
    hosts.apply()
    with Relay(hosts):
        assert hosts.connect(SERVER4, 80, wait_s=2) == f"relayed server {CLIENT4}"


def test_sessions_work_when_answers_carry_marks(hosts, switch):
    for path in ("ipv4/fwmark_reflect", "ipv6/fwmark_reflect", "ipv4/tcp_fwmark_accept"):
        switch(path, "1")
    hosts.apply()
    with Relay(hosts):
        for client, address in HOSTS:
            assert hosts.connect(address, 80, wait_s=2) == f"relayed server {client}"
    assert hosts.connect(SERVER4, 80) == "lost"


def test_rules_of_others_before_the_guard_are_named(hosts):
    hosts.ip("rule add pref 90 from 10.9.0.0/16 lookup 900")
    try:
        (problem,) = problems(hosts)
        assert problem.startswith("policy rules 90 come before ours")
    finally:
        hosts.ip("rule del pref 90")


def test_networks_that_no_route_leads_to_are_named(hosts):
    text = '[redirect]\nclients = ["192.0.2.0/24", "10.44.0.0/16"]\n[[route]]\nname = "far"\n'
    found = problems(hosts, text + 'destinations = ["10.55.0.0/16", "198.51.100.0/24"]\n')
    assert [problem.split(":")[0] for problem in found] == [
        "no route leads to clients 10.44.0.0/16",
        "route 'far'",
    ]


class OneArmed(Hosts):
    """Hosts whose gate has one link, to a router that sends it what comes from clients.

    The answers of servers go from the router straight to the clients.
    """

    _arm = ""

    def up(self):
        super().up()
        arm = f"{self.namespace('gate')}a"
        for words in (
            f"netns add {arm}",
            f"link add arm0 type veth peer name eth0 netns {arm}",
            "addr add 10.0.0.1/24 dev arm0",
            "addr add fd00::1/64 dev arm0 nodad",
            "link set arm0 up",
            f"-n {arm} addr add 10.0.0.2/24 dev eth0",
            f"-n {arm} addr add fd00::2/64 dev eth0 nodad",
            f"-n {arm} link set lo up",
            f"-n {arm} link set eth0 up",
            f"-n {arm} route add default via 10.0.0.1",
            f"-n {arm} -6 route add default via fd00::1",
            "rule add pref 500 iif client0 lookup 500",
            "-6 rule add pref 500 iif client0 lookup 500",
            "route add default via 10.0.0.2 table 500",
            "-6 route add default via fd00::2 table 500",
        ):
            self.ip(words)
        self._arm = arm
        self.sysctl("gate", "ipv4/ip_forward", "1")
        self.sysctl("gate", "ipv6/conf/all/forwarding", "1")
        self.sysctl("gate", "ipv4/conf/all/rp_filter", "0")
        self.sysctl("gate", "ipv4/conf/eth0/rp_filter", "0")

    def down(self):
        if self._arm:
            arm, self._arm = self._arm, ""
            self.ip(f"netns del {arm}")
        super().down()

    def namespace(self, role):
        return self._arm if role == "gate" and self._arm else super().namespace(role)


@pytest.fixture(scope="module")
def one_armed(tmp_path_factory):
    made = OneArmed(tmp_path_factory.mktemp("redirect"))
    try:
        made.up()
        wait_for(lambda: made.connect(SERVER6, 9) == "refused", what="IPv6 over the arm")
        with Server(made, 80):
            yield made
    finally:
        made.down()


@pytest.mark.parametrize(("client", "address"), HOSTS)
def test_with_one_arm_only_the_gates_own_address_works_and_that_is_said(one_armed, client, address):
    config = one_armed.apply()
    (problem,) = one_armed.gate(redirect.check, config)
    assert "both reached through eth0" in problem.problem
    assert 'source = "gate"' in problem.hint
    with Relay(one_armed):
        assert not one_armed.connect(address, 80).startswith("relayed")
    own = one_armed.apply(f'{EVERYTHING}source = "gate"\n')
    assert one_armed.gate(redirect.check, own) == []
    with Relay(one_armed, own_address=True):
        gate = "fd00::2" if ":" in client else "10.0.0.2"
        assert one_armed.connect(address, 80, wait_s=2) == f"relayed server {gate}"
