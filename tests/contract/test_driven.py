"""Recorded sessions through the real driver into real segments."""

import random

import pytest
from driven import Gate, half_stream, records
from replay import run
from transcript import all_transcripts

from appliance.sansio import CLIENT, UPSTREAM
from capture.frames import Kind
from capture.records import Fact, Hidden, Operation, Result, Withheld

TRANSCRIPTS = all_transcripts()
NAMES = [f"{transcript.protocol}/{transcript.name}" for transcript in TRANSCRIPTS]
PORTS = {"opaque": 9, "http1": 80, "postgresql": 5432, "tls": 443}


def play(gate, transcript, cut=None):
    talk = gate.connect(PORTS[transcript.protocol])
    heard = {CLIENT: b"", UPSTREAM: b""}
    for side, data in transcript.pieces:
        for part in cut(data) if cut and data else (data,):
            talk.say(side, part)
        for end in heard:
            heard[end] += talk.heard(end)
    gate.step(lambda: not (talk.session.up.unsent or talk.session.down.unsent))
    for end in heard:
        heard[end] += talk.heard(end)
    return talk, heard


def blanked(transcript, side, found):
    expected = bytearray(transcript.sent(side))
    for record in found:
        if record["record"] == "Hidden" and record["side"] == side.value:
            start, length = record["offset"], record["length"]
            expected[start : start + length] = bytes(length)
    return bytes(expected)


def withheld(data, side, found):
    kept = bytearray(data)
    for record in reversed(found):
        if record["record"] == "Withheld" and record["side"] == side.value:
            del kept[record["offset"] : record["offset"] + record["length"]]
    return bytes(kept)


def cuts(seed):
    generator = random.Random(seed)

    def cut(data):
        while data:
            length = generator.randint(1, max(1, len(data) // 3))
            yield data[:length]
            data = data[length:]

    return cut


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """Return what both ends heard of each transcript, whole and cut, and the gate's evidence."""
    gate = Gate(tmp_path_factory.mktemp("gate"))
    heard = {}
    for transcript in TRANSCRIPTS:
        for way, cut in (("whole", None), ("cut", cuts(1))):
            talk, said = play(gate, transcript, cut)
            talk.hang_up()
            heard[transcript.name, way] = talk.session, said
    return heard, gate.close()


@pytest.mark.parametrize("way", ["whole", "cut"])
@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=NAMES)
def test_the_driver_relays_everything_and_records_no_secret(played, transcript, way):
    said, frames = played
    session, heard = said[transcript.name, way]
    number = session.number
    found = records(frames, number)
    server_first = transcript.pieces[0].side is UPSTREAM
    assert session.protocol == transcript.protocol or server_first
    assert heard[UPSTREAM] == withheld(transcript.sent(CLIENT), CLIENT, found)
    assert heard[CLIENT] == half_stream(frames, number, Kind.DOWN_OWN) + transcript.sent(UPSTREAM)
    assert half_stream(frames, number, Kind.UP) == blanked(transcript, CLIENT, found)
    assert half_stream(frames, number, Kind.DOWN) == blanked(transcript, UPSTREAM, found)
    everything = b"".join(payload for *_, payload in frames)
    for secret in transcript.secrets:
        assert secret not in everything
    assert found[-1]["record"] == "SessionClose"


@pytest.mark.parametrize("way", ["whole", "cut"])
@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=NAMES)
def test_the_driver_writes_the_records_that_the_layer_makes(played, transcript, way):
    expected = [
        type(record).__name__
        for record in run(transcript).records
        if isinstance(record, Operation | Result | Fact | Withheld)
    ]
    said, frames = played
    found = records(frames, said[transcript.name, way][0].number)
    names = {kind.__name__ for kind in (Operation, Result, Fact, Withheld)}
    assert [record["record"] for record in found if record["record"] in names] == expected
    digests = [record for record in found if record["record"] == Hidden.__name__]
    assert all(len(r["digest"]) == (32 if r["length"] >= 8 else 0) for r in digests)
