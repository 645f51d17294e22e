"""Parameter values, decoded; the server itself says what they are."""

import struct

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pgserver import VERSIONS, PgServer

from appliance.wire.pgtypes import MOST_VALUE_BYTES, decode, text_of

#: type -> SQL expressions; `g` runs from 1 to 40
VALUES = {
    "int2": ["g - 20", "32767", "-32768"],
    "int4": ["g * 7919 - 99999", "2147483647", "-2147483648"],
    "int8": ["g * 1234567890123", "9223372036854775807", "-9223372036854775808"],
    "oid": ["g", "4294967295"],
    "float4": ["g / 7.0", "1e30", "-0.1", "'NaN'", "'Infinity'", "'-Infinity'", "16777217",
               "1e-40"],
    "float8": ["g / 7.0", "1e300", "-0.1", "'NaN'", "'Infinity'", "'-Infinity'", "5e-324"],
    "numeric": [
        "(g - 20)::numeric / 7", "g::numeric ^ 30", "10::numeric ^ (-g)", "0", "0.00", "'NaN'",
        "1e100", "-123456789.123456789", "10000", "1e4 - 0.0001", "12300000000", "1.50000000000",
        "'Infinity'", "'-Infinity'",
    ],
    "bool": ["g % 2 = 0"],
    "text": ["repeat('ä✓', g)", "''", "E'tab\\tnew\\nline'"],
    "varchar": ["'it''s ' || g"],
    "bpchar": ["'x  '"],
    "name": ["'a name'"],
    '"char"': ["'c'"],
    "bytea": ["decode(md5(g::text), 'hex')", "''"],
    "date": ["date '2000-01-01' + g * 1000", "'0001-01-01'", "'9999-12-31'", "'infinity'",
             "'-infinity'"],
    "time": ["time '00:00' + g * interval '35 min 1.000001 s'", "'24:00:00'", "'00:00:00.5'"],
    "timetz": ["'12:34:56.789+05:30'", "'00:00:00-11'", "'23:59:59+00'"],
    "timestamp": ["timestamp '2000-01-01' + g * interval '1000 h 0.000001 s'", "'infinity'",
                  "'0001-01-01 00:00'", "'9999-12-31 23:59:59.999999'", "'1999-12-31 23:59:59.5'"],
    "timestamptz": ["timestamptz '2000-01-01 00:00+00' - g * interval '999 h'", "'-infinity'"],
    "interval": ["g * interval '1 month 2 days 3.5 s'", "'-1 year 2 days -00:00:00.000001'",
                 "'178000000 years'", "'-2000000000:00:54.775807'", "'0'"],
    "uuid": ["md5(g::text)::uuid"],
    "json": ["'{\"a\": [1, null]}'"],
    "jsonb": ["jsonb_build_object('a', g)", "'\"x\"'", "'null'"],
}  # fmt: skip
ONLY_18 = {"interval": ["'infinity'", "'-infinity'"]}
#: what JSON or ISO 8601 has no form for
AS_HEX = {
    "date": ["'0044-03-15 BC'", "'10000-01-01'"],
    "timestamp": ["'4713-01-01 BC'"],
    "numeric": ["repeat('9', 9000)::numeric"],
}
ARRAYS = {
    "int4[]": ["ARRAY[1, NULL, 3]", "'{}'", "'{{1,2},{3,4},{5,6}}'", "'[5:6]={1,2}'"],
    "text[]": ["ARRAY['a', 'b\"c', NULL]"],
    "bool[]": ["ARRAY[true, false]"],
    "int8[]": ["'{{{1},{2}},{{3},{4}}}'"],
    "uuid[]": ["ARRAY[md5('x')::uuid]"],
}


@pytest.fixture(scope="module", params=VERSIONS)
def connection(request):
    with PgServer(request.param) as server, psycopg.connect(
        host=server.host, port=server.port, user="postgres", dbname="shop", autocommit=True
    ) as connection:  # fmt: skip
        connection.execute("SET intervalstyle = postgres")
        yield connection


def values(connection, kind, expression):
    """Yield (oid, binary form, text form) as the server makes them, each once."""
    source = f"SELECT ({expression})::{kind} AS v FROM generate_series(1, 40) g"
    text = f"SELECT v, v::text FROM ({source}) x"
    result = connection.pgconn.exec_params(text.encode(), None, result_format=1)
    assert result.status == psycopg.pq.ExecStatus.TUPLES_OK, result.error_message
    found = [(result.get_value(row, 0), result.get_value(row, 1)) for row in range(result.ntuples)]
    for binary, shown_as in dict.fromkeys(found):
        yield result.ftype(0), binary, shown_as


def same(connection, kind, shown, original):
    """Ask the server whether a text that we show is the value that it had."""
    query = f"SELECT %s::{kind} IS NOT DISTINCT FROM %s::{kind}"
    if kind == "json":
        query = "SELECT %s::json::text = %s::json::text"
    return connection.execute(query, (shown, original)).fetchone()[0]


def shown(value):
    """Return a decoded value as text that the server could read."""
    if isinstance(value, dict):
        return "\\x" + value["hex"]
    return str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize("kind", VALUES)
def test_both_forms_of_a_value_are_what_the_server_says(connection, kind):
    expressions = VALUES[kind]
    if connection.info.server_version >= 180000:
        expressions = expressions + ONLY_18.get(kind, [])
    for expression in expressions:
        for oid, binary, text in values(connection, kind, expression):
            original = text.decode()
            value = decode(binary, oid, binary=True)
            assert not isinstance(value, dict) or kind == "bytea", (expression, value)
            assert same(connection, kind, shown(value), original), (value, original)
            assert same(connection, kind, shown(decode(text, oid, binary=False)), original)


@pytest.mark.parametrize("kind", ["int4", "float8", "bool", "int8"])
def test_numbers_and_truth_are_json_values_in_both_forms(connection, kind):
    for oid, binary, text in values(connection, kind, VALUES[kind][0]):
        value = decode(binary, oid, binary=True)
        assert value == decode(text, oid, binary=False)
        assert type(value) is {"int4": int, "int8": int, "float8": float, "bool": bool}[kind]


@pytest.mark.parametrize("kind", AS_HEX)
def test_what_has_no_other_form_is_shown_as_hex(connection, kind):
    for expression in AS_HEX[kind]:
        for oid, binary, _ in values(connection, kind, expression):
            value = decode(binary, oid, binary=True)
            assert set(value) <= {"hex", "bytes"}
            assert binary.hex().startswith(value["hex"])


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_are_lists(connection, kind):
    for expression in ARRAYS[kind]:
        for oid, binary, text in values(connection, kind, expression):
            query = f"SELECT array_to_json(%s::{kind})"
            expected = connection.execute(query, (text.decode(),)).fetchone()[0]
            assert decode(binary, oid, binary=True) == expected


def test_an_unknown_type_is_hex_in_binary_and_text_in_text_form():
    assert decode(b"\1\2", 600, binary=True) == {"hex": "0102"}
    assert decode(b"(1,2)", 600, binary=False) == "(1,2)"
    assert decode("ä".encode(), 0, binary=False) == "ä"


def test_a_long_value_is_shortened_and_its_length_told():
    long = b"x" * (MOST_VALUE_BYTES + 1)
    assert decode(long, 25, binary=True) == {"text": "x" * MOST_VALUE_BYTES, "bytes": len(long)}
    assert decode(long, 17, binary=True) == {"hex": "78" * MOST_VALUE_BYTES, "bytes": len(long)}


def test_what_is_not_utf8_is_shown_with_escapes():
    assert text_of(b"a\xffb") == "a\\xffb"


def test_an_array_of_arrays_is_not_followed():
    inner = struct.pack("!iiIii", 1, 0, 1007, 1, 1) + struct.pack("!i", 0)
    assert decode(inner, 1007, binary=True) == {"hex": inner.hex()}


@given(st.binary(max_size=80), st.integers(0, 4000), st.booleans())
def test_no_bytes_make_it_fail(raw, oid, binary):
    decode(raw, oid, binary=binary)


@given(st.binary(max_size=200))
def test_no_array_makes_it_fail(raw):
    for element in (23, 25, 1700, 1007):
        decode(struct.pack("!iiI", 1, 0, element) + raw, 1007, binary=True)
