"""openapi.json is well formed, true for what the API really answers, and docs/api.md has it all."""

import json
import re
from pathlib import Path

import jsonschema
import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.web.openapi import BASE, document
from appliance.web.problem import KINDS
from appliance.web.server import ROUTES
from capture.frames import session_name
from capture.records import Alarm, Attributed, Decision, Gap, Hidden, Result

PAGE = (Path(__file__).parents[3] / "docs" / "api.md").read_text(encoding="utf-8")
DOCUMENT = document(ROUTES)
STREAMS = {"/live/events"}


@pytest.fixture(scope="module")
def filled(shared):
    from capture.seal import Seal

    with shared.evidence.writer() as gate:
        number = gate.open("ci-deployer", "postgresql")
        gate.select(number, 1, "select 1", binds=(1, None, {"hex": "00"}), tables=("a.b",))
        columns = (("id", 23), ("name", 25))
        gate.ask(number, 2, "select * from t", Result(2, "ok", columns=columns, tx="I"))
        gate.ask(number, 3, "insert into t values (1)")
        gate.record(number, Gap("session", "parser"))
        gate.record(number, Alarm("forged", {"why": ["x"]}))
        gate.record(number, Hidden("client", 0, 1, "password", "ab"))
        gate.record(number, Decision("uid:0", "kill", "because", "done"))
        gate.close(number)
        unknown = gate.open(None)
        gate.record(unknown, Attributed(None, "none", "none", "ambiguous", ("a", "b")))
        gate.commit()
    seal = Seal(shared.evidence.store, shared.evidence.keys, checkpoint_s=0.01)
    while seal.step():
        pass
    seal.close()
    shared.name = session_name(number)
    return shared


def refs(value):
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from refs(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from refs(inner)


def operations():
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            yield path, method.upper(), operation


def schema_of(operation, status, media):
    content = operation["responses"][str(status)]["content"]
    return strict({**content[media]["schema"], "components": DOCUMENT["components"]})


def strict(schema):
    """The same schema, in which an object has no key that is not described."""
    if isinstance(schema, dict):
        made = {key: strict(value) for key, value in schema.items()}
        if "properties" in made and isinstance(made["properties"], dict) and "type" in made:
            made.setdefault("additionalProperties", False)
        return made
    return [strict(item) for item in schema] if isinstance(schema, list) else schema


def check(operation, answer):
    """An answer is as the description says."""
    assert str(answer.status) in operation["responses"], (answer.status, answer.body[:300])
    media = answer.headers["Content-Type"].split(";")[0]
    schema = schema_of(operation, answer.status, media)
    if media.endswith("json") and media != "application/x-ndjson":
        jsonschema.Draft202012Validator(schema).validate(answer.json())


def test_it_is_served_and_is_what_the_routes_are(filled):
    answer = filled.get("/openapi.json", None)
    assert answer.json() == json.loads(json.dumps(DOCUMENT))
    assert answer.json()["openapi"] == "3.1.0"
    assert {(m, p) for p, m, _ in operations()} == {(r.method, r.path) for r in ROUTES}


def test_it_is_well_formed():
    names = DOCUMENT["components"]["schemas"]
    for ref in refs(DOCUMENT):
        assert ref.removeprefix("#/components/schemas/") in names, ref
    for schema in names.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    ids = [operation["operationId"] for *_, operation in operations()]
    assert len(set(ids)) == len(ids)
    for path, _, operation in operations():
        declared = {p["name"] for p in operation["parameters"] if p["in"] == "path"}
        assert declared == set(re.findall(r"\{(\w+)\}", path))
        for parameter in operation["parameters"]:
            assert parameter["description"]
            assert parameter["in"] in {"path", "query", "header"}
            assert parameter["in"] != "path" or parameter["required"]
            jsonschema_rs.meta.validate(parameter["schema"])  # patterns are ECMA-262's
        assert operation["summary"]
        assert operation["responses"]["200"]["content"]
        if operation.get("requestBody"):
            assert operation["requestBody"]["content"]["application/json"]["schema"]["properties"]


QUERIES = {
    "/sessions": ["", "?q=select", "?limit=1"],
    "/sessions/{session}/records": [
        f"?kind={kind}" for kind in ("facts", "gaps", "alarms", "hidden", "withheld", "decisions")
    ],
    "/evidence/proofs/inclusion": ["?index=0"],
    "/evidence/proofs/consistency": ["?old=1"],
}


@pytest.mark.parametrize("path", [path for path, method, _ in operations() if method == "GET"])
def test_every_answer_is_as_it_is_described(filled, path):
    if path in STREAMS:
        return
    operation = DOCUMENT["paths"][path]["get"]
    real = path.replace("{session}", filled.name).replace("{direction}", "up")
    for query in QUERIES.get(path, [""]):
        answer = filled.get(real + query)
        assert answer.status == 200, answer.body
        check(operation, answer)
    missing = path.replace("{session}", "0" * 13).replace("{direction}", "up")
    check(operation, filled.get(missing + QUERIES.get(path, [""])[0]))
    check(operation, filled.get(real + "?nonsense=1"))


def test_a_kill_of_what_does_not_run_is_as_it_is_described(filled):
    operation = DOCUMENT["paths"]["/sessions/{session}/kill"]["post"]
    answer = filled.post(f"/sessions/{filled.name}/kill", {"reason": "x"})
    assert answer.status == 409
    check(operation, answer)
    for body in ({}, {"reason": " "}, {"reason": 1}, {"reason": "x", "more": 1}, [], None, "x"):
        answer = filled.post(f"/sessions/{filled.name}/kill", body)
        assert answer.status == 400, body
        check(operation, answer)


TEXTS = st.text(max_size=30) | st.sampled_from(["0", "-1", "true", "null", "2026-01-01T00:00:00Z"])


def fitting(schema):
    """Values that a parameter's schema allows, now and then others."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"]) | TEXTS
    if schema["type"] == "integer":
        return st.integers(-5, 2000).map(str) | TEXTS
    if schema["type"] == "boolean":
        return st.sampled_from(["true", "false"]) | TEXTS
    pattern = schema.get("pattern", "").replace(r"[\p{L}\p{N}]", r"[a-z]+ ?[0-9]*\*?")
    return st.from_regex(pattern or r"\A[a-z .:*\"]{0,20}\Z") | TEXTS


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_whatever_is_asked_the_answer_is_described(filled, data):
    from urllib.parse import quote, urlencode

    path, method, operation = data.draw(
        st.sampled_from([each for each in operations() if each[0] not in STREAMS])
    )
    query, headers = {}, {"Content-Type": "application/json"}
    for parameter in operation["parameters"]:
        if parameter["in"] == "path":
            known = {"session": filled.name, "direction": "up"}[parameter["name"]]
            value = data.draw(st.just(known) | fitting(parameter["schema"])) or "x"
            path = path.replace(f"{{{parameter['name']}}}", quote(value, safe=""))
        elif parameter["in"] == "query" and (parameter["required"] or data.draw(st.booleans())):
            query[parameter["name"]] = data.draw(fitting(parameter["schema"]))
        elif parameter["in"] == "header":
            headers[parameter["name"]] = data.draw(
                st.from_regex(r"\A(bytes=)?[0-9]{0,4}-[0-9]{0,4}\Z")
            )
    if query:
        path += "?" + urlencode({k: v.encode("utf-8", "replace") for k, v in query.items()})
    body = None
    if method == "POST":
        body = data.draw(st.binary(max_size=60) | st.just(b'{"reason": "x"}'))
    answer = filled.ask(method, path, headers=headers, body=body)
    assert answer.status != 500
    if answer.status == 404 and answer.json()["detail"].startswith("Nothing"):
        return  # a path that is no route's any more
    check(operation, answer)


def test_every_route_role_parameter_and_problem_is_documented():
    for route in ROUTES:
        line = next(
            (row for row in PAGE.splitlines() if f"`{route.method} {route.path}`" in row), ""
        )
        assert line, route.path
        role = DOCUMENT["paths"][route.path][route.method.lower()].get("x-narrows-role", "none")
        assert f"| {role} |" in line, (route.path, role)
    for path, _, operation in operations():
        for parameter in operation["parameters"]:
            name = "Range" if parameter["in"] == "header" else parameter["name"]
            assert f"`{name}`" in PAGE or f"{{{name}}}" in PAGE, (path, name)
    for kind, (status, _) in KINDS.items():
        assert f"| `{kind}` | {status} |" in PAGE


def test_every_route_that_is_documented_is_there():
    known = {f"{route.method} {route.path}" for route in ROUTES}
    assert set(re.findall(r"^\| `((?:GET|POST) [^`]*)` \|", PAGE, re.MULTILINE)) == known


def test_every_metric_is_documented_and_there(filled):
    told = filled.get("/metrics").body.decode()
    there = set(re.findall(r"^# TYPE (\w+) ", told, re.MULTILINE))
    assert there == set(re.findall(r"^\| `(narrows_\w+)` \|", PAGE, re.MULTILINE))
    assert 'narrows_gaps_total{reason="parser"} 1' in told
    assert 'narrows_alarms_total{kind="forged"} 1' in told
    assert BASE in PAGE
