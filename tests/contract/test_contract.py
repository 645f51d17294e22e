"""What every protocol promises the driver (`appliance.sansio`), tried on recorded sessions."""

import random
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from replay import Replay, run
from transcript import all_transcripts

from appliance.protocols import discover
from appliance.sansio import CLIENT, UPSTREAM, Answer, ProtocolError
from capture.records import Withheld

PROTOCOLS = discover()
TRANSCRIPTS = all_transcripts()
NAMES = [f"{transcript.protocol}/{transcript.name}" for transcript in TRANSCRIPTS]
LOOSE = settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow])
MOST_KEPT_BYTES = 1024 * 1024

each_transcript = pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=NAMES)


def pieces_of(data, generator, longest=40):
    """Yield `data` cut at random."""
    while data:
        length = generator.randint(1, longest)
        yield data[:length]
        data = data[length:]


def outcome(replay):
    """Return what must not depend on how bytes were cut."""
    return (
        replay.records, replay.relayed, replay.own, replay.hidden, replay.captured, replay.closed,
        str(replay.failed),
    )  # fmt: skip


def test_every_protocol_was_recorded():
    assert {transcript.protocol for transcript in TRANSCRIPTS} == set(PROTOCOLS)


@each_transcript
def test_what_comes_byte_by_byte_has_the_same_effects(transcript):
    whole = run(transcript)
    assert whole.failed is None
    bytewise = run(transcript, lambda data: [data[at : at + 1] for at in range(len(data))])
    assert outcome(bytewise) == outcome(whole)


@each_transcript
def test_what_comes_in_random_pieces_has_the_same_effects(transcript):
    whole = run(transcript)
    for seed in range(10):
        generator = random.Random(seed)
        cut = run(transcript, lambda data, generator=generator: pieces_of(data, generator))
        assert outcome(cut) == outcome(whole), seed


@each_transcript
def test_bytes_are_relayed_unchanged(transcript):
    replay = run(transcript)
    for side in (CLIENT, UPSTREAM):
        expected = bytearray(transcript.sent(side))
        for withheld in reversed(replay.of(Withheld)):
            if withheld.side == side.value:
                del expected[withheld.offset : withheld.offset + withheld.length]
        assert replay.relayed[side] == expected


@each_transcript
def test_no_operation_leaves_before_its_record(transcript):
    for cut in (None, lambda data: [data[at : at + 1] for at in range(len(data))]):
        assert run(transcript, cut).untold == []


@each_transcript
def test_hidden_bytes_are_all_that_the_evidence_lacks(transcript):
    replay = run(transcript)
    for side in (CLIENT, UPSTREAM):
        expected = bytearray(transcript.sent(side))
        for hidden, offset, length, _ in replay.hidden:
            if hidden is side:
                expected[offset : offset + length] = bytes(length)
        assert replay.captured[side] == expected
        for secret in transcript.secrets:
            assert secret not in replay.captured[side]
            assert all(secret.decode("latin-1") not in repr(record) for record in replay.records)


@each_transcript
def test_a_refusal_is_native_at_every_point(transcript, native):
    for end in range(len(transcript.pieces)):
        replay = Replay(PROTOCOLS[transcript.protocol])
        for side, data in transcript.pieces[: end + 1]:
            replay.feed(side, data)
        replay.refuse("refused (reference 0123456789abc)")
        assert replay.closed == {CLIENT, UPSTREAM}
        assert not replay.own[UPSTREAM]
        native[transcript.protocol](replay, transcript.pieces[: end + 1])


@each_transcript
def test_a_refusal_inside_a_message_does_not_break_it(transcript, native):
    generator = random.Random(transcript.name)
    for _ in range(20):
        replay = Replay(PROTOCOLS[transcript.protocol])
        end = generator.randrange(len(transcript.pieces))
        for side, data in transcript.pieces[:end]:
            replay.feed(side, data)
        side, data = transcript.pieces[end]
        cut = (data or b"")[: generator.randrange(len(data or b"-"))]
        if cut:
            replay.feed(side, cut)
        replay.refuse("refused (reference 0123456789abc)")
        assert replay.closed == {CLIENT, UPSTREAM}
        native[transcript.protocol](replay, [*transcript.pieces[:end], (side, cut)])


@LOOSE
@given(data=st.data())
def test_junk_raises_only_protocol_errors(data):
    transcript = data.draw(st.sampled_from(TRANSCRIPTS))
    replay = Replay(PROTOCOLS[transcript.protocol])
    end = data.draw(st.integers(0, len(transcript.pieces)))
    for side, piece in transcript.pieces[:end]:
        replay.feed(side, piece)
    for _ in range(data.draw(st.integers(1, 4))):
        side = data.draw(st.sampled_from((CLIENT, UPSTREAM)))
        replay.feed(side, data.draw(st.binary(min_size=1, max_size=200)))
    assert replay.failed is None or isinstance(replay.failed, ProtocolError)
    replay.refuse("refused")


@LOOSE
@given(data=st.data())
def test_mutated_transcripts_raise_only_protocol_errors(data):
    transcript = data.draw(st.sampled_from(TRANSCRIPTS))
    replay = Replay(PROTOCOLS[transcript.protocol])
    number = data.draw(st.integers(0, len(transcript.pieces) - 1))
    for at, (side, piece) in enumerate(transcript.pieces):
        changed = piece
        if at >= number and piece:
            changed = bytearray(piece)
            for _ in range(data.draw(st.integers(0, 3))):
                place = data.draw(st.integers(0, len(changed) - 1))
                changed[place] = data.draw(st.integers(0, 255))
        replay.feed(side, changed if changed is None else bytes(changed))
    assert replay.failed is None or isinstance(replay.failed, ProtocolError)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_probes_know_their_own_and_nobody_else(name):
    protocol = PROTOCOLS[name]
    for transcript in TRANSCRIPTS:
        if transcript.pieces[0].side is not CLIENT:
            continue
        prefix = transcript.prefix
        answers = [protocol.probe(prefix[:length]) for length in range(len(prefix) + 1)]
        decided = [answer for answer in answers if answer is not Answer.MORE]
        expected = Answer.YES if transcript.protocol == name != "opaque" else Answer.NO
        assert set(decided) == {expected}, transcript.name
        assert answers[-1] is expected, transcript.name


@each_transcript
@pytest.mark.parametrize("fill", [b"\0", b"\xff", None], ids=["zeros", "ones", "the last bytes"])
def test_what_a_layer_keeps_is_bounded(transcript, fill):
    for side in (CLIENT, UPSTREAM):
        replay = Replay(PROTOCOLS[transcript.protocol], keep=False)
        for sender, data in transcript.pieces[:-2]:
            replay.feed(sender, data)
        junk = (fill or transcript.sent(side)[-37:] or b"x") * 65536
        tracemalloc.start()
        for _ in range(0, 4 << 20, 65536):
            replay.feed(side, junk[:65536])
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert kept < MOST_KEPT_BYTES
