"""What statements mean; caches that change nothing; texts that kill parsers."""

import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.wire import sql
from appliance.wire.sql import Analyser

LOOSE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=300)


def one(text):
    (part,) = Analyser().parts(text)
    return part.analysis


@pytest.mark.parametrize(
    ("text", "verb", "tables"),
    [
        ("SELECT 1", "SELECT", ()),
        ("select * from a, b.c join d on true", "SELECT", ("a", "b.c", "d")),
        ('SELECT * FROM "A b"."C""d"', "SELECT", ('A b.C"d',)),
        ("SELECT * FROM a WHERE x IN (SELECT y FROM b)", "SELECT", ("a", "b")),
        ("WITH c AS (SELECT * FROM a) SELECT * FROM c", "SELECT", ("a",)),
        ("WITH c AS (SELECT * FROM a) SELECT * FROM c, s.c", "SELECT", ("a", "s.c")),
        ("WITH d AS (DELETE FROM a RETURNING *) SELECT * FROM d", "DELETE", ("a",)),
        ("WITH RECURSIVE r AS (SELECT 1 UNION SELECT * FROM r, a) TABLE r", "SELECT", ("a",)),
        ("WITH a AS (SELECT 1) INSERT INTO a SELECT * FROM a", "INSERT", ("a",)),
        ("SELECT * FROM a UNION SELECT * FROM b", "SELECT", ("a", "b")),
        ("SELECT * INTO new FROM a", "CREATE", ("new", "a")),
        ("CREATE TABLE new AS SELECT * FROM a", "CREATE", ("a", "new")),
        ("VALUES (1), (2)", "SELECT", ()),
        ("TABLE a", "SELECT", ("a",)),
        ("INSERT INTO s.t SELECT * FROM u ON CONFLICT DO NOTHING", "INSERT", ("s.t", "u")),
        ("UPDATE t SET x = 1 FROM u WHERE t.a = u.a", "UPDATE", ("t", "u")),
        ("DELETE FROM t USING u", "DELETE", ("t", "u")),
        ("MERGE INTO t USING u ON true WHEN MATCHED THEN DELETE", "MERGE", ("t", "u")),
        ("TRUNCATE a, b", "TRUNCATE", ("a", "b")),
        ("DROP TABLE a, s.b", "DROP", ("a", "s.b")),
        ("DROP FUNCTION f", "DROP", ()),
        ("DROP DATABASE d", "DROP", ()),
        ("ALTER TABLE a RENAME TO b", "ALTER", ("a",)),
        ("ALTER TABLE a ADD b int REFERENCES c", "ALTER", ("a", "c")),
        ("CREATE INDEX ON a (x)", "CREATE", ("a",)),
        ("CREATE VIEW v AS SELECT * FROM a", "CREATE", ("v", "a")),
        ("CREATE DATABASE d", "CREATE", ()),
        ("CREATE ROLE r", "CREATE", ()),
        ("GRANT SELECT ON a TO r", "GRANT", ("a",)),
        ("REVOKE ALL ON a FROM r", "REVOKE", ("a",)),
        ("COPY a TO STDOUT", "COPY", ("a",)),
        ("COPY (SELECT * FROM a) TO STDOUT", "COPY", ("a",)),
        ("EXPLAIN ANALYZE DELETE FROM a", "EXPLAIN", ("a",)),
        ("BEGIN", "BEGIN", ()),
        ("START TRANSACTION", "BEGIN", ()),
        ("END", "COMMIT", ()),
        ("ABORT", "ROLLBACK", ()),
        ("SAVEPOINT s", "SAVEPOINT", ()),
        ("ROLLBACK TO s", "ROLLBACK", ()),
        ("PREPARE TRANSACTION 'x'", "PREPARE", ()),
        ("SET search_path TO x", "SET", ()),
        ("RESET ALL", "RESET", ()),
        ("SHOW ALL", "SHOW", ()),
        ("VACUUM a", "VACUUM", ("a",)),
        ("ANALYZE a", "ANALYZE", ("a",)),
        ("LOCK a", "LOCK", ("a",)),
        ("DECLARE c CURSOR FOR SELECT * FROM a", "DECLARE", ("a",)),
        ("FETCH 1 FROM c", "FETCH", ()),
        ("MOVE 1 FROM c", "MOVE", ()),
        ("CLOSE c", "CLOSE", ()),
        ("CALL p()", "CALL", ()),
        ("DO $$ BEGIN END $$", "DO", ()),
        ("LISTEN x", "LISTEN", ()),
        ("NOTIFY x", "NOTIFY", ()),
        ("CHECKPOINT", "CHECKPOINT", ()),
        ("COMMENT ON TABLE a IS 'x'", "COMMENT", ("a",)),
        ("COMMENT ON COLUMN s.a.x IS 'x'", "COMMENT", ("s.a",)),
        ("REFRESH MATERIALIZED VIEW a", "REFRESH", ("a",)),
        ("SELEC 1", "unknown", ()),
        ("SELECT 'open", "unknown", ()),
    ],
)
def test_a_statement_has_its_verb_and_its_tables(text, verb, tables):
    found = one(text)
    assert (found.verb, set(found.tables)) == (verb, set(tables))
    assert bool(found.fingerprint) == (verb != "unknown")


def test_statements_of_one_text_are_told_apart():
    text = "SELECT 'ä;'; -- one; two\n  INSERT INTO t VALUES ('x'); ; /* ; */ SELECT 2"
    parts = Analyser().parts(text)
    raw = text.encode()
    assert [raw[part.start : part.end].decode() for part in parts] == [
        "SELECT 'ä;'", "-- one; two\n  INSERT INTO t VALUES ('x')", "/* ; */ SELECT 2",
    ]  # fmt: skip
    assert [part.analysis.verb for part in parts] == ["SELECT", "INSERT", "SELECT"]


@pytest.mark.parametrize("text", ["", " ", ";", " ; ;", "-- only a remark", "/* */"])
def test_a_text_without_a_statement_has_no_parts(text):
    assert Analyser().parts(text) == ()


def test_prepared_statements_of_sql_are_named():
    found = one("PREPARE s (int) AS DELETE FROM t WHERE a = $1")
    assert (found.verb, found.prepares, found.prepared_verb) == ("PREPARE", "s", "DELETE")
    assert found.tables == ("t",)
    assert one("EXECUTE s(1)").executes == "s"
    assert one("DEALLOCATE s").deallocates == "s"
    assert one('DEALLOCATE "all"').deallocates == "all"
    assert one("DEALLOCATE ALL").deallocates == ""
    assert one("DISCARD ALL").deallocates == ""
    assert one("DISCARD PLANS").deallocates is None


def test_a_fingerprint_does_not_depend_on_literals_and_does_on_the_rest():
    assert (
        one("SELECT * FROM t WHERE a = 1").fingerprint
        == one("select * from t where a=22").fingerprint
    )
    assert (
        one("SELECT * FROM t WHERE a = 1").fingerprint
        != one("SELECT * FROM u WHERE a = 1").fingerprint
    )


# -- caches

LITERALS = st.one_of(
    st.integers(-(10**12), 10**12).map(str),
    st.sampled_from(
        [
            "1.5",
            "1e5",
            ".5",
            "0x1F",
            "1_000",
            "007",
            "2147483648",
            "999999999",
            "1000000000",
            "''",
            "'a'",
            "'a''b'",
            "'--'",
            "'/*'",
            "';'",
            "'\"'",
            "'\"x\"'",
            "E'a'",
            "E'\\''",
            "'\\'",
            "b'01'",
            "b'2'",
            "x'ff'",
            "U&'\\0041'",
            "N'x'",
            "$$a$$",
            "$x$b$x$",
            "$1",
            "NULL",
            "true",
            "'a' 'b'",
            "'a'\n'b'",
            "'1'::int",
            "date '2024-01-01'",
            "interval '1 day'",
            "interval '1' day",
            "1::float(1)",
            "1::float(53)",
            "'1'::float(24)",
            "f(1)",
            '"1"',
            '"a-b"',
            "'x' ESCAPE 'y'",
            "1--1",
            "1 /* 2 */",
            "a1",
            "a.1",
            "1a",
            "ä1",
            "1ä",
            "a$1",
            "json '1'",
            "'{}'::json",
            "json_value('{}', '$.a')",
            "CAST(1 AS numeric(10,2))",
            "ARRAY[1,2]",
            "a[1]",
            "(SELECT 1)",
            "(SELECT x FROM u LIMIT 1)",
            "'x' IN ('y')",
            "extract('year' FROM now())",
            "1;",
            "1; SELECT 2",
            "1 FROM v",
            "'",
            '"',
            "\\",
            "\x01",
            "'\x01",
            "1)",
            "(1",
        ]
    ),
)
TEMPLATES = st.sampled_from([
    "SELECT {}", "SELECT {} FROM t", "SELECT * FROM t WHERE a = {} AND b = {}",
    "SELECT {}, {} LIMIT {}", "INSERT INTO t VALUES ({}, {})", "INSERT INTO t (a) SELECT {} FROM u",
    "UPDATE t SET a = {} WHERE b = {}", "DELETE FROM t WHERE a IN ({}, {})",
    "SELECT * FROM t ORDER BY {}", "SELECT {} AS x, y FROM s.t",
    "SELECT * FROM t LIMIT {} OFFSET {}", "WITH c AS (SELECT {}) SELECT * FROM c WHERE a LIKE {}",
    "SELECT {}; ", "  SELECT {}", "SELECT{}", "SELECT a{}", "EXPLAIN SELECT {}", "SELECT {} {}",
])  # fmt: skip


@st.composite
def families(draw):
    """Draw texts of one template."""
    template = draw(TEMPLATES)
    places = template.count("{}")
    return [
        template.format(*(draw(LITERALS) for _ in range(places)))
        for _ in range(draw(st.integers(2, 5)))
    ]


@LOOSE
@given(families())
def test_a_text_means_the_same_with_and_without_what_was_seen_before(texts):
    warm = Analyser()
    for text in texts:
        warm.parts(text)
    for text in texts:
        assert warm.parts(text) == Analyser().parts(text)
        alone = warm.single(text)
        assert alone is None or (alone,) == tuple(p.analysis for p in Analyser().parts(text))


@pytest.mark.parametrize("seen", ["SELECT 1", "SELECT 'a'", "SELECT 1 FROM t"])
@pytest.mark.parametrize(
    "text",
    ["SELECT 1; DROP TABLE t", "SELECT 'a'; DROP TABLE t", "SELECT '\\'; DROP TABLE t --'",
     "SELECT 1 --\n; DROP TABLE t", "SELECT 'a' -- '\n; DROP TABLE t",
     'SELECT "a\'b"; DROP TABLE t --\''],
)  # fmt: skip
def test_what_was_seen_before_hides_nothing(seen, text):
    analyser = Analyser()
    for _ in range(2):
        analyser.parts(seen)
    assert analyser.parts(text) == Analyser().parts(text)
    assert analyser.single(text) is None


def test_the_caches_are_bounded(monkeypatch):
    monkeypatch.setattr(sql, "_MOST_CACHE_CHARS", 20_000)
    analyser = Analyser()
    for number in range(300):
        analyser.parts(f"SELECT {'a' * (number % 50 + 1)}{number}x FROM t")
        held = sum(len(key) + 200 for key in (*analyser._single, *analyser._shapes))
        assert held <= 20_000


@LOOSE
@given(st.text(max_size=200))
def test_no_text_makes_it_fail(text):
    for part in Analyser().parts(text):
        assert 0 <= part.start <= part.end <= len(text.encode())


# -- texts that kill parsers

DEEP = [
    "SELECT " + "(" * n + "1" + ")" * n for n in (100, 2_000, 30_000)
] + [
    "SELECT " + "1+" * 30_000 + "1",
    "SELECT " + "- " * 30_000 + "1",
    "SELECT " + "NOT " * 15_000 + "true",
    "SELECT 1" + "::int" * 12_000,
    "SELECT a" + "[1]" * 20_000,
    "SELECT a" + ".b" * 30_000,
    "SELECT " + "a||" * 20_000 + "a",
    "SELECT true" + " AND true" * 7_000,
    "SELECT 1" + " UNION SELECT 1" * 4_000,
    "SELECT " + "(SELECT " * 7_000 + "1" + ")" * 7_000,
    "SELECT " + "CASE WHEN true THEN " * 3_000 + "1" + " END" * 3_000,
    "SELECT * FROM " + "(" * 30_000 + "t" + ")" * 30_000,
    "SELECT * FROM t" + " JOIN t ON true" * 4_000,
    "SELECT " + "f(" * 20_000 + "1" + ")" * 20_000,
    "SELECT 1" + " IS NULL" * 8_000,
    "SELECT x" + " COLLATE c" * 6_000,
    "EXPLAIN " * 8_000 + "SELECT 1",
    "SELECT '" + "'||'" * 15_000 + "'",
    'SELECT "' + '"."' * 20_000 + '"',
    "SELECT -- '\n" + "(" * 30_000,
    "SELECT $$" + "$$||$$" * 10_000 + "$$",
    "SELECT " + "@" * 60_000 + "1",
    ";" * 60_000,
    "SELECT " + "1," * 30_000 + "1",
    "INSERT INTO t VALUES " + ",".join(f"({n},'{n}')" for n in range(4_000)),
]  # fmt: skip
_CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from appliance.wire.sql import Analyser
texts = sys.stdin.read().split("\\0")
for text in texts:
    parts = Analyser().parts(text)
    print(len(parts), parts[0].analysis.verb if parts else "EMPTY", flush=True)
"""


def test_no_depth_of_nesting_ends_the_process():
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, "."], input="\0".join(DEEP), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    answers = done.stdout.splitlines()
    assert done.returncode == 0, f"died at {DEEP[len(answers)][:60]}..."
    assert len(answers) == len(DEEP)
    assert answers[0] == "1 SELECT"
    assert answers[2] == "1 unknown"
    assert answers[-2:] == ["1 SELECT", "1 INSERT"]
