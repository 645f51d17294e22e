"""Leaves: canonical JSON, small, and read by the verifier as they were meant."""

import dataclasses
import json
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture import leaves
from capture.moment import nanoseconds, rfc3339
from capture.verify import canonical
from capture.verify.leaf import FIELDS, MOST_BYTES, parse
from capture.verify.leaf import nanoseconds as second_nanoseconds

TYPES = typing.get_args(leaves.Leaf)
HASH = "A" * 43 + "="
MOMENT = "2026-11-22T03:00:00.123456789Z"
MOST = (1 << 53) - 1
WORD = "w" * 32

#: The longest value that a field may have.
LONGEST = {
    "boot": "f" * 32, "by": WORD, "bytes": (MOST, MOST), "declared": (MOST, MOST, MOST),
    "final": True, "header": HASH, "opened": MOMENT, "origin": "n" * 128, "own": (MOST, MOST),
    "power_loss": False, "reason": WORD, "role": WORD, "action": WORD, "scope": WORD,
    "root": HASH, "session": "0" * 13, "sha256": "f" * 64, "stream": "s" * 16, "subroot": HASH,
    "tags": HASH, "time": MOMENT, "digest": HASH,
}  # fmt: skip


def longest(kind):
    names = [field.name for field in dataclasses.fields(kind) if field.name not in ("type", "v")]
    values = {name: LONGEST.get(name, MOST) for name in names}
    special = {leaves.Recovered: {"bytes": MOST}, leaves.Pack: {"last": True}}
    return kind(**values | special.get(kind, {}))


def test_every_type_of_leaf_is_known_to_the_verifier():
    assert {kind.type for kind in map(longest, TYPES)} == FIELDS.keys()
    for kind in TYPES:
        names = {field.name for field in dataclasses.fields(kind)}
        assert names == FIELDS[longest(kind).type].keys() | {"type", "v", "time"}


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_a_leaf_is_canonical_and_short_whatever_its_fields_are(kind):
    packed = leaves.pack(longest(kind))
    assert packed == canonical.dumps(json.loads(packed))
    assert len(packed) < MOST_BYTES
    assert parse(packed) == json.loads(packed)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_every_field_of_a_leaf_is_checked_by_the_verifier(kind):
    good = json.loads(leaves.pack(longest(kind)))
    for name in good:
        for wrong in (None, -1, 1.5, "\n", [], {}, [1, 2, 3, 4]):
            with pytest.raises(ValueError):
                parse(canonical_or_not({**good, name: wrong}))
        with pytest.raises(ValueError):
            parse(canonical.dumps({key: value for key, value in good.items() if key != name}))
    with pytest.raises(ValueError):
        parse(canonical.dumps({**good, "more": 1}))


def canonical_or_not(value):
    try:
        return canonical.dumps(value)
    except ValueError:
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def test_a_number_that_canonical_json_cannot_hold_is_refused():
    with pytest.raises(TypeError):
        leaves.pack(dataclasses.replace(longest(leaves.Heartbeat), open=1 << 53))


@pytest.mark.parametrize(
    ("text", "word"),
    [("fin", "fin"), ("own-address", "own-address"), ("", "other"), ("Fin", "other"),
     ("a b", "other"), ("a\n", "other"), ("x" * 33, "other"), (None, "other"), (7, "other"),
     ("\u00e9", "other"), ("-a", "other")],
)  # fmt: skip
def test_only_a_plain_word_gets_into_a_leaf(text, word):
    assert leaves.word(text) == word


def test_canonical_json_spells_the_examples_of_rfc_8785():
    strings = '\u20ac$\u000f\nA\'B"\\\\"/'
    assert canonical.dumps({"string": strings, "literals": [None, True, False]}) == (
        '{"literals":[null,true,false],"string":"\u20ac$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}'.encode()
    )
    names = {
        "\u20ac": "Euro Sign", "\r": "Carriage Return", "\ufb33": "Hebrew Letter Dalet With Dagesh",
        "1": "One", "\U0001f600": "Emoji: Grinning Face", "\u0080": "Control",
        "\u00f6": "Latin Small Letter O With Diaeresis",
    }  # fmt: skip
    assert list(json.loads(canonical.dumps(names)).values()) == [
        "Carriage Return", "One", "Control", "Latin Small Letter O With Diaeresis", "Euro Sign",
        "Emoji: Grinning Face", "Hebrew Letter Dalet With Dagesh",
    ]  # fmt: skip
    assert canonical.dumps("\b\t\n\f\r\x00\x1f\x7f\u2028") == (
        b'"\\b\\t\\n\\f\\r\\u0000\\u001f\x7f\xe2\x80\xa8"'
    )
    assert canonical.dumps([MOST, -MOST, 0]) == b"[9007199254740991,-9007199254740991,0]"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-MOST, MOST) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_a_canonical_text_reads_back_as_itself(value):
    text = canonical.dumps(value)
    assert canonical.loads(text) == value
    assert canonical.dumps(canonical.loads(text)) == text


@pytest.mark.parametrize(
    "text",
    [b'{"a":1, "b":2}', b'{"b":1,"a":2}', b'{"a":1,"a":1}', b"1.0", b"1e3", b"NaN", b"Infinity",
     b"9007199254740992", b'"\\u00e9"', b'"\\/"', b"\xff", b"", b"[1,]", b"01", b"-0", b" 1",
     b'"\\ud800"', b"{}x"],
)  # fmt: skip
def test_any_other_spelling_is_refused(text):
    with pytest.raises(ValueError):
        canonical.loads(text)


@given(st.integers(0, (1 << 63) - 1))
def test_times_read_back_to_the_nanosecond_in_both_readings(time_ns):
    text = rfc3339(time_ns)
    assert nanoseconds(text) == second_nanoseconds(text) == time_ns


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2026-11-22T03:00:00Z", 1795316400), ("2026-11-22T04:00:00+01:00", 1795316400),
     ("1970-01-01T00:00:00.5Z", 0.5), ("2024-02-29T23:59:59.25-00:30", 1709252999.25)],
)  # fmt: skip
def test_any_offset_and_precision_of_rfc_3339_is_read(text, seconds):
    assert nanoseconds(text) == int(seconds * 4) * 250_000_000


@pytest.mark.parametrize(
    "text",
    ["2026-11-22", "2026-11-22T03:00:00", "x", "2026-13-01T00:00:00Z", "2026-11-22T03:00:00.Z",
     "2026-11-22T03:00:00.1234567890Z"],
)  # fmt: skip
def test_what_is_no_moment_is_refused(text):
    with pytest.raises(ValueError):
        nanoseconds(text)
