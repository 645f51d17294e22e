import ipaddress
from datetime import date

import pytest

from appliance.attribution.accounts import Found, Register, check_overlaps, overlaps
from appliance.config import Account, ConfigError, Match

TODAY = date(2026, 11, 24)
CLIENT = "192.0.2.10"
OWNER = {
    "handle": "1234001000000007",
    "pid": 4711,
    "exe": "/usr/bin/psql",
    "exe_sha256": "ab" * 32,
    "uid": 1000,
    "cgroup": "/system.slice/backup.service",
    "unit": "backup.service",
    "container": "0123456789abcdef" * 4,
}


def account(name, expires=None, **selectors):
    if "network" in selectors:
        selectors["network"] = tuple(map(ipaddress.ip_network, selectors["network"]))
    return Account(name, "team", "test", expires=expires, match=Match(**selectors))


def found(*accounts, owner=OWNER, client=CLIENT, today=TODAY):
    return Register(accounts).match(owner, client, today)


@pytest.mark.parametrize(
    "selectors",
    [
        {"cgroup": "/system.slice/backup.service"},
        {"cgroup": "system.slice/backup.service/"},
        {"cgroup": "/system.slice/*"},
        {"cgroup": "/system.slice/backup.service/*"},
        {"cgroup": "/*"},
        {"unit": "backup.service"},
        {"container": "0123456789ab"},
        {"container": "0123456789abcdef" * 4},
        {"exe": "/usr/bin/psql"},
        {"exe_sha256": "AB" * 32},
        {"uid": 1000},
        {"uid": 1000, "exe": "/usr/bin/psql", "network": ["192.0.2.0/24"]},
    ],
)
def test_an_account_whose_selectors_all_hold_is_the_sessions(selectors):
    assert found(account("backup", **selectors)) == Found("backup", "kernel")


@pytest.mark.parametrize(
    "selectors",
    [
        {"cgroup": "/system.slice"},
        {"cgroup": "/system.slic/*"},
        {"cgroup": "/system.slice/backup.service.d/*"},
        {"unit": "backup"},
        {"container": "0123456789ac"},
        {"exe": "/usr/bin/pg_dump"},
        {"exe_sha256": "ac" * 32},
        {"uid": 0},
        {"uid": 1000, "exe": "/usr/bin/pg_dump"},
        {"uid": 1000, "network": ["198.51.100.0/24", "2001:db8::/32"]},
    ],
)
def test_an_account_with_one_selector_that_does_not_hold_is_not_the_sessions(selectors):
    assert found(account("backup", **selectors)) == Found(reason="no-account")


def test_a_fact_that_the_owner_record_lacks_holds_for_no_selector():
    bare = {"handle": "1", "pid": 1}
    for selectors in (
        {"cgroup": "/*"},
        {"unit": "x.service"},
        {"container": "0123456789ab"},
        {"exe": "/x"},
        {"uid": 0},
    ):
        assert found(account("a", **selectors), owner=bare).reason == "no-account"


def test_two_accounts_that_match_are_ambiguous_and_both_are_named():
    answer = found(account("a", uid=1000), account("b", exe="/usr/bin/psql"), account("c", uid=5))
    assert answer == Found(reason="ambiguous", candidates=("a", "b"))


def test_an_account_of_a_network_is_known_by_network_even_where_the_owner_is_known():
    by_network = account("batch", network=["192.0.2.0/24"])
    assert found(by_network) == Found("batch", "network")
    assert found(by_network, owner=None) == Found("batch", "network")
    assert found(by_network, owner=None, client="203.0.113.1").reason == "no-account"
    both = found(by_network, account("backup", uid=1000))
    assert both == Found(reason="ambiguous", candidates=("batch", "backup"))


def test_without_an_owner_no_account_with_a_kernel_selector_matches():
    mixed = account("mixed", uid=1000, network=["192.0.2.0/24"])
    assert found(mixed, owner=None).reason == "no-account"


def test_an_ipv6_client_with_a_scope_is_matched():
    by_network = account("batch", network=["fe80::/10"])
    assert found(by_network, owner=None, client="fe80::1%eth0").account == "batch"


def test_an_account_is_known_on_its_last_day_and_expired_after_it():
    old = account("old", expires=TODAY, uid=1000)
    assert found(old).account == "old"
    late = found(old, today=date(2026, 11, 25))
    assert late == Found(reason="expired", candidates=("old",))


def test_the_successor_of_an_expired_account_takes_over():
    old = account("old", expires=date(2026, 1, 31), uid=1000)
    new = account("new", uid=1000)
    assert found(old, new).account == "new"
    assert overlaps((old, new), TODAY) == []
    assert overlaps((old, new), date(2026, 1, 31)) == [(old, new)]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"uid": 5}, {"uid": 5}),
        ({"uid": 5}, {"uid": 5, "exe": "/x"}),
        ({"cgroup": "/a/*"}, {"cgroup": "/a/b"}),
        ({"cgroup": "/a/*"}, {"cgroup": "/a"}),
        ({"cgroup": "/a/b/*"}, {"cgroup": "/a/*", "uid": 3}),
        ({"cgroup": "/*"}, {"cgroup": "/anything"}),
        ({"cgroup": "a/b"}, {"cgroup": "/a/b/"}),
        ({"container": "0123456789ab"}, {"container": "0123456789ab" + "0" * 52}),
        ({"exe_sha256": "AB" * 32}, {"exe_sha256": "ab" * 32}),
        ({"network": ["10.0.0.0/8"]}, {"network": ["192.0.2.0/24", "10.1.0.0/16"]}),
        ({"network": ["2001:db8::/32"]}, {"network": ["2001:db8:1::/64"], "uid": 3}),
        ({"uid": 5, "exe": "/x"}, {"uid": 5, "exe": "/x", "unit": "u"}),
    ],
)
def test_selectors_that_can_be_seen_to_overlap_are_found_either_way_round(first, second):
    one, other = account("one", **first), account("other", **second)
    assert overlaps((one, other), TODAY) == [(one, other)]
    assert overlaps((other, one), TODAY) == [(other, one)]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"uid": 5}, {"uid": 6}),
        ({"uid": 5}, {"exe": "/x"}),
        ({"uid": 5, "exe": "/x"}, {"uid": 5, "unit": "u"}),
        ({"uid": 5, "exe": "/x"}, {"uid": 5, "exe": "/y"}),
        ({"cgroup": "/a"}, {"cgroup": "/a/b"}),
        ({"cgroup": "/a/*"}, {"cgroup": "/ab"}),
        ({"container": "0123456789ab"}, {"container": "0123456789ac"}),
        ({"network": ["10.0.0.0/8"]}, {"network": ["11.0.0.0/8"]}),
        ({"network": ["0.0.0.0/0"]}, {"network": ["::/0"]}),
    ],
)
def test_selectors_that_can_be_told_apart_or_only_a_session_can_tell_are_let_through(first, second):
    assert overlaps((account("one", **first), account("other", **second)), TODAY) == []


def test_an_overlap_is_a_configuration_error_that_names_file_line_and_both(tmp_path):
    file = tmp_path / "narrows.toml"
    file.write_text('[[account]]\nname = "one"\n\n[[account]]\nname = "other"\n')
    with pytest.raises(ConfigError) as caught:
        check_overlaps((account("one", uid=5), account("other", uid=5)), str(file), TODAY)
    assert caught.value.line == 5
    assert "'other' overlaps 'one' in uid" in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    "selectors",
    [{"container": "abc"}, {"exe_sha256": "abc"}, {"exe": "psql"}],
)
def test_a_selector_that_can_never_hold_is_a_configuration_error(selectors):
    with pytest.raises(ConfigError):
        check_overlaps((account("one", **selectors),), "", TODAY)


def test_accounts_that_differ_are_fine():
    check_overlaps((account("one", uid=5), account("other", uid=6)), "", TODAY)
