"""The redirect is changed by a process that is killed before each of its changes in turn.

The changes are counted where they leave the process (`netlink_killer.c`), not where the code says
that its steps are: what is no single system call would show here.
"""

import json
import signal
import sys

import pytest
from netlink_killer import NetlinkKiller
from redirect_hosts import EVERYTHING, MIXED, OTHER, SERVERS, Hosts, Listener, Server

from appliance.proxy import redirect
from appliance.proxy.redirect import nft, routing, rules

pytestmark = pytest.mark.system

CHANGE = """
import sys
from pathlib import Path
from appliance.config import load
from appliance.proxy import redirect
redirect.undo() if sys.argv[1] == "undo" else redirect.apply(load(Path(sys.argv[1])))
"""
FOREIGN = (
    "add table inet other; add set inet other s { type ipv4_addr; };"
    "add element inet other s { 10.0.0.1 };"
    "add chain inet other c { type filter hook prerouting priority -200; };"
    "add rule inet other c ip saddr @s drop;"
)
FOREIGN_RULES = (
    "-4 rule add pref 102 from 10.8.0.0/16 lookup 900",
    "-6 rule add pref 90 from 2001:db8:77::/64 lookup 900",
    "-4 route add 10.7.0.0/16 dev server0 table 7100",
)


@pytest.fixture(scope="module")
def killer(tmp_path_factory):
    return NetlinkKiller(tmp_path_factory.mktemp("killer"))


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    made = Hosts(tmp_path_factory.mktemp("redirect"))
    try:
        made.up()
        made.nft(FOREIGN)
        for words in FOREIGN_RULES:
            made.ip(words)
        with Server(made, 80, 81):
            yield made
    finally:
        made.down()


def foreign(hosts):
    """Return what is not ours, as other tools show it."""
    listed = json.loads(hosts.nft("-j", "-a", "list", "table", "inet", "other"))["nftables"]
    lines = [
        line
        for words in ("-4 rule", "-6 rule", "-4 route show table all")
        for line in hosts.ip(words).splitlines()
        if " proto 78" not in line and " 78 " not in f"{line} "
    ]
    return listed, lines


def changed(hosts, killer, what, before):
    """Change the redirect in a process that is killed before its change number `before`; return
    how many changes it made, and whether it came to its end.
    """
    argv = [sys.executable, "-c", CHANGE, str(what)]
    done = hosts.program("gate", *argv, env=killer.environment(before))
    assert done.returncode in {0, -signal.SIGKILL}, done.stderr
    return killer.changes(), done.returncode == 0


@pytest.mark.parametrize(
    ("first", "then"),
    [(None, MIXED), (MIXED, EVERYTHING), (OTHER, MIXED), (MIXED, None)],
    ids=["apply", "change", "change-clients", "undo"],
)
def test_whenever_a_change_is_killed_nothing_is_open_and_nothing_foreign_touched(
    hosts, killer, first, then
):
    others = foreign(hosts)
    what = "undo" if then is None else hosts.config(then).file
    before, whole = 0, False
    while not whole:
        before += 1
        hosts.gate(redirect.undo)
        if first is not None:
            hosts.apply(first)
        made, whole = changed(hosts, killer, what, before)
        assert whole or made == before - 1
        assert foreign(hosts) == others
        if hosts.gate(routing.present):
            with Listener(hosts):
                assert "server" not in hosts.outcomes()
            assert not any(hosts.connect(to, 81).startswith("server") for to in SERVERS)
        else:  # not begun, or undone to the end
            assert not hosts.gate(nft.exists, rules.TABLE)
            assert (first is None and made == 0) or (then is None and whole)
        if then is None:
            hosts.gate(redirect.undo)
            assert hosts.gate(redirect.undo_steps) == []
        else:
            hosts.apply(then)
            assert hosts.gate(redirect.plan, hosts.config(then)) == []
    print(f"{made} changes")
    assert 1 <= made <= 3
