import ipaddress
from datetime import date

import identity_syns as syns
import pytest
from speaking_sensor import owner

from appliance.config import Account, Match

OUTSIDE = ("10.1.2.3", 5555)
STRANGER = ("203.0.113.9", 5555)


def known(bench, **facts):
    bench.sensor.owner(owner(**facts))
    bench.until(lambda: bench.table.by_handle(syns.HANDLE) is not None)


@pytest.mark.parametrize("mac_bytes", [8, 4])
def test_a_verified_option_of_a_known_process_is_answered_at_once(bench, mac_bytes):
    known(bench)
    syn = syns.with_identity(mac_bytes=mac_bytes)
    answer = bench.attributor.begin(syns.CLIENT, syns.TARGET, syn, None)
    attributed, alarms = answer
    assert (attributed.account, attributed.assurance, attributed.how) == ("backup", "kernel", "syn")
    assert attributed.reason is None
    assert attributed.owner["pid"] == 4711
    assert alarms == []


def test_ipv6_sessions_are_attributed_too(bench):
    known(bench)
    syn = syns.with_identity(syns.CLIENT6, syns.TARGET6)
    assert bench.ask(syns.CLIENT6, syns.TARGET6, syn)[0].account == "backup"


def test_an_owner_that_is_not_known_is_asked_for(bench):
    bench.sensor.answers[syns.HANDLE] = owner()
    attributed, _ = bench.ask(syns.CLIENT, syns.TARGET, syns.with_identity())
    assert (attributed.account, attributed.how) == ("backup", "syn")
    assert attributed.waited_ns > 0
    assert bench.sensor.asked.get(timeout=5) == syns.HANDLE


def test_many_that_wait_for_one_handle_are_each_answered_once(bench):
    bench.sensor.answers[syns.HANDLE] = None
    got = [bench.begin(syns.CLIENT, syns.TARGET, syns.with_identity(isn=n)) for n in range(50)]
    assert bench.attributor.waiting == 50
    bench.sensor.owner(owner())
    bench.until(lambda: all(got))
    assert {one[0][0].account for one in got} == {"backup"}
    bench.until(lambda: bench.attributor.waiting == 0)
    assert all(len(one) == 1 for one in got)


def test_a_handle_that_the_sensor_does_not_know_is_unknown_and_kept(bench):
    attributed, alarms = bench.ask(syns.CLIENT, syns.TARGET, syns.with_identity())
    assert (attributed.account, attributed.reason) == (None, "no-owner")
    assert attributed.owner["handle"] == f"{syns.HANDLE:016x}"
    assert attributed.assurance == "none"
    assert alarms == []


def test_a_sensor_that_does_not_answer_is_a_timeout(bench):
    bench.sensor.answers[syns.HANDLE] = None
    attributed, _ = bench.ask(syns.CLIENT, syns.TARGET, syns.with_identity())
    assert attributed.reason == "timeout"
    assert bench.ask(syns.CLIENT, syns.TARGET)[0].reason == "timeout"


def test_a_forged_option_is_unknown_with_an_alarm_even_if_the_process_is_known(bench):
    known(bench)
    bench.sensor.connect(syns.CLIENT, syns.TARGET)
    bench.until(lambda: len(bench.table) == 2)
    syn = syns.with_identity(key=syns.OTHER_KEY)
    attributed, alarms = bench.ask(syns.CLIENT, syns.TARGET, syn)
    assert (attributed.account, attributed.assurance, attributed.reason) == (None, "none", "forged")
    assert attributed.owner is None
    assert [alarm.kind for alarm in alarms] == ["forged"]
    assert alarms[0].detail["client"] == syns.CLIENT[0]
    assert alarms[0].detail["claimed_handle"] == f"{syns.HANDLE:016x}"


def test_a_replayed_option_is_unknown_with_an_alarm(bench):
    known(bench)
    assert bench.ask(syns.CLIENT, syns.TARGET, syns.with_identity())[0].account == "backup"
    for mac_bytes in (8, 4):  # the short form of the same SYN is the same SYN
        syn = syns.with_identity(mac_bytes=mac_bytes)
        attributed, alarms = bench.ask(syns.CLIENT, syns.TARGET, syn)
        assert (attributed.account, attributed.reason) == (None, "replayed")
        assert [alarm.kind for alarm in alarms] == ["replayed"]
    assert bench.ask(syns.CLIENT, syns.TARGET, syns.with_identity(isn=2))[0].account == "backup"


def test_without_an_option_the_connect_event_tells(bench):
    known(bench)
    bench.sensor.connect(syns.CLIENT, syns.TARGET)
    attributed, _ = bench.ask(syns.CLIENT, syns.TARGET, syns.saved())
    assert (attributed.account, attributed.assurance, attributed.how) == (
        "backup", "kernel", "event",
    )  # fmt: skip


def test_a_connect_event_that_comes_later_is_waited_for(make_bench):
    bench = make_bench(wait_s=20.0)
    known(bench)
    got = bench.begin(syns.CLIENT6, syns.TARGET6, b"")
    assert got == []
    bench.sensor.connect(syns.CLIENT6, syns.TARGET6)
    bench.until(lambda: got)
    assert got[0][0].account == "backup"
    assert bench.attributor.waiting == 0


def test_a_connect_event_whose_owner_is_missing_asks_for_it(bench):
    bench.sensor.answers[syns.HANDLE] = owner()
    bench.sensor.connect(syns.CLIENT, syns.TARGET)
    attributed, _ = bench.ask(syns.CLIENT, syns.TARGET)
    assert (attributed.account, attributed.how) == ("backup", "event")


def test_a_connect_event_is_used_for_one_session_only(bench):
    known(bench)
    bench.sensor.connect(syns.CLIENT, syns.TARGET)
    assert bench.ask(syns.CLIENT, syns.TARGET)[0].account == "backup"
    assert bench.ask(syns.CLIENT, syns.TARGET)[0].reason == "timeout"


def test_an_owner_of_no_account_is_unknown_and_kept(bench):
    known(bench, cgroup="/clients/none")
    attributed, alarms = bench.ask(syns.CLIENT, syns.TARGET, syns.with_identity())
    assert (attributed.account, attributed.reason) == (None, "no-account")
    assert attributed.assurance == "kernel"
    assert attributed.owner["exe"] == "/usr/bin/psql"
    assert alarms == []


def test_two_accounts_that_match_are_ambiguous_with_both_names_and_an_alarm(bench):
    known(bench, uid=2000)
    for isn in (1, 2):  # the second from the cache of answers
        attributed, alarms = bench.ask(syns.CLIENT, syns.TARGET, syns.with_identity(isn=isn))
        assert (attributed.account, attributed.reason) == (None, "ambiguous")
        assert attributed.candidates == ("backup", "psql-user")
        assert attributed.owner["pid"] == 4711
        assert alarms[0].detail["accounts"] == ["backup", "psql-user"]


def test_an_expired_account_is_unknown_with_an_alarm(make_bench):
    old = Account("old", "team", "test", expires=date(2020, 1, 1), match=Match(uid=1000))
    bench = make_bench(accounts=(old,))
    known(bench)
    attributed, alarms = bench.ask(syns.CLIENT, syns.TARGET, syns.with_identity())
    assert (attributed.account, attributed.reason) == (None, "expired")
    assert attributed.candidates == ("old",)
    assert [alarm.kind for alarm in alarms] == ["expired"]


def test_an_owner_record_that_changed_changes_the_answer(bench):
    known(bench)
    assert bench.ask(syns.CLIENT, syns.TARGET, syns.with_identity(isn=1))[0].account == "backup"
    bench.sensor.owner(owner(cgroup="/clients/other"))
    bench.until(lambda: bench.table.by_handle(syns.HANDLE)["cgroup"] == "/clients/other")
    assert bench.ask(syns.CLIENT, syns.TARGET, syns.with_identity(isn=2))[0].reason == "no-account"


def test_a_client_that_no_sensor_covers_is_known_by_its_network(bench):
    attributed, _ = bench.ask(OUTSIDE, syns.TARGET)
    assert (attributed.account, attributed.assurance, attributed.how) == (
        "subnet", "network", "network",
    )  # fmt: skip
    assert bench.attributor.begin(STRANGER, syns.TARGET, b"", None)[0].reason == "no-sensor"


def test_a_covered_client_is_never_known_by_its_network_alone(make_bench):
    everyone = Account(
        "everyone", "team", "test", match=Match(network=(ipaddress.ip_network("192.0.2.0/24"),))
    )
    bench = make_bench(accounts=(everyone,))
    assert bench.ask(syns.CLIENT, syns.TARGET)[0].reason == "timeout"
    bench.stop_sensor()
    bench.settle()
    answer = bench.attributor.begin(syns.CLIENT, syns.TARGET, b"", None)
    assert answer[0].account is None
    assert answer[0].reason == "no-sensor"


def test_a_client_covered_by_configuration_waits_for_the_sensor_and_is_then_unknown_at_once(
    make_bench,
):
    bench = make_bench(sensor=False, covers=["10.0.0.0/8"])
    assert bench.ask(OUTSIDE, syns.TARGET)[0].reason == "no-sensor"
    bench.settle()
    assert bench.attributor.begin(OUTSIDE, syns.TARGET, b"", None)[0].reason == "no-sensor"
    option = syns.with_identity(OUTSIDE, syns.TARGET)
    assert bench.attributor.begin(OUTSIDE, syns.TARGET, option, None)[0].reason == "no-sensor"


def test_what_is_known_already_is_used_while_the_sensor_is_away(bench):
    known(bench)
    bench.stop_sensor()
    bench.settle()
    answer = bench.attributor.begin(syns.CLIENT, syns.TARGET, syns.with_identity(), None)
    assert answer[0].account == "backup"
    other = syns.with_identity(handle=syns.HANDLE + 1)
    answer = bench.attributor.begin(syns.CLIENT, syns.TARGET, other, None)
    assert answer[0].reason == "no-sensor"
    assert answer[0].owner["handle"] == f"{syns.HANDLE + 1:016x}"


def test_a_syn_that_overtakes_the_hello_of_a_new_sensor_is_not_called_forged(make_bench):
    bench = make_bench(wait_s=20.0)
    bench.stop_sensor()
    got = bench.begin(syns.CLIENT, syns.TARGET, syns.with_identity(key=syns.OTHER_KEY))
    forged = bench.begin(syns.CLIENT, syns.TARGET, syns.with_identity(key=bytes(16)))
    assert got == forged == []
    bench.start_sensor(keys=[syns.OTHER_KEY], answers={syns.HANDLE: owner()})
    bench.until(lambda: forged and got)
    assert forged[0][0].reason == "forged"
    assert got[0][0].account == "backup"


def test_a_process_keeps_its_account_when_the_sensor_restarts_with_a_new_key_and_epoch(bench):
    known(bench)
    before = bench.ask(syns.CLIENT, syns.TARGET, syns.with_identity(isn=1))[0]
    bench.stop_sensor()
    bench.start_sensor(keys=[syns.OTHER_KEY])
    again = syns.HANDLE + (1 << 36)  # the same process, found anew by the next epoch
    bench.sensor.owner(owner(again))
    bench.until(lambda: bench.table.by_handle(again) is not None)
    old = bench.ask(syns.CLIENT, syns.TARGET, syns.with_identity(isn=2))[0]
    new = bench.ask(
        syns.CLIENT, syns.TARGET, syns.with_identity(isn=3, key=syns.OTHER_KEY, handle=again)
    )[0]
    assert before.account == old.account == new.account == "backup"
    assert {(one.owner["pid"], one.owner["started_ns"]) for one in (before, old, new)} == {
        (4711, 1)
    }


def test_a_question_that_was_open_when_the_sensor_died_is_asked_again(make_bench):
    bench = make_bench(wait_s=20.0)
    bench.sensor.answers[syns.HANDLE] = None
    got = bench.begin(syns.CLIENT, syns.TARGET, syns.with_identity())
    assert bench.sensor.asked.get(timeout=10) == syns.HANDLE
    bench.stop_sensor()
    bench.start_sensor(answers={syns.HANDLE: owner()})
    bench.until(lambda: got)
    assert got[0][0].account == "backup"


def test_damaged_saved_syns_are_like_none(bench):
    attributed, _ = bench.ask(OUTSIDE, syns.TARGET, syns.with_identity()[:41])
    assert attributed.account == "subnet"


def test_an_owner_that_arrived_while_the_gate_was_busy_is_not_too_late(bench):
    """The timer runs before the socket is read when both are due."""
    bench.sensor.answers[syns.HANDLE] = None  # no answer to the question
    got = bench.begin(syns.CLIENT, syns.TARGET, syns.with_identity())
    assert got == []
    bench.until(lambda: not bench.sensor.asked.empty())
    bench.sensor.owner(owner())
    (waiting,) = bench.attributor._by_handle[syns.HANDLE]
    bench.attributor._late(waiting)
    assert got[0][0].account == "backup"
    bench.attributor._late(waiting)
    assert len(got) == 1
