"""Whatever half of the redirect is there is seen and repaired; what is not ours stays as it is."""

import json
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from redirect_hosts import CLIENTS, EVERYTHING, MIXED, OTHER, Hosts, Listener, Server, name

from appliance.lab.topology import SERVER4
from appliance.proxy import redirect
from appliance.proxy.redirect import nft, routing, rules

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    made = Hosts(tmp_path_factory.mktemp("redirect"))
    try:
        made.up()
        with Server(made, 80, 81):
            yield made
    finally:
        made.down()


@pytest.fixture
def bare(hosts):
    """The hosts without anything applied."""
    hosts.gate(redirect.undo)
    return hosts


def dump(hosts, *, handles=False):
    """Return all rules and routes of the gate's kernel as other tools show them, without counts.

    Rules keep their order in a chain; the order of chains and sets means nothing.
    """
    listed = json.loads(hosts.nft("-j", "-a", "list", "ruleset"))["nftables"]
    shown = {}
    for item in listed:
        ((kind, about),) = item.items()
        about = {k: v for k, v in about.items() if handles or k != "handle"}
        text = re.sub(r'"(packets|bytes|expires)": \d+', "", json.dumps(about))
        place = (kind, about.get("table"), about.get("chain")) if kind == "rule" else (kind, text)
        shown.setdefault(place, []).append(text)
    for words in ("-4 rule", "-6 rule", "-4 route show table all", "-6 route show table all"):
        lines = [re.sub(r" expires \d+sec", "", line) for line in hosts.ip(words).splitlines()]
        shown[words] = sorted(lines) if "route" in words else lines
    return shown


@pytest.mark.parametrize("before", [EVERYTHING, None])
def test_two_processes_may_apply_at_one_time(bare, before):
    config = bare.config(MIXED)
    if before is not None:
        bare.apply(before)
    ready = threading.Barrier(3)

    def apply():
        ready.wait()
        return redirect.apply(config)

    with ThreadPoolExecutor(3) as pool:
        for answer in [pool.submit(bare.gate, apply) for _ in range(3)]:
            answer.result()
    assert bare.gate(redirect.plan, config) == []


def test_applying_again_changes_nothing(bare):
    bare.apply(MIXED)
    first = dump(bare, handles=True)
    assert bare.gate(redirect.apply, bare.config(MIXED)) == []
    assert dump(bare, handles=True) == first


def test_tables_rules_and_routes_of_others_stay_as_they_are(bare):
    bare.nft(
        "add table inet other; add set inet other s { type ipv4_addr; };"
        "add element inet other s { 10.0.0.1 };"
        "add chain inet other c { type filter hook prerouting priority -200; };"
        "add rule inet other c ip saddr @s counter drop;"
        "add table ip narrows; add chain ip narrows x { type filter hook input priority 0; }"
    )
    for words in (
        "-4 rule add pref 90 from 10.9.0.0/16 lookup 900",
        "-4 rule add pref 102 from 10.8.0.0/16 lookup 900",
        "-6 rule add pref 200 from 2001:db8:77::/64 lookup 900",
        "-4 route add 10.7.0.0/16 dev server0 table 7100",
        "-4 route add 10.6.0.0/16 dev server0 table 900",
    ):
        bare.ip(words)
    try:
        before = dump(bare, handles=True)
        bare.apply(MIXED)
        during = dump(bare, handles=True)
        for place, lines in before.items():
            assert [line for line in during[place] if line in lines] == lines
        bare.apply(OTHER)
        bare.gate(redirect.undo)
        assert dump(bare, handles=True) == before
    finally:
        bare.nft("flush", "ruleset")
        for words in (
            "-4 rule del pref 90", "-4 rule del pref 102", "-6 rule del pref 200",
            "-4 route flush table 7100", "-4 route flush table 900",
        ):  # fmt: skip
            bare.ip(words)


def first_handle(hosts, chain):
    listed = json.loads(hosts.nft("-j", "-a", "list", "chain", "inet", "narrows", chain))
    return str(next(item["rule"]["handle"] for item in listed["nftables"] if "rule" in item))


DAMAGE = {
    "a rule deleted": lambda h: h.nft(
        "delete", "rule", "inet", "narrows", "from4", "handle", first_handle(h, "from4")
    ),
    "the way to the listener deleted": lambda h: h.nft(
        "delete", "rule", "inet", "narrows", "tcp4", "handle", first_handle(h, "tcp4")
    ),
    "a rule added": lambda h: h.nft("insert", "rule", "inet", "narrows", "from4", "accept"),
    "a chain emptied": lambda h: h.nft("flush", "chain", "inet", "narrows", "pre"),
    "a client subnet deleted": lambda h: h.nft("flush", "set", "inet", "narrows", "clients4"),
    "a destination added to the list": lambda h: h.nft(
        "add", "element", "inet", "narrows", "bypass4", "{ 198.51.100.0/24 }"
    ),
    "a chain and a set added": lambda h: h.nft(
        "add chain inet narrows x; add set inet narrows y { type ipv4_addr; }"
    ),
    "the table asleep": lambda h: h.nft("add table inet narrows { flags dormant; }"),
    "the table deleted": lambda h: h.nft("delete", "table", "inet", "narrows"),
    "an IPv6 table only": lambda h: h.nft(
        "delete table inet narrows; add table inet narrows; add chain inet narrows to6"
    ),
    **{
        f"policy rule {number} of IPv{version} deleted": (
            lambda h, v=version, n=number: h.ip(f"-{v} rule del pref {n}")
        )
        for version in (4, 6)
        for number in range(100, 106)
    },
    "a policy rule twice": lambda h: h.ip(
        "rule add pref 103 from 10.55.0.0/16 unreachable protocol 78"
    ),
    "the local route deleted": lambda h: h.ip("route flush table 7100"),
    "everything flushed": lambda h: (
        h.nft("flush", "ruleset"), h.ip("rule flush"),
        h.ip("rule add pref 32766 lookup main"),
        h.ip("rule add pref 32767 lookup default"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_any_half_state_is_seen_and_repaired(bare, damage):
    config = bare.apply(MIXED)
    whole = dump(bare)
    DAMAGE[damage](bare)
    assert bare.gate(redirect.plan, config)
    assert bare.gate(redirect.apply, config)
    assert dump(bare) == whole
    assert bare.gate(redirect.plan, config) == []


def test_a_plan_is_overtaken_by_another_change_and_made_anew(bare):
    bare.apply(MIXED)
    old = bare.gate(nft.read, rules.TABLE)
    bare.apply(OTHER)
    shown = dump(bare, handles=True)
    table = rules.build(bare.config(MIXED), ["client0"], "a")
    with pytest.raises(nft.Overtaken):
        bare.gate(nft.replace, table, old)
    with pytest.raises(nft.Overtaken):
        bare.gate(nft.replace, table, nft.Applied(rules.TABLE, False, False, {}, {}, {}, {}))
    assert dump(bare, handles=True) == shown
    assert bare.gate(redirect.apply, bare.config(MIXED))


def test_thousands_of_networks_and_hundreds_of_routes_are_applied_at_once(bare):
    networks = [f"10.{n // 200}.{n % 200}.0/25" for n in range(4000)]
    networks += [f"2001:db8:{n:x}::/64" for n in range(0x1000, 0x1400)]
    clients = ", ".join([CLIENTS.split("[", 1)[1].rsplit("]", 1)[0],
                         *(f'"172.16.{n}.0/25"' for n in range(250))])  # fmt: skip
    routes = "".join(f'[[route]]\nname = "r{n}"\nports = [{n}]\n' for n in range(1000, 1150))
    text = f"[redirect]\nclients = [{clients}]\nbypass = {json.dumps(networks)}\n{routes}"
    config = bare.apply(text)
    assert bare.gate(redirect.plan, config) == []
    with Listener(bare):
        assert bare.connect(SERVER4, 1149) == f"gate {name(SERVER4, 1149)}"


def test_a_kernel_that_refuses_is_a_redirect_error_that_says_what(bare):
    backwards = routing.PolicyRule(socket.AF_INET, routing.PASS, 2, target=routing.LOCAL)
    step = redirect.Step(
        "add a rule that goes back", (), lambda: routing.make(routing.Changes(add=(backwards,)))
    )
    with pytest.raises(redirect.RedirectError, match="refused to add a rule that goes back"):
        bare.gate(redirect._carry_out, lambda: [step])
