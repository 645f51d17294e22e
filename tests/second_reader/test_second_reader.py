"""A reader that was written from docs/evidence-format.md alone, on the store of a real gate."""

import hmac
import shutil
import struct
from hashlib import sha256

import pytest
from real_store import (
    CROWD,
    CUT,
    HTTP,
    LAST_WORDS,
    LATE,
    MORE,
    NOBODY,
    OPEN,
    SECRET,
    copied,
    make_store,
)
from second_chunks import uncommitted
from second_frames import DOWN, OPERATION, UP, printed
from second_keys import key_file, segment_place
from second_ledger import Broken
from second_packs import CHUNK, parse
from second_store import read_store
from staging import Stage, own_place

pytestmark = pytest.mark.system
OPENED, RESULT, ACCESS = 16, 20, 29
EVENTS = {28: "Decision", ACCESS: "Access", 31: "Start", 32: "Stop", 33: "Recovered"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """What a gate recorded, sealed half in packs and half in segments."""
    stage = Stage(own_place())
    try:
        stage.up()
        return make_store(stage, tmp_path_factory.mktemp("store"))
    finally:
        stage.down()


@pytest.fixture(scope="module")
def evidence(store):
    """The same, as the second reader reads it."""
    return read_store(store.state)


@pytest.fixture
def copy(store, tmp_path):
    """A state directory that a test may spoil."""
    return shutil.copytree(store.state, tmp_path / "state", copy_function=copied)


def by_port(evidence):
    """The sessions with somebody by the port that their client wanted."""
    sessions = [session for number, session in evidence.sessions.items() if number]
    found = {session.of(OPENED)[0]["target_port"]: session for session in sessions}
    found.pop(NOBODY)
    return found


def blanked(data):
    """What a half-stream holds of bytes in which the gate hides a credential."""
    return data.replace(SECRET, bytes(len(SECRET)))


def generation_of(evidence, port):
    """The segment that holds the beginning of the session towards a port."""
    session = printed(by_port(evidence)[port].number)
    [leaf] = [x for x in evidence.ledger.of("session_open") if x["session"] == session]
    return leaf["generation"]


def flip(path, at):
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_every_byte_that_was_said_is_read_and_nothing_else(store, evidence):
    read = {
        port: (session.half_stream(UP), session.half_stream(DOWN))
        for port, session in by_port(evidence).items()
    }
    assert read == {port: (blanked(up), down) for port, (up, down) in store.said.items()}
    assert store.said[HTTP][0].count(SECRET) == 2


def test_both_kinds_of_storage_are_read(evidence):
    sources = {port: evidence.sources[generation_of(evidence, port)] for port in (CUT, HTTP, LATE)}
    assert sources == {CUT: "packs", HTTP: "packs", LATE: "segment"}
    assert not evidence.unreadable


def test_parts_of_many_chunks_and_of_both_methods_were_among_them(store):
    parts = [
        entry
        for path in (store.state / "evidence" / "sealed").glob("*.pack")
        for entry in parse(path.read_bytes(), path.name).parts
    ]
    assert {method for _, _, _, _, method, _ in parts} == {0, 1}
    assert max(length for _, _, length, *_ in parts) > 3 * CHUNK


def test_the_sessions_and_their_bytes_are_those_of_the_raw_export(store, evidence):
    for port, session in by_port(evidence).items():
        up, down = (store.raw / f"{printed(session.number)}.{way}" for way in ("up", "down"))
        assert up.read_bytes() == session.half_stream(UP), port
        assert down.read_bytes() == session.half_stream(DOWN), port
    assert {one["id"] for one in store.listed} == {printed(n) for n in evidence.sessions if n}
    assert len(store.listed) == len(store.said) + CROWD


def test_the_operations_are_those_of_the_export(store, evidence):
    exported = [
        (
            event["unmapped"]["narrows"]["session"], event["unmapped"]["narrows"]["op"],
            event["unmapped"]["narrows"]["verb"], event["query_info"]["query_string"],
            event["unmapped"]["narrows"]["result"]["tag"],
        )
        for event in store.events if event["class_uid"] == 6005
    ]  # fmt: skip
    read = [
        (printed(number), asked["op"], asked["verb"], asked["text"], result["tag"])
        for number, session in evidence.sessions.items()
        for asked, result in zip(session.of(OPERATION), session.of(RESULT), strict=True)
    ]
    assert read == exported
    assert [line[3] for line in read] == ["GET /one HTTP/1.1", "GET /two HTTP/1.1"]


def test_the_other_records_are_those_of_the_export(store, evidence):
    exported = [
        {"ns": event["metadata"]["uid"].rpartition("-")[2]} | event["unmapped"]["narrows"]
        for event in store.events
        if event["unmapped"]["narrows"].get("record") in EVENTS.values()
    ]
    frames = [frame for frame in evidence.sessions[0].frames if frame.kind in EVENTS]
    writer, *_ = [  # of the first export, as ndjson; the raw one came later
        frame.incarnation
        for frame in sorted(frames, key=lambda frame: frame.time)
        if frame.kind == ACCESS and frame.record["action"] == "export"
    ]
    begun = min(frame.time for frame in frames if frame.incarnation == writer)
    before = [
        {"ns": str(frame.time), "session": None, "record": EVENTS[frame.kind]} | frame.record
        for frame in sorted(frames, key=lambda frame: frame.time)
        if frame.time < begun
    ]
    assert [record for record in exported if int(record["ns"]) < begun] == before
    assert {record["record"] for record in before} == {"Access", "Start", "Stop", "Recovered"}


def test_the_cut_session_has_no_close_and_the_running_one_no_leaf_of_an_end(evidence):
    sessions = by_port(evidence)
    assert [port for port, session in sessions.items() if not session.of(30)] == [CUT, OPEN]
    ends = {leaf["session"]: leaf for leaf in evidence.ledger.of("session_close")}
    assert len(ends) == len(sessions) - 1 + CROWD
    assert printed(sessions[OPEN].number) not in ends
    cut = ends[printed(sessions[CUT].number)]
    assert (cut["reason"], cut["by"], cut["declared"]) == ("cut", "recovery", [0, 0, 0])


def test_the_digest_of_hidden_bytes_is_that_of_the_credential(store, evidence):
    session = by_port(evidence)[HTTP]
    key = sha256(b"narrows hidden bytes\0" + key_file(store.state / "digest.key")).digest()
    said = store.said[HTTP][0]
    first = said.index(SECRET)
    wanted = []
    for offset in (first, said.index(SECRET, first + 1)):
        message = struct.pack("<QQ", session.number, offset) + b"client\0" + SECRET
        digest = hmac.new(key, message, sha256).hexdigest()[:32]
        wanted.append((offset, len(SECRET), digest))
    assert session.hidden("client") == wanted


def test_of_a_store_with_a_damaged_commit_everything_else_is_read(store, evidence):
    left = read_store(store.hurt)
    [leaf] = left.ledger.of("damaged")
    generation = generation_of(evidence, OPEN)
    assert (leaf["generation"], leaf["reason"]) == (generation, "commit")
    sealed = sum(
        x["commits"] for x in evidence.ledger.of("segment") if x["generation"] == generation
    )
    assert left.unreadable == {(generation, sealed)}
    for number, session in evidence.sessions.items():
        assert [frame for frame in left.sessions[number].frames if frame in session.frames] == (
            session.frames
        )
    read = by_port(left)[OPEN].half_stream(UP)
    assert len(read) == len(store.said[OPEN][0] + b"".join(MORE))
    assert read.endswith(MORE[-1])


def test_what_a_killed_worker_had_not_committed_is_read_from_its_memory(store, evidence):
    number = by_port(evidence)[OPEN].number
    writer = number >> 40
    ends = [x["position"] for x in evidence.ledger.of("segment") if x["incarnation"] == writer]
    frames = uncommitted(store.memory / f"{writer:08x}", ends[-1])
    said = [(f.kind, f.payload) for f in frames if f.session == number]
    assert said == [(UP, data) for data in (*MORE, LAST_WORDS)]


@pytest.mark.parametrize("place", [0.0, 0.02, 0.5, 0.999999])
def test_a_flipped_bit_of_a_pack_is_noticed(copy, evidence, place):
    name = f"{generation_of(evidence, HTTP):08x}.00000000.pack"
    path = copy / "evidence" / "sealed" / name
    flip(path, int(path.stat().st_size * place))
    with pytest.raises(Broken, match=name):
        read_store(copy)


def test_a_flipped_bit_of_a_segment_is_noticed(copy, evidence):
    generation = generation_of(evidence, LATE)
    path = copy / "evidence" / "segments" / f"{generation:08x}.seg"
    ends = [x["end"] for x in evidence.ledger.of("segment") if x["generation"] == generation]
    for at in (0, 300, 4096 + 40, 4096 + 100, ends[-1] - 1):
        flip(path, at)
        with pytest.raises(Broken, match="segment"):
            read_store(copy)
        flip(path, at)
    read_store(copy)


@pytest.mark.parametrize("tile", ["entries/000", "entries/001.p", "0/000", "0/001.p", "1/000.p"])
def test_a_flipped_bit_of_a_tile_is_noticed(copy, evidence, tile):
    full, rest = divmod(len(evidence.ledger.leaves), 256)
    assert full == 1
    width = {"entries/001.p": f"/{rest}", "0/001.p": f"/{rest}", "1/000.p": "/1"}.get(tile, "")
    flip(copy / "evidence" / "ledger" / "tile" / f"{tile}{width}", 20)
    with pytest.raises(Broken, match=r"leaves|tile"):
        read_store(copy)


def test_another_checkpoint_is_noticed(copy):
    path = copy / "evidence" / "ledger" / "checkpoint"
    lines = path.read_text("utf-8").splitlines(keepends=True)
    lines[1] = f"{int(lines[1]) - 1}\n"
    path.write_text("".join(lines), "utf-8")
    with pytest.raises(Broken, match="signature"):
        read_store(copy)


def test_a_session_whose_key_was_destroyed_is_gone_and_everything_else_is_read(copy, evidence):
    gone = by_port(evidence)[HTTP].number
    keys = copy / "evidence" / "keys"
    holding = {generation_of(evidence, HTTP)}
    slots = [(f"{gone >> 40:08x}", gone & (1 << 40) - 1)]
    for name, number in slots + [segment_place(generation) for generation in holding]:
        with (keys / name).open("r+b") as file:
            file.seek(64 * number)
            file.write(bytes(64))
    left = read_store(copy)
    assert gone not in left.sessions
    assert {generation for generation, _ in left.unreadable} == holding
    assert left.sessions.keys() == evidence.sessions.keys() - {gone}
    for number, session in left.sessions.items():
        assert session.frames == evidence.sessions[number].frames
