"""Every record that is neither an operation nor a session as an OCSF event, held to the schema."""

import json

import jsonschema
import ocsf_json_schema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from review_evidence import Evidence

from capture import index_query, records
from capture.export import ocsf, ocsf_records
from capture.frames import session_name
from capture.records import (
    Access,
    Alarm,
    Decision,
    Flow,
    Gap,
    Heartbeat,
    Recovered,
    Refused,
)

SPAN = (1_700_000_000_000_000_000, 1_700_000_060_000_000_000)
NAMES = {
    2004: "detection_finding", 4001: "network_activity", 6002: "application_lifecycle",
    6003: "api_activity", 6008: "application_error",
}  # fmt: skip


@pytest.fixture(scope="module")
def schema():
    return ocsf_json_schema.get_ocsf_schema(ocsf.SCHEMA)


@pytest.fixture(scope="module")
def validate(schema):
    made = ocsf_json_schema.OcsfJsonSchemaEmbedded(schema)
    validators = {
        uid: jsonschema.Draft202012Validator(made.get_class_schema(name, ["datetime", "host"]))
        for uid, name in NAMES.items()
    }

    def check(event):
        validators[event["class_uid"]].validate(event)
        assert event["type_uid"] == event["class_uid"] * 100 + event["activity_id"]
        assert event["category_uid"] == event["class_uid"] // 1000
        name = schema["classes"][NAMES[event["class_uid"]]]
        assert event["class_name"] == name["caption"]
        assert event["category_name"] == name["category_name"]
        known = name["attributes"]["activity_id"]["enum"].get(str(event["activity_id"]))
        assert event["activity_id"] == 99 or known["caption"] == event["activity_name"]
        assert all(six_fields(event).values()), event

    return check


def six_fields(event):
    """PCI DSS 10.2.2; where nobody from outside acted, the device is where from and the object."""
    where, what = event.get("src_endpoint"), event.get("dst_endpoint")
    return {
        "who": event["actor"]["user"]["name"],
        "what": event["activity_name"] and event["type_uid"],
        "when": event["time"],
        "outcome": event["status"],
        "where from": where or event["device"]["name"],
        "which object": what or event["device"]["name"],
    }


def exported(evidence):
    with evidence.index() as index:
        found = list(index_query.events(index, *ocsf_records.KNOWN))
        lines = list(map(ocsf_records.record_line, found))
    for line in lines:
        assert line.isascii()
        assert line.endswith(b"\n")
        assert not set(line[:-1]) & {*range(32), 127}
    return [json.loads(line) for line in lines]


def test_every_kind_of_record_becomes_a_valid_event_of_its_class(tmp_path, validate):
    evidence = Evidence(tmp_path)
    with evidence.writer() as gate:
        session = gate.open()
        name = session_name(session)
        for owner, record in (
            (0, Gap("worker", "emfile", *SPAN, count=3, detail="of 1,024")),
            (0, Gap("route", "bypass", packets=12)),
            (session, Gap("session", "parser")),
            (0, Flow("192.0.2.10", "udp", 53, 4, 400, *SPAN)),
            (0, Flow("2001:db8::1", "132", 0, 1, 60, *SPAN)),
            (0, Refused("192.0.2.10", 4, "203.0.113.1", 22, "management", name)),
            (session, Alarm("forged", {"why": "mac"})),
            (session, Decision("token:1(ann) peer:203.0.113.9", "kill", "cards", "done")),
            (0, Decision("uid:0(root)", "redirect-apply", "table narrows", "done")),
            (0, Decision("uid:0(root)", "token-create", "id 1", "done")),
            (0, Decision("uid:0(root)", "token-revoke", "id 1", "not there")),
            (0, Access("uid:0(root)", "export", "--all", (name,))),
            (0, Access("token:1(ann) peer:2001:db8::9", "show", "/x", (), "denied")),
            (0, Access("uid:0(root)", "reindex", "")),
            (0, Recovered(7, (1, 2), 3, 4)),
        ):  # fmt: skip
            gate.record(owner, record)
        gate.record(0, Heartbeat(0, 1, 2, 3, 4, 5, 6, 7))
    events = exported(evidence)
    for event in events:
        validate(event)
    told = [(e["unmapped"]["narrows"].get("record"), e["class_uid"], e["activity_name"],
             e["status"]) for e in events]  # fmt: skip
    assert sorted(told, key=str) == sorted(
        [
            ("Start", 6002, "Start", "Success"), ("Stop", 6002, "Stop", "Success"),
            ("Recovered", 6002, "Recovered", "Success"),
            *[("Gap", 6008, "General Error", "Failure")] * 3,
            *[("Flow", 4001, "Traffic", "Success")] * 2, (None, 4001, "Refuse", "Failure"),
            ("Alarm", 2004, "Create", "Unknown"), ("Decision", 6003, "kill", "Success"),
            ("Decision", 6003, "Update", "Success"), ("Decision", 6003, "Create", "Success"),
            ("Decision", 6003, "Delete", "Failure"), ("Access", 6003, "Read", "Success"),
            ("Access", 6003, "Read", "Failure"), ("Access", 6003, "reindex", "Success"),
        ],
        key=str,
    )  # fmt: skip
    found = {(e["class_uid"], e.get("message")): e for e in events}
    gap = found[6008, "worker: emfile: of 1,024"]
    assert (gap["start_time"], gap["end_time"]) == tuple(at // 1_000_000 for at in SPAN)
    assert gap["unmapped"]["narrows"]["count"] == 3
    kill = found[6003, "cards"]
    assert kill["actor"]["user"]["name"] == "token:1(ann) peer:203.0.113.9"
    assert kill["src_endpoint"] == {"ip": "203.0.113.9"}
    assert kill["metadata"]["correlation_uid"] == name
    assert kill["resources"] == [{"uid": name, "type": "session"}]
    assert found[6003, "--all"]["resources"] == [{"uid": name, "type": "session"}]
    assert found[6008, "session: parser"]["unmapped"]["narrows"]["session"] == name
    assert len({e["metadata"]["uid"] for e in events}) == len(events)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
COUNT = st.integers(0, 2**53)
RECORDS = st.one_of(
    st.builds(Gap, TEXT, TEXT, since=COUNT, until=COUNT, count=COUNT, detail=TEXT),
    st.builds(Flow, st.sampled_from(["192.0.2.1", "::1"]), st.sampled_from(["udp", "47"]),
              st.integers(0, 65535), COUNT, COUNT, COUNT, COUNT),
    st.builds(Alarm, TEXT, st.dictionaries(TEXT, TEXT, max_size=2)),
    st.builds(Decision, TEXT, TEXT, TEXT, TEXT),
    st.builds(Access, TEXT, TEXT, TEXT, st.lists(TEXT, max_size=2).map(tuple), TEXT),
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(record=RECORDS, session=st.sampled_from([0, 1 << 40 | 5]))
def test_whatever_a_record_says_its_event_is_valid(validate, record, session):
    fields = json.loads(records.encode(record))
    event = index_query.Event(records.KINDS[type(record)], SPAN[0], session, fields)
    validate(json.loads(ocsf_records.record_line(event)))


def test_every_record_that_the_index_finds_by_kind_is_exported_but_heartbeats():
    from capture.index_delta import _EVENTS

    assert set(ocsf_records.KNOWN) == _EVENTS - {records.KINDS[Heartbeat]}
