"""docs/protocols says what the code writes."""

import ast
import re
from pathlib import Path

import pytest
from replay import run
from transcript import all_transcripts

from capture.records import Fact, Gap, Operation, Result, Withheld

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/protocols/postgresql.md").read_text(encoding="utf-8")
OPERATIONS, FACTS = PAGE.split("## Facts", 1)
LAYER = ROOT / "appliance/protocols/postgresql.py"
SOURCES = [*sorted((ROOT / "appliance").glob("wire/pg*.py")), LAYER]


def transcripts_of(protocol):
    """Return the recorded sessions of one protocol, of which there are some."""
    found = [each for each in all_transcripts() if each.protocol == protocol]
    assert found
    return found


def calls(*names):
    """Yield the first constant argument of every call of one of `names` in the layer's code."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                for argument in node.args:
                    if name in names and isinstance(argument, ast.Constant):
                        yield argument.value
                        break


@pytest.mark.parametrize("kind", sorted({*calls("Fact", "fact", "_fact"), "error", "notice"}))
def test_every_kind_of_fact_is_listed(kind):
    assert re.search(rf"^\| `{kind}` \|", FACTS, re.MULTILINE)


@pytest.mark.parametrize("kind", sorted(set(calls("ask"))))
def test_every_kind_of_operation_is_listed(kind):
    assert re.search(rf"^\| `{kind}` \|", OPERATIONS, re.MULTILINE)


@pytest.mark.parametrize("why", sorted(set(calls("withhold")) | {"gssenc", "upstream-ended"}))
def test_every_reason_to_withhold_is_listed(why):
    assert f"`{why}`" in PAGE


def test_what_recorded_sessions_say_is_listed_with_its_fields():
    seen = set()
    for transcript in transcripts_of("postgresql"):
        replay = run(transcript)
        for fact in replay.of(Fact):
            row = re.search(rf"^\| `{fact.kind}` \|.*$", FACTS, re.MULTILINE)[0]
            fields = set(fact.fields) if fact.kind != "parameter" else set()
            seen.add(fact.kind)
            errors = {"severity", "detail", "hint", "position", "where"}
            for field in fields - (errors if "fields" in row else set()):
                assert f"`{field}`" in row, (fact.kind, field)
        for operation in replay.of(Operation):
            assert f"| `{operation.kind}` |" in PAGE
        for result in replay.of(Result):
            assert all(f"`{key}`" in PAGE for key in result.detail)
        assert not replay.of(Gap)
        assert all(f"`{withheld.why}`" in PAGE for withheld in replay.of(Withheld))
        for *_, kind in replay.hidden:
            assert f"`{kind}`" in PAGE
    assert len(seen) > 7


def test_what_recorded_http_sessions_say_is_on_its_page():
    page = (ROOT / "docs/protocols/http1.md").read_text(encoding="utf-8")
    seen = set()
    for transcript in transcripts_of("http1"):
        replay = run(transcript)
        seen |= {type(each) for each in replay.of((Fact, Operation, Result))}
        for fact in replay.of(Fact):
            row = re.search(rf"^\| `{fact.kind}` \|.*$", page, re.MULTILINE)[0]
            assert all(f"`{field}`" in row for field in fact.fields), fact
        assert all(f"`{operation.kind}`" in page for operation in replay.of(Operation))
        assert all(f"`{key}`" in page for result in replay.of(Result) for key in result.detail)
        assert all(f"`{withheld.why}`" in page for withheld in replay.of(Withheld))
    assert seen == {Fact, Operation, Result}
