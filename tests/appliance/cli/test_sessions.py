import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.cli.conversation import MOST_BYTES, MOST_LINES
from capture.frames import Kind, session_name
from capture.moment import rfc3339
from capture.records import (
    Alarm,
    Decision,
    Fact,
    Gap,
    Hidden,
    Operation,
    Refused,
    Result,
    Withheld,
)

HOSTILE = (
    "\x1b[2J\x1b]0;pwned\x07\rfake\nnarrows: fake line\u202egnp.exe\u200b\x9b31m\x7f\u2028\ufeff"
)
SESSION_KEYS = {
    "id", "service_account", "assurance", "owner", "client", "target", "protocol", "operations",
    "bytes_up", "bytes_down", "started", "ended", "state",
}  # fmt: skip


@pytest.fixture
def story(narrows):
    """A decoded session with everything in it, an opaque one, and one that runs."""
    with narrows.evidence.writer() as gate:
        decoded = gate.open(protocol="postgresql")
        gate.record(decoded, Fact("startup", {"parameters": {"user": "ci", "database": "shop"}}))
        gate.record(decoded, Fact("parameter", {"server_version": "15"}))
        gate.up(decoded, b"pw\0\0\0\0")
        gate.record(decoded, Hidden("client", 2, 4, "password", "00"))
        gate.select(decoded, 1, "select card_number\nfrom cards where id = $1", binds=(4711,))
        wrong = Result(2, "error", sqlstate="42P01", message='relation "x" does not exist')
        gate.ask(decoded, 2, "select 1 from x", wrong)
        gate.ask(decoded, 3, "drop table cards", verdict="denied")
        gate.record(decoded, Gap("session", "parser", count=1, detail="lost its place"))
        gate.record(decoded, Alarm("forged", {"why": "mac"}))
        gate.record(decoded, Withheld("client", 0, 8, "gssenc"))
        gate.record(decoded, Decision("uid:0(root)", "kill", "stop it", "done"))
        gate.close(decoded, 3, "killed", "gate")
        opaque = gate.open(account=None)
        gate.up(opaque, b"PING\r\n")
        gate.down(opaque, bytes(range(256)))
        gate.close(opaque)
        running = gate.open("backup")
        gate.up(running, b"half")
        gate.commit()
        yield decoded, opaque, running


# -- list


def test_a_list_is_an_array_of_session_objects_newest_first(narrows, story):
    answer = narrows("sessions", "list", "--json")
    assert answer.code == 0
    sessions = answer.json()
    assert [session["id"] for session in sessions] == [session_name(n) for n in story[::-1]]
    for session in sessions:
        assert session.keys() >= SESSION_KEYS
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", session["started"])
    running, opaque, decoded = sessions
    assert [s["state"] for s in sessions] == ["running", "closed", "closed"]
    assert (running["ended"], running["bytes_up"]) == (None, 4)
    assert opaque["service_account"] is None
    assert opaque["unknown_reason"] == "no-sensor"
    assert opaque["owner"] is None
    assert decoded["service_account"] == "ci-deployer"
    assert decoded["owner"]["exe"] == "/usr/bin/psql"
    assert decoded["client"] == f"192.0.2.10:{40000 + story[0] % 20000}"
    assert decoded["target"] == "198.51.100.10:5432"
    assert decoded["operations"] == 3
    assert decoded["counts"] == {
        "operations": 3, "errors": 1, "denied": 1, "hidden": 1, "gaps": 1, "alarms": 1,
    }  # fmt: skip


def test_a_list_for_a_person_has_a_line_for_each_session(narrows, story):
    answer = narrows("sessions", "list")
    lines = answer.out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("session ")
    for line, number in zip(lines[1:], story[::-1], strict=True):
        assert line.startswith(session_name(number))
    assert "unknown (no-sensor)" in lines[2]
    assert "/usr/bin/psql [4242]" in lines[3]


def test_a_list_with_nothing_in_it_is_an_empty_array(narrows):
    with narrows.evidence.writer():
        pass
    assert narrows("sessions", "list", "--json").json() == []
    assert narrows("sessions", "list").code == 0


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["-q", "card_number"], [0]),
        (["-q", "4711"], [0]),
        (["-q", '"does not exist"'], [0]),
        (["-q", "nowhere"], []),
        (["--account", "backup"], [2]),
        (["--unknown"], [1]),
        (["--state", "running"], [2]),
        (["--state", "closed"], [1, 0]),
        (["--state", "cut"], []),
        (["--limit", "1"], [2]),
        (["--limit", "0"], [2, 1, 0]),
        (["--since", "1h"], [2, 1, 0]),
        (["--since", "2099-01-01T00:00:00Z"], []),
        (["--until", "2099-01-01T00:00:00+02:00"], [2, 1, 0]),
        (["--until", "1h"], []),
        (["-q", "card_number", "--until", "1h"], []),
        (["-q", "card_number", "--account", "backup"], []),
    ],
)
def test_a_list_can_be_narrowed_down(narrows, story, words, wanted):
    found = narrows("sessions", "list", "--json", *words).json()
    assert [session["id"] for session in found] == [session_name(story[n]) for n in wanted]


def test_since_takes_the_very_time_that_a_list_shows(narrows, story):
    started = narrows("sessions", "list", "--json").json()[1]["started"]
    found = narrows("sessions", "list", "--json", "--since", started).json()
    assert len(found) == 2
    found = narrows("sessions", "list", "--json", "--until", started).json()
    assert len(found) == 1


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--since", "999999999d"], 3),
        (["--since", "0001-01-01T00:00:00Z"], 3),
        (["--since", "9999-12-31T23:59:59Z"], 0),
        (["--until", "9999-12-31T23:59:59Z"], 3),
        (["--limit", "9" * 30], 3),
        (["--account", "\udcff"], 0),
    ],
)
def test_a_list_takes_times_counts_and_names_that_no_index_holds(narrows, story, words, found):
    answer = narrows("sessions", "list", "--json", *words)
    assert (answer.code, answer.err) == (0, "")
    assert len(answer.json()) == found
    assert narrows("sessions", "list", *words).code == 0


def test_a_long_list_on_a_terminal_is_cut_and_says_so(narrows):
    with narrows.evidence.writer() as gate:
        for _ in range(120):
            gate.close(gate.open())
    answer = narrows("sessions", "list")
    assert len(answer.out.splitlines()) == 101
    assert answer.err == "narrows: only the newest 100; --limit 0 shows all\n"
    assert len(narrows("sessions", "list", "--json").json()) == 120
    assert len(narrows("sessions", "list", "--limit", "0").out.splitlines()) == 121


def test_a_running_session_is_listed_with_growing_bytes_while_no_seal_runs(narrows):
    with narrows.evidence.writer() as gate:
        session = gate.open()
        seen = []
        for _ in range(3):
            gate.up(session, b"x" * 10)
            gate.commit()
            [told] = narrows("sessions", "list", "--json").json()
            seen.append((told["state"], told["bytes_up"]))
        assert seen == [("running", 10), ("running", 20), ("running", 30)]


def test_sessions_of_a_gate_that_was_killed_are_cut(narrows, tmp_path):
    from test_index import kill_a_gate

    kill_a_gate(narrows.evidence, tmp_path)
    closed, cut = sorted(narrows("sessions", "list", "--json").json(), key=lambda s: s["id"])
    assert (closed["state"], cut["state"]) == ("closed", "cut")
    assert cut["ended"] is not None
    assert "cut after at most" in narrows("sessions", "show", cut["id"]).out


# -- show


def test_a_session_is_told_as_a_conversation(narrows, story):
    answer = narrows("sessions", "show", session_name(story[0]))
    assert answer.code == 0
    out = answer.out
    for part in (
        "account   ci-deployer  (kernel, by syn)",
        "process   /usr/bin/psql [4242] uid 1000 on narrows-client",
        'argv      ["psql", "-h", "db"]',
        "cgroup    /clients/ci-deployer/1",
        "protocol  postgresql, route everything",
        "killed by gate",
        "operations 3, errors 1, denied 1, gaps 1, alarms 1, hidden ranges 1",
        "startup       parameters={",
        "hidden        client's bytes 2 to 6: password",
        ">  1 SELECT        select card_number\\n\n",
        "|    from cards where id = $1\n",
        "|    $1 = 4711\n",
        "<  1 ok            SELECT 1, 1 rows, 15 bytes, 0.001 ms",
        '!  2 error         42P01: relation "x" does not exist',
        ">  3 DROP DENIED   drop table cards",
        "!    gap           parser count=1 detail=lost its place",
        "!    alarm         forged why=mac",
        "!    withheld      client's bytes 0 to 8: gssenc",
        "!    decision      kill by uid:0(root): stop it (done)",
        "close         killed by gate",
    ):
        assert part in out, part
    assert "server_version" not in out
    assert "server_version" in narrows("sessions", "show", session_name(story[0]), "--all").out
    dump = "00000000  70 77 00 00 00 00 "
    assert dump not in out, "bytes of a decoded protocol need --bytes"
    assert dump in narrows("sessions", "show", session_name(story[0]), "--bytes").out


def test_a_long_word_of_a_conversation_does_not_run_into_the_next(narrows):
    with narrows.evidence.writer() as gate:
        session = gate.open(protocol="postgresql")
        gate.record(session, Operation(1, "START_REPLICATION", "start_replication slot a", 0, 9))
        gate.record(session, Fact("authentication", {"method": "md5"}))
        gate.close(session)
    out = narrows("sessions", "show", session_name(session)).out
    assert " START_REPLICATION start_replication slot a\n" in out
    assert " authentication method=md5\n" in out


def test_show_as_json_is_the_session_object_with_its_records(narrows, story):
    listed = narrows("sessions", "list", "--json").json()[2]
    shown = narrows("sessions", "show", session_name(story[0]), "--json").json()
    assert shown["counts"].pop("operations") == listed.pop("operations") == 3
    del listed["counts"]["operations"]
    assert {key: shown[key] for key in listed} == listed
    raw = narrows("sessions", "show", session_name(story[0]), "--json").out
    assert raw.count('"operations":[') == 1
    first, second, third = shown["operations"]
    assert first["op"] == 1
    assert first["verb"] == "SELECT"
    assert first["text"] == "select card_number\nfrom cards where id = $1"
    assert first["binds"] == [4711]
    assert first["tables"] == []
    assert first["verdict"] == "allowed"
    assert first["result"]["status"] == "ok"
    assert first["result"]["tag"] == "SELECT 1"
    assert first["result"]["rows"] == 1
    assert first["result"]["duration_ns"] == 1000
    assert first["time"].endswith("Z")
    assert (second["result"]["sqlstate"], second["result"]["message"]) == (
        "42P01", 'relation "x" does not exist',
    )  # fmt: skip
    assert (third["verdict"], third["result"]) == ("denied", None)
    assert [gap["reason"] for gap in shown["gaps"]] == ["parser"]
    assert [alarm["kind"] for alarm in shown["alarms"]] == ["forged"]
    assert [fact["kind"] for fact in shown["facts"]] == ["startup", "parameter"]
    assert [hidden["kind"] for hidden in shown["hidden"]] == ["password"]
    assert [withheld["why"] for withheld in shown["withheld"]] == ["gssenc"]
    assert [decision["action"] for decision in shown["decisions"]] == ["kill"]


def test_bytes_of_an_opaque_session_are_shown_as_text_or_as_a_dump(narrows, story):
    out = narrows("sessions", "show", session_name(story[1])).out
    assert ">    6 bytes at 0\n" in out
    assert "|    PING\\r\\n\n" in out
    assert "<    256 bytes at 0\n" in out
    assert "00000040  40 41 42 43 44 45 46 47 48 49 4a 4b 4c 4d 4e 4f  @ABCDEFGHIJKLMNO\n" in out
    shown = narrows("sessions", "show", session_name(story[1]), "--json").json()
    assert shown["operations"] == []


def test_what_is_shown_is_bounded_and_all_lifts_the_bound(narrows):
    with narrows.evidence.writer() as gate:
        opaque = gate.open()
        gate.down(opaque, b"y" * 100_000)
        gate.close(opaque)
        decoded = gate.open(protocol="postgresql")
        for op in range(1, 600):
            gate.select(decoded, op, f"select {op}")
        gate.select(decoded, 600, "select\n" + "1,\n" * 100)
        gate.close(decoded, 600)
        gate.commit()
    out = narrows("sessions", "show", session_name(opaque)).out
    assert out.count("y") < MOST_BYTES + 100
    assert f"left out: 0 lines, {100_000 - MOST_BYTES} bytes; --all shows them" in out
    assert narrows("sessions", "show", session_name(opaque), "--all").out.count("y") >= 100_000
    out = narrows("sessions", "show", session_name(decoded)).out
    assert MOST_LINES <= len(out.splitlines()) < MOST_LINES + 20
    assert re.search(r"left out: \d+ lines, 0 bytes; --all shows them", out)
    out = narrows("sessions", "show", session_name(decoded), "--all").out
    assert "left out" not in out
    assert out.count("|    1,\\n\n") == 100


def test_the_beginning_of_an_id_is_enough_when_it_is_unique(narrows, story):
    first, second, third = map(session_name, story)
    assert first[:-1] == second[:-1] == third[:-1]
    ambiguous = narrows("sessions", "show", first[:-1])
    assert ambiguous.code == 2
    assert ambiguous.err.startswith("narrows: more than one session begins with ")
    missing = narrows("sessions", "show", "zzz")
    assert missing.code == 3
    assert missing.err == ("narrows: no session is called zzz (narrows sessions list shows them)\n")
    assert missing.out == ""
    assert narrows("sessions", "show", first.upper()).code == 0


# -- hostile peers


def written_by_peers(gate):
    """A session in which everything that a peer may choose is hostile."""
    session = gate.open(
        owner={"pid": 1, "uid": 0, "exe": HOSTILE, "argv": [HOSTILE], "cgroup": HOSTILE,
               "unit": HOSTILE, "host": HOSTILE, "container": HOSTILE},
        protocol="postgresql",
    )  # fmt: skip
    gate.select(session, 1, HOSTILE, binds=(HOSTILE, {HOSTILE: [HOSTILE]}))
    gate.record(session, Operation(2, HOSTILE, HOSTILE, 0, 1, (HOSTILE,), name=HOSTILE))
    error = Result(2, "error", HOSTILE, sqlstate=HOSTILE, message=HOSTILE, detail={HOSTILE: 1})
    gate.record(session, error)
    gate.record(session, Fact(HOSTILE, {HOSTILE: HOSTILE, "x": {HOSTILE: 1}}))
    gate.record(session, Fact("notice", {"message": HOSTILE}))
    gate.record(session, Gap("session", HOSTILE, detail=HOSTILE))
    gate.record(session, Alarm(HOSTILE, {HOSTILE: HOSTILE}))
    gate.record(session, Decision(HOSTILE, "kill", HOSTILE, HOSTILE))
    gate.record(session, Hidden("client", 0, 0, HOSTILE, "00"))
    gate.record(session, Withheld("client", 0, 0, HOSTILE))
    gate.writer.append(250, session, HOSTILE.encode(), time.time_ns())
    gate.up(session, HOSTILE.encode() + b"\xff\xfe" + b"a" * 100)
    gate.data(session, Kind.DOWN_OWN, HOSTILE.encode())
    gate.close(session, 2, HOSTILE)
    return session


def safe(text):
    assert text
    for line in text.split("\n"):
        assert line.isprintable() or not line, repr(line)
        assert not line.startswith(("narrows: fake", "fake"))


def test_nothing_that_a_peer_sent_reaches_the_terminal_as_it_is(narrows):
    with narrows.evidence.writer() as gate:
        name = session_name(written_by_peers(gate))
    for words in (
        ["list"], ["list", "--json"], ["show", name], ["show", name, "--all", "--bytes"],
        ["show", name, "--json"], ["export", name], ["export", "--all"],
    ):  # fmt: skip
        answer = narrows("sessions", *words)
        assert answer.code == 0, answer.err
        safe(answer.out)
        if "--json" not in words and words[0] != "list":
            assert "pwned" in answer.out, "it is there, escaped"
    for words in (["log"], ["log", "--json"]):
        safe(narrows("evidence", *words).out)


def test_words_of_the_command_line_are_escaped_in_errors_too(narrows):
    with narrows.evidence.writer():
        pass
    for words in (
        ["show", "\x1b[2J\n"], ["list", "-q", "\x1b\n-"], ["list", "--since", "\x1b\n"],
        ["list", "--limit", "\x1b"],
    ):  # fmt: skip
        answer = narrows("sessions", *words)
        assert answer.code in (2, 3)
        assert "\x1b" not in answer.err
        assert answer.out == ""


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    content=st.binary(max_size=200),
)
def test_any_text_and_any_bytes_are_shown_safely_and_whole(narrows, text, content):
    shutil.rmtree(narrows.evidence.store.state / "evidence")
    narrows.evidence.store.prepare()
    with narrows.evidence.writer() as gate:
        session = gate.open()
        gate.record(session, Operation(1, "unknown", text, 0, len(text)))
        gate.up(session, content)
        gate.close(session, 1)
    name = session_name(session)
    safe(narrows("sessions", "show", name, "--all").out)
    shown = narrows("sessions", "show", name, "--json")
    safe(shown.out)
    assert shown.json()["operations"][0]["text"] == text
    exported = narrows("sessions", "export", name)
    safe(exported.out)
    assert json.loads(exported.out.splitlines()[0])["query_info"]["query_string"] == text


# -- export


def test_an_export_has_a_line_for_each_operation_and_session(narrows, story):
    answer = narrows("sessions", "export", *map(session_name, story[:2]), "--format", "ndjson")
    assert answer.code == 0
    events = [json.loads(line) for line in answer.out.splitlines()]
    assert [event["class_uid"] for event in events] == [6005, 6005, 6005, 4001, 4001]
    assert events[1]["query_info"]["query_string"] == "select 1 from x"
    assert {event["unmapped"]["narrows"]["session"] for event in events} == {
        session_name(number) for number in story[:2]
    }


def test_all_exports_every_session_oldest_first_and_refused_connections(narrows, story):
    with narrows.evidence.writer("gate-1") as gate:
        reference = session_name(gate.writer.new_session())
        refused = Refused(
            "192.0.2.10", 4, "203.0.113.1", 22, "management", reference, "ci-deployer", "kernel",
            "syn", None, {"pid": 4711, "exe": "/usr/bin/ssh"},
        )  # fmt: skip
        gate.record(0, refused)
    narrows("sessions", "show", session_name(story[1]))
    events = [json.loads(line) for line in narrows("sessions", "export", "--all").out.splitlines()]
    whole = [event for event in events if event["class_uid"] == 4001]
    read = [event for event in events if event["class_uid"] == 6003]
    assert read[-1]["resources"] == [{"uid": session_name(story[1]), "type": "session"}]
    assert [event["metadata"]["uid"] for event in whole] == [
        *map(session_name, story), reference,
    ]  # fmt: skip
    assert whole[-1]["activity_name"] == "Refuse"
    assert whole[-1]["status_detail"] == "management"
    assert whole[-1]["dst_endpoint"] == {"ip": "203.0.113.1", "port": 22}
    assert whole[-1]["actor"]["user"]["name"] == "ci-deployer"
    assert whole[-1]["actor"]["process"]["pid"] == 4711


def test_an_export_can_go_into_a_folder(narrows, story, tmp_path):
    out = tmp_path / "a" / "b"
    answer = narrows("sessions", "export", "--all", "--output", str(out))
    assert (answer.code, answer.out) == (0, "")
    names = {f"{session_name(number)}.ndjson" for number in story} | {"records.ndjson"}
    assert {path.name for path in out.iterdir()} == names
    lines = (out / f"{session_name(story[0])}.ndjson").read_text().splitlines()
    assert len(lines) == 4


def test_a_raw_export_writes_what_both_sides_sent(narrows, story, tmp_path):
    out = tmp_path / "raw"
    names = [session_name(number) for number in story]
    answer = narrows("sessions", "export", *names, "--format", "raw", "--output", str(out))
    assert answer.code == 0
    assert (out / f"{names[1]}.up").read_bytes() == b"PING\r\n"
    assert (out / f"{names[1]}.down").read_bytes() == bytes(range(256))
    assert (out / f"{names[2]}.up").read_bytes() == b"half"
    assert f"{names[0]}.up: 4 bytes at 2 are zero: password" in answer.err
    assert {path.name for path in out.iterdir()} == {
        f"{name}.{side}" for name in names for side in ("up", "down")
    }


def test_raw_goes_into_the_working_folder_unless_told_otherwise(
    narrows, story, tmp_path, monkeypatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert narrows("sessions", "export", session_name(story[1]), "--format", "raw").code == 0
    assert len(list((tmp_path / "here").iterdir())) == 2


def test_a_capture_file_is_written_for_each_session_or_all_into_one(narrows, story, tmp_path):
    out = tmp_path / "captures"
    names = [session_name(number) for number in story[:2]]
    answer = narrows("sessions", "export", *names, "--format", "pcapng", "--output", str(out))
    assert (answer.code, answer.out, answer.err) == (0, "", "")
    files = sorted(out.iterdir())
    assert [file.name for file in files] == sorted(f"{name}.pcapng" for name in names)
    for file, name in zip(files, sorted(names), strict=True):
        content = file.read_bytes()
        assert content.startswith(b"\x0a\x0d\x0d\x0a")
        assert f"Narrows session {name}\n".encode() in content
        assert file.stat().st_mode & 0o777 == 0o600
    with (tmp_path / "all.pcapng").open("wb") as file:
        argv = [sys.executable, "-m", "appliance", "sessions", "export", "--all", "--format",
                "pcapng", "--output", "-", "--config", str(narrows.config)]  # fmt: skip
        subprocess.run(argv, stdout=file, check=True, timeout=60)
    whole = (tmp_path / "all.pcapng").read_bytes()
    assert all(whole.count(f"Narrows session {name}\n".encode()) == 2 for name in names)
    assert ("export", [names[0]], "allowed") in [
        (action, objects[:1], outcome) for action, objects, outcome in narrows.reads()
    ]


@pytest.mark.parametrize(
    "words", [[], ["--all", "0"], ["--all", "--format", "raw", "--output", "-"]]
)
def test_an_export_without_a_clear_meaning_is_a_usage_error(narrows, story, words):
    answer = narrows("sessions", "export", *words)
    assert answer.code == 2
    assert answer.err.startswith("narrows: ")
    assert len(answer.err.splitlines()) == 1


# -- law 8: reading evidence is evidence


def test_every_read_is_in_the_evidence(narrows, story):
    first, second, _ = map(session_name, story)
    narrows("sessions", "list")
    narrows("sessions", "list", "-q", "cards", "--json")
    narrows("sessions", "show", first)
    narrows("sessions", "show", "zzz")
    narrows("sessions", "export", first, second)
    narrows("sessions", "export", "--all")
    assert narrows.reads() == [
        ("list", [], "allowed"),
        ("search", [], "allowed"),
        ("show", [first], "allowed"),
        ("show", [], "not-found"),
        ("export", [first, second], "allowed"),
        ("export", list(map(session_name, story)), "allowed"),
        ("export", [], "allowed"),
    ]


def test_the_record_of_a_read_is_durable_before_the_first_byte_is_shown(narrows, story):
    """The reader of the pipe looks at the evidence while the command cannot go on printing."""
    argv = [sys.executable, "-m", "appliance", "sessions", "export", "--all"]
    with subprocess.Popen(
        [*argv, "--config", str(narrows.config)], stdout=subprocess.PIPE, bufsize=0
    ) as command:
        assert command.stdout.read(1)
        seen = [body for *_, kind, _, _, body in narrows.evidence.frames() if kind == 29]
        command.stdout.read()
    [record] = [json.loads(body) for body in seen[:1]]
    assert record["action"] == "export"
    assert record["objects"] == [session_name(number) for number in story]


def refuse_writes(narrows):
    """Make the state directory's segments folder impossible to write to, also for root."""
    segments = narrows.evidence.store.segments
    aside = segments.with_name("aside")
    segments.rename(aside)
    segments.write_bytes(b"")
    return segments, aside


def test_a_read_that_cannot_be_recorded_is_refused(narrows, story):
    segments, aside = refuse_writes(narrows)
    try:
        for words in (
            ["list"], ["list", "--json"], ["show", session_name(story[0])], ["export", "--all"],
        ):  # fmt: skip
            answer = narrows("sessions", *words)
            assert answer.code == 4
            assert answer.out == ""
            assert answer.err.startswith("narrows: the read cannot be recorded: ")
            assert len(answer.err.splitlines()) == 1
    finally:
        segments.unlink()
        aside.rename(segments)
    assert narrows("sessions", "list").code == 0


def test_an_appliance_without_evidence_says_so(narrows, tmp_path):
    narrows.config.write_text(f'[paths]\nstate = "{tmp_path}/none"\nrun = "{tmp_path}/run"\n')
    answer = narrows("sessions", "list")
    assert answer.code == 69
    assert answer.err.startswith("narrows: the evidence cannot be opened: ")
    assert not (tmp_path / "none").exists()


def test_a_configuration_that_is_not_there_is_exit_code_78(narrows, tmp_path):
    narrows.config.unlink()
    assert narrows("sessions", "list").code == 78


# -- damage and full disks


def test_a_damaged_segment_is_told_and_the_rest_is_shown(narrows):
    with narrows.evidence.writer() as gate:
        session = gate.open()
        gate.up(session, b"before\n")
        gate.commit()
        gate.up(session, b"lost\n")
        gate.commit()
        gate.up(session, b"after\n")
        gate.commit()
        narrows("sessions", "list")
        generation = narrows.evidence.store.generations()[0]
        path = narrows.evidence.store.segment(generation)
        offsets = [m.start() for m in re.finditer(b"NCMT", path.read_bytes())]
        with path.open("r+b") as file:
            file.seek(offsets[-2] + 70)
            file.write(os.urandom(4))
        answer = narrows("sessions", "show", session_name(session))
    assert answer.code == 1
    assert "before" in answer.out
    assert "after" in answer.out
    assert f"narrows: segment {generation:08x} at {offsets[-2]}: " in answer.err


def test_a_list_is_whole_while_the_index_cannot_be_written(narrows, story, monkeypatch):
    whole = narrows("sessions", "list", "--json").json()
    store = narrows.evidence.store
    for path in store.evidence.glob("index.sqlite*"):
        path.unlink()
    store.index.mkdir()
    answer = narrows("sessions", "list", "--json")
    assert answer.code == 0
    assert answer.json() == whole
    shown = narrows("sessions", "show", session_name(story[0]), "--json").json()
    assert len(shown["operations"]) == 3


def test_an_index_that_is_damaged_where_nobody_looked_is_one_line_with_what_to_do(narrows):
    with narrows.evidence.writer() as gate:
        for _ in range(200):
            gate.close(gate.open())
    with narrows.evidence.index() as index:
        index.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (root,) = index.db.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'session'"
        ).fetchone()
    with narrows.evidence.store.index.open("r+b") as file:
        file.seek((root - 1) * 4096)
        file.write(b"\xa5" * 4096)
    answer = narrows("sessions", "list")
    assert answer.code == 1
    assert answer.err.startswith("narrows: the index cannot be used: ")
    assert answer.err.endswith("(narrows evidence reindex makes it anew)\n")
    assert narrows("evidence", "reindex").code == 0
    assert len(narrows("sessions", "list", "--json").json()) == 200


def test_times_of_sessions_are_those_of_their_records(narrows, story):
    opened = [
        at for _, n, kind, at, *_ in narrows.evidence.frames() if kind == 16 and n == story[0]
    ]
    found = narrows("sessions", "list", "--json").json()[2]
    assert found["started"] == rfc3339(opened[0])
