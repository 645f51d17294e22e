"""What runs now, over the API: once, followed as events, and ended; health, metrics, events."""

import json
import time

import pytest
from gatekeeper import Gatekeeper

from appliance.web.openapi import BASE
from appliance.web.running import MOST_LISTENERS
from capture.access import person_of
from capture.frames import session_name
from capture.records import Alarm, Gap, Heartbeat, Refused


@pytest.fixture
def worker(api):
    with api.evidence.writer() as gate:
        made = Gatekeeper(api.evidence.store.run / "gate-0.sock", gate)
        yield made
        made.close()


class Listener:
    """Reads server-sent events as WHATWG HTML 9.2.6 says."""

    def __init__(self, api, role="viewer"):
        self._connection = api.connection()
        headers = {"Authorization": f"Bearer {api.tokens[role]}"}
        self._connection.request("GET", BASE + "/live/events", headers=headers)
        self.answer = self._connection.getresponse()

    def next(self):
        name, data = "message", []
        while line := self.answer.readline().decode().rstrip("\n"):
            field, _, value = line.partition(":")
            if field == "event":
                name = value.removeprefix(" ")
            elif field == "data":
                data.append(value.removeprefix(" "))
        return name, json.loads("\n".join(data)) if data else None

    def until(self, wanted):
        while True:
            name, data = self.next()
            if name == wanted:
                return data

    def close(self):
        self._connection.close()


def test_what_runs_is_listed_with_the_workers_own_counts(api, worker):
    name = worker.open("backup")
    told = api.ok("/live", "viewer")
    assert told["workers"] == {"there": 1, "silent": 0}
    [session] = told["items"]
    assert (session["id"], session["service_account"]) == (name, "backup")
    assert (session["bytes_up"], session["operations"], session["unsent"]) == (70, 9, 6)
    assert api.reads()[-1][:4] == ("the-viewer", "live", [], "allowed")


def test_a_dead_gate_is_told_and_everything_else_is_answered(api, worker):
    number = worker.open("backup")
    worker.close()
    worker.close = lambda: None
    assert api.ok("/live") == {"items": [], "workers": {"there": 0, "silent": 0}}
    assert api.ok(f"/sessions/{number}")["service_account"] == "backup"
    health(api, gate=False)


def test_a_listener_is_told_of_what_begins_changes_and_ends(api, worker):
    first = worker.open("backup")
    listener = Listener(api)
    assert listener.answer.getheader("Content-Type").startswith("text/event-stream")
    assert listener.next() == ("workers", {"there": 1, "silent": 0})
    name, data = listener.next()
    assert (name, data["id"], data["bytes_up"]) == ("session", first, 70)
    second = worker.open("report")
    assert listener.until("session")["id"] == second
    next(iter(worker.running.values()))["bytes_up"] = 71
    data = listener.until("session")
    assert (data["id"], data["bytes_up"]) == (first, 71)
    worker.running.popitem()
    assert listener.until("ended") == {"id": second}
    listener.close()


def test_sessions_of_a_worker_that_is_silent_are_not_called_ended(api, worker):
    name = worker.open("backup")
    listener = Listener(api)
    assert listener.until("session")["id"] == name
    worker.close()
    worker.close = lambda: None
    path = api.evidence.store.run / "gate-0.sock"
    path.touch()  # a socket that nobody listens on
    while listener.until("workers") != {"there": 1, "silent": 1}:
        pass
    path.unlink()
    assert listener.next() == ("workers", {"there": 0, "silent": 0})
    assert listener.next() == ("ended", {"id": name})
    listener.close()


def test_listeners_end_with_the_process_and_hold_it_up_for_no_one(api, worker):
    worker.open()
    listener = Listener(api)
    listener.until("session")
    began = time.monotonic()
    api.stop()
    assert time.monotonic() - began < 20
    assert listener.answer.read() == b""
    listener.close()
    api.start()


def test_more_listeners_than_there_may_be_are_told_to_come_back(api):
    feed = api.server.review.feed
    feed.listeners += MOST_LISTENERS
    answer = api.get("/live/events")
    feed.listeners -= MOST_LISTENERS
    assert (answer.status, answer.problem()) == (503, "unavailable")


def test_a_listener_that_goes_away_is_forgotten(api, worker):
    worker.open()
    listener = Listener(api)
    listener.until("session")
    assert api.server.review.feed.listeners == 1
    listener.close()
    until = time.monotonic() + 20
    while api.server.review.feed.listeners:
        for session in worker.running.values():
            session["bytes_up"] += 1
        time.sleep(0.05)
        assert time.monotonic() < until


def test_a_responder_ends_a_session_and_both_sides_of_it_are_in_the_evidence(api, worker):
    name = worker.open("backup")
    answer = api.post(f"/sessions/{name}/kill", {"reason": "it reads card\nnumbers"}, "responder")
    assert answer.json() == {"id": name, "killed": "yes"}
    [who, action, objects, outcome, _] = api.reads()[-1]
    assert (who, action, objects, outcome) == ("the-responder", "kill", [name], "allowed")
    token = next(t for t in api.kept.all() if t.name == "the-responder")
    until = time.monotonic() + 20
    while not (found := api.ok("/events", kind="decision")["items"]):
        assert time.monotonic() < until
    assert found[0]["fields"]["reason"] == "it reads card\nnumbers"
    whom = f"token:{token.id}(the-responder) peer:127.0.0.1"
    assert found[0]["fields"]["actor"] == f"{whom} via {person_of(0, '/proc/self/loginuid')}"
    assert found[0]["session"] == name
    again = api.post(f"/sessions/{name}/kill", {"reason": "x"}, "responder")
    assert (again.status, again.problem()) == (409, "not-running")
    worker.gate.commit()
    while api.ok(f"/sessions/{name}")["state"] != "closed":
        assert time.monotonic() < until
    assert api.ok(f"/sessions/{name}")["close_reason"] == "killed"


def test_a_reviewer_ends_nothing_and_the_try_is_recorded(api, worker):
    name = worker.open("backup")
    assert api.post(f"/sessions/{name}/kill", {"reason": "x"}, "reviewer").status == 403
    assert worker.running
    assert api.reads()[-1][:4] == ("the-reviewer", "kill", [name], "denied")


def health(api, **wanted):
    """Wait until the answer, which may be a second old, has these values; returns it."""
    until = time.monotonic() + 20
    while wanted.items() - (told := api.ok("/health", None)).items():
        assert time.monotonic() < until, told
        time.sleep(0.05)
    return told


def test_health_says_which_part_does_not_work(api, worker):
    told = api.ok("/health", None)
    assert told == {
        "status": "degraded", "recording": True, "index": True, "gate": True, "seal": False,
    }  # fmt: skip
    worker.failed = "evidence cannot be written"
    health(api, gate=False)
    checkpoint = api.evidence.store.ledger / "checkpoint"
    checkpoint.parent.mkdir(exist_ok=True)
    checkpoint.touch()
    worker.failed = ""
    health(api, status="ok", gate=True, seal=True)


def metric(text, line):
    found = [each.rpartition(" ")[2] for each in text.splitlines() if each.startswith(line + " ")]
    return float(found[0])


def test_metrics_have_what_was_lost(api, worker):
    for _ in range(3):
        worker.gate.record(0, Gap("worker", 'odd "reason"\n'))
    worker.gate.record(0, Heartbeat(0, 1, 2, 3, 4, 5, 66, 77))
    worker.gate.record(0, Refused("192.0.2.10", 1, "198.51.100.1", 2, "no-route", "r"))
    worker.open()
    text = api.get("/metrics").body.decode()
    assert metric(text, 'narrows_gaps_total{reason="odd \\"reason\\"\\n"}') == 3
    assert metric(text, "narrows_listen_drops_total") == 66
    assert metric(text, "narrows_sensor_lost_total") == 77
    assert metric(text, 'narrows_refusals_total{reason="no-route"}') == 1
    assert metric(text, 'narrows_sessions_open{worker="0"}') == 1
    assert metric(text, 'narrows_sessions_accepted_total{worker="0"}') == 5
    assert metric(text, 'narrows_evidence_pending_bytes{worker="0"}') == 40
    assert metric(text, "narrows_checkpoint_age_seconds") == -1
    assert metric(text, "narrows_disk_free_bytes") > 0


def test_events_are_paged_newest_first_and_do_not_repeat_while_more_come(api, worker):
    for number in range(30):
        worker.gate.record(0, Gap("worker", "parser", count=number))
    worker.gate.record(0, Alarm("forged", {"why": "x"}))
    worker.gate.commit()
    time.sleep(0.3)
    seen = []
    for page in api.pages("/events", limit=7, kind="gap"):
        seen += [event["fields"]["count"] for event in page]
        worker.gate.record(0, Gap("worker", "parser", count=1000))
        worker.gate.commit()
    assert [count for count in seen if count < 1000] == list(range(30))[::-1]
    [alarm] = api.ok("/events", kind="alarm")["items"]
    assert (alarm["kind"], alarm["session"], alarm["fields"]["kind"]) == ("alarm", None, "forged")


def test_an_auditor_sees_who_read_what_and_which_processes_began(api):
    api.get("/sessions/" + session_name(1 << 40), "viewer")
    time.sleep(0.3)
    [first, *_] = [
        event for event in api.ok("/audit", kind="access")["items"]
        if "the-viewer" in event["fields"]["actor"]
    ]  # fmt: skip
    assert first["fields"]["objects"] == [session_name(1 << 40)]
    kinds = {event["kind"] for event in api.ok("/audit")["items"]}
    assert {"access", "start"} <= kinds
