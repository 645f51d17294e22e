"""The bench's arithmetic: medians, paired ratios, goals."""

import pytest

from bench.report import Goal, Report


@pytest.fixture
def report():
    return Report({"cpu": "one"})


def test_a_row_has_median_spread_and_count(report):
    for value in (3.0, 1.0, 2.0, 10.0):
        report.add("bulk", "gate", "CPU-s/GB", value)
    (row,) = report.as_json()["rows"]
    assert (row["work"], row["path"], row["unit"]) == ("bulk", "gate", "CPU-s/GB")
    assert (row["median"], row["min"], row["max"], row["n"]) == (2.5, 1.0, 10.0, 4)


def test_capacity_is_the_peers_cost_divided_by_the_gates(report):
    report.add("bulk", "haproxy", "CPU-s/GB", 0.6)
    report.add("bulk", "gate", "CPU-s/GB", 0.8)
    report.capacity("bulk", "CPU-s/GB", "haproxy", 0.7)
    (goal,) = report.goals
    assert goal.value == pytest.approx(0.75)
    assert goal.reached


def test_ratios_are_taken_within_a_round_and_not_between_medians(report):
    # Round 2 was slow for both, round 3 for nobody: the rounds say 0.5, 0.5 and 2.0.
    for theirs, ours in ((1.0, 2.0), (10.0, 20.0), (4.0, 2.0)):
        report.add("bulk", "haproxy", "CPU-s/GB", theirs)
        report.add("bulk", "gate", "CPU-s/GB", ours)
    report.capacity("bulk", "CPU-s/GB", "haproxy", 1.0)
    assert report.goals[0].value == 0.5  # medians would have said 2.0
    assert not report.goals[0].reached


def test_rounds_that_do_not_match_are_an_error(report):
    report.add("bulk", "haproxy", "CPU-s/GB", 1.0)
    report.add("bulk", "gate", "CPU-s/GB", 1.0)
    report.add("bulk", "gate", "CPU-s/GB", 1.0)
    with pytest.raises(ValueError, match="longer"):
        report.capacity("bulk", "CPU-s/GB", "haproxy", 1.0)


def test_added_latency_is_what_is_above_the_direct_path(report):
    for direct, pgbouncer, gate in ((100, 130, 160), (110, 150, 170), (90, 120, 135)):
        report.add("pg", "direct", "us", direct)
        report.add("pg", "pgbouncer", "us", pgbouncer)
        report.add("pg", "gate", "us", gate)
    report.added("pg", "us", "pgbouncer", "direct", 1.5)
    assert report.goals[0].value == 2.0  # 60 against 30
    assert not report.goals[0].reached


def test_a_peer_that_adds_nothing_is_never_matched(report):
    for path, value in (("direct", 100), ("pgbouncer", 99), ("gate", 101)):
        report.add("pg", path, "us", value)
    report.added("pg", "us", "pgbouncer", "direct", 1.5)
    assert not report.goals[0].reached


def test_a_limit_judges_the_gates_median(report):
    for value in (3.0, 5.0, 3.5):
        report.add("idle", "gate", "KiB/session", value)
    report.limit("idle", "KiB/session", 4.0)
    assert report.goals[0].value == 3.5
    assert report.goals[0].reached


@pytest.mark.parametrize(
    ("value", "most", "reached"),
    [(1.0, False, True), (0.99, False, False), (1.0, True, True), (1.01, True, False)],
)
def test_a_goal_is_reached_on_its_own_side_of_the_bound(value, most, reached):
    assert Goal("w", "x", value, 1.0, most).reached is reached


def test_the_text_has_every_row_goal_and_check(report):
    report.add("idle", "gate", "KiB/session", 5.0)
    report.limit("idle", "KiB/session", 4.0)
    report.checks.append("capture compared")
    text = report.text()
    assert "- cpu: one" in text
    assert "| idle | gate | 5 | 5 | 5 | 1 | KiB/session |" in text
    assert "| idle | KiB/session | 5.00 | at most 4.00 | not reached |" in text
    assert "- capture compared" in text
