"""What the JSON of a session says."""

from review_evidence import Evidence

from capture import index_query as query
from capture.index_query import Filter
from capture.records import Detected, Fact
from capture.session_json import session_object


def test_a_session_whose_credentials_are_recorded_says_so(tmp_path):
    evidence = Evidence(tmp_path)
    with evidence.writer() as gate:
        known, opaque, upgraded = (gate.writer.new_session() for _ in range(3))
        gate.record(known, Detected("http1"))
        gate.record(opaque, Detected("opaque", "server-first", "unparsed"))
        gate.record(upgraded, Detected("http1"))
        gate.record(upgraded, Fact("upgraded", {"op": 1, "to": "x", "secrets": "unparsed"}))
        gate.commit()
        gate.record(upgraded, Fact("notice", {"secrets": "few"}))
        gate.close(upgraded)
    with evidence.index() as index:
        found = {s.number: s for s in query.sessions(index, Filter())}
        told = {number: session_object(s)["secrets"] for number, s in found.items()}
    assert told == {known: None, opaque: "unparsed", upgraded: "unparsed"}
