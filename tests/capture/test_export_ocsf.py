import json

import jsonschema
import ocsf_json_schema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from review_evidence import OWNER, Evidence

from capture import index_query as query
from capture.export import ocsf
from capture.index_query import Filter
from capture.reader import Reader
from capture.records import Alarm, Fact, Gap, Hidden, Operation, Result, Withheld
from capture.settings import WriterSettings


class Validators(dict):
    """By class_uid; with a repr that hypothesis can print."""

    def __repr__(self):
        return "validators"


@pytest.fixture(scope="module")
def validators():
    schema = ocsf_json_schema.OcsfJsonSchemaEmbedded(ocsf_json_schema.get_ocsf_schema(ocsf.SCHEMA))
    return Validators(
        (uid, jsonschema.Draft202012Validator(schema.get_class_schema(name, profiles)))
        for uid, name, profiles in (
            (6005, "datastore_activity", ["datetime", "security_control"]),
            (4001, "network_activity", ["datetime", "host"]),
        )
    )


@pytest.fixture
def evidence(tmp_path):
    return Evidence(tmp_path)


def exported(evidence):
    """Every event of every session, oldest session first."""
    lines = []
    with evidence.index() as index:
        reader = Reader(evidence.store, evidence.keys, index)
        for session in list(query.sessions(index, Filter()))[::-1]:
            lines += ocsf.export(reader, session)
        reader.close()
    for line in lines:
        assert line.isascii()
        assert line.endswith(b"\n")
        assert not set(line[:-1]) & {*range(32), 127}
    return [json.loads(line) for line in lines]


def six_fields(event):
    """PCI DSS 10.2.2: who, what, when, outcome, where from, which object."""
    return {
        "who": event["actor"]["user"]["name"],
        "what": event["activity_name"] and event["type_uid"],
        "when": event["time"],
        "outcome": event["status"],
        "where from": event["src_endpoint"].get("ip") or event["src_endpoint"]["name"],
        "which object": event["dst_endpoint"].get("ip") or event["dst_endpoint"]["name"],
    }


def check(event, validators):
    validators[event["class_uid"]].validate(event)
    assert all(six_fields(event).values()), event
    assert event["type_uid"] == event["class_uid"] * 100 + event["activity_id"]
    assert event["type_name"] == f"{event['class_name']}: {event['activity_name']}"
    assert event["category_uid"] == event["class_uid"] // 1000


def captions(validators_schema, class_name, attribute):
    enum = validators_schema["classes"][class_name]["attributes"][attribute]["enum"]
    return {int(key): value["caption"] for key, value in enum.items()}


def test_operations_and_sessions_become_valid_events_with_the_six_fields(evidence, validators):
    with evidence.writer() as gate:
        session = gate.open(protocol="postgresql")
        gate.record(session, Fact("startup", {"protocol": "3.0", "parameters": {
            "user": "ci", "database": "shop"}}))  # fmt: skip
        gate.select(
            session, 1, "SELECT * FROM shop.cards WHERE id = $1", binds=(4711, {"hex": "00"}),
            tables=("shop.cards", "shop.people"),
        )  # fmt: skip
        gate.ask(
            session, 2, "DROP TABLE x", Result(2, "error", "", 0, 9, 2_500_000, "42P01", "no x")
        )
        gate.ask(session, 3, "DELETE FROM x", Result(3, "skipped"), verdict="denied")
        gate.ask(session, 4, "frobnicate")
        gate.record(session, Gap("session", "parser", detail="lost"))
        gate.record(session, Alarm("forged", {"why": "mac"}))
        gate.record(session, Hidden("client", 0, 3, "password", "00"))
        gate.record(session, Withheld("client", 0, 8, "gssenc"))
        gate.close(session, 4)
    events = exported(evidence)
    for event in events:
        check(event, validators)
    select, drop, delete, other, whole = events
    assert [event["class_uid"] for event in events] == [6005] * 4 + [4001]
    assert select["query_info"]["query_string"] == "SELECT * FROM shop.cards WHERE id = $1"
    assert select["activity_name"] == "Query"
    assert select["database"] == {
        "uid": "postgresql://198.51.100.10:5432/shop", "name": "shop", "type_id": 1,
        "type": "Relational",
    }  # fmt: skip
    assert select["table"] == {"name": "shop.cards"}
    details = select["unmapped"]["narrows"]
    assert details["session"] == select["metadata"]["correlation_uid"] == whole["metadata"]["uid"]
    assert details["binds"] == [4711, {"hex": "00"}]
    assert details["tables"] == ["shop.cards", "shop.people"]
    assert details["result"]["rows"] == 1
    assert select["actor"]["user"]["name"] == "ci-deployer"
    assert select["actor"]["process"]["file"]["hashes"][0]["value"] == OWNER["exe_sha256"]
    assert select["status"] == "Success"
    assert (drop["status"], drop["status_code"], drop["status_detail"]) == (
        "Failure", "42P01", "no x",
    )  # fmt: skip
    assert drop["duration"] == 2
    assert (delete["action"], delete["disposition"], delete["status"]) == (
        "Denied", "Blocked", "Failure",
    )  # fmt: skip
    assert (other["activity_name"], other["status"]) == ("FROBNICATE", "Unknown")
    assert whole["activity_name"] == "Close"
    assert whole["traffic"]["bytes_out"] > 0
    narrows = whole["unmapped"]["narrows"]
    assert narrows["counts"] == {"gaps": 1, "alarms": 1, "hidden": 1}
    assert narrows["gaps"][0]["reason"] == "parser"
    assert narrows["withheld"][0]["why"] == "gssenc"
    assert narrows["owner"] == OWNER


@pytest.mark.parametrize(
    ("reason", "activity", "status"),
    [
        ("fin", "Close", "Success"),
        ("reset", "Reset", "Failure"),
        ("refused", "Refuse", "Failure"),
        ("timeout", "Fail", "Failure"),
        ("killed", "Close", "Failure"),
    ],
)
def test_how_a_session_ended_is_its_events_activity(evidence, validators, reason, activity, status):
    with evidence.writer() as gate:
        gate.close(gate.open(account=None, owner=None), reason=reason, by="gate")
    [event] = exported(evidence)
    check(event, validators)
    assert (event["activity_name"], event["status"]) == (activity, status)
    assert event["status_detail"] == f"{reason} by gate"
    assert event["actor"]["user"]["name"] == "unknown"
    assert event["unmapped"]["narrows"]["unknown_reason"] == "no-sensor"


def test_running_and_cut_sessions_are_valid_too(evidence, validators):
    with evidence.writer() as gate:
        session = gate.open()
        gate.ask(session, 1, "SELECT 1")
        gate.commit()
        asked, running = exported(evidence)
        check(running, validators)
        assert asked["status_detail"] == "no result is recorded"
        assert (running["activity_name"], running["status"]) == ("Open", "Unknown")
        assert "end_time" not in running
    _, cut = exported(evidence)
    check(cut, validators)
    assert (cut["activity_name"], cut["type_uid"]) == ("Cut", 400199)


def test_a_session_whose_beginning_is_lost_is_still_a_valid_event(evidence, validators):
    with evidence.writer() as gate:
        session = gate.writer.new_session()
        gate.select(session, 1, "SELECT 1")
        gate.close(session)
    for event in exported(evidence):
        check(event, validators)
        assert event["src_endpoint"] == {"name": "unknown"}


def test_names_of_activities_are_those_of_the_schema():
    schema = ocsf_json_schema.get_ocsf_schema(ocsf.SCHEMA)
    wanted = captions(schema, "datastore_activity", "activity_id")
    for number, name in ocsf._ACTIVITIES.values():
        assert wanted[number] == name
    wanted = captions(schema, "network_activity", "activity_id")
    for number, name in ocsf._CLOSES.values():
        assert wanted[number] == name


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
OPERATIONS = st.builds(
    lambda verb, text, tables, binds, name, verdict, status, message: (
        {"verb": verb, "text": text, "tables": tables, "binds": binds, "name": name,
         "verdict": verdict},
        {"status": status, "message": message, "sqlstate": message[:5]},
    ),
    st.sampled_from(["SELECT", "CREATE TABLE", "unknown", "", "EMPTY", "weird \x1b verb"]),
    TEXT,
    st.lists(TEXT, max_size=3),
    st.lists(VALUE, max_size=3),
    TEXT,
    st.sampled_from(["allowed", "denied"]),
    st.sampled_from(["ok", "error", "cut", "skipped", None]),
    TEXT,
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    operations=st.lists(OPERATIONS, max_size=4),
    owner=st.none() | st.fixed_dictionaries(
        {}, optional={"pid": VALUE, "exe": VALUE, "argv": VALUE, "uid": VALUE, "exe_sha256": VALUE}
    ),
    account=st.none() | TEXT.filter(bool),
    parameters=VALUE,
)  # fmt: skip
def test_whatever_peers_send_the_events_are_valid(
    tmp_path_factory, validators, operations, owner, account, parameters
):
    evidence = Evidence(tmp_path_factory.mktemp("ocsf"))
    small = WriterSettings(
        chunk_bytes=64 << 10, chunk_count=2, segment_bytes=128 << 10, commit_s=0.0, reserve_bytes=0
    )
    with evidence.writer(settings=small) as gate:
        session = gate.open(account=account, owner=owner)
        gate.record(session, Fact("startup", {"parameters": parameters}))
        for op, (asked, ended) in enumerate(operations, 1):
            gate.record(session, Operation(op, offset=0, length=1, **asked))
            if ended["status"] is not None:
                gate.record(session, Result(op, **ended))
        gate.close(session, len(operations))
    events = exported(evidence)
    assert len(events) == len(operations) + 1
    for event in events:
        check(event, validators)
    told = [event["query_info"]["query_string"] for event in events[:-1]]
    assert told == [asked["text"] for asked, _ in operations]
