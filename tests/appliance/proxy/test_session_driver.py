"""What the session driver does with a layer's word, and when a layer, the memory or the identity
fails: real sockets, the real worker and writer; only the layers are made for the test.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "contract"))

from driven import Gate, half_stream, records

from appliance.config import Attribution
from appliance.proxy import outage
from appliance.proxy.session import MOST_OWN_BYTES, Session
from appliance.sansio import (
    BOTH,
    CLIENT,
    FOREVER,
    NEITHER,
    ONLY_CLIENT,
    ONLY_UPSTREAM,
    UPSTREAM,
    Audit,
    Close,
    Data,
    Elapsed,
    Eof,
    Forward,
    Hide,
    Origin,
    ProtocolError,
    Relay,
    SetTimer,
)
from capture.errors import EvidenceError
from capture.frames import Kind
from capture.records import Alarm, Attributed, Fact


class Plain:
    """Forwards everything; what a test changes, it overrides."""

    reading = BOTH
    sensitive = NEITHER
    passive = NEITHER

    def __init__(self):
        self.events = []

    def handle(self, event):
        self.events.append(event)
        if isinstance(event, Data):
            return self.data(event)
        return []

    def data(self, event):
        return [Forward(UPSTREAM if event.side is CLIENT else CLIENT, bytes(event.data))]

    def refuse(self, message):
        said = b"refused: " + message.encode()
        return [Forward(CLIENT, said, Origin.SYNTHESISED), Close(CLIENT, message),
                Close(UPSTREAM, message)]  # fmt: skip

    def held(self, side):
        return b""


@pytest.fixture
def gate(tmp_path):
    made = Gate(tmp_path)
    made.talks = []
    yield made
    for talk in made.talks:
        talk.hang_up()
    if not made.loop.is_closed():
        made.close()


def converse(gate, layer):
    """Return a conversation that this layer has, and the layer."""
    talk = converse_on(gate, layer)
    gate.talks.append(talk)
    return talk


def converse_on(gate, layer):
    """As `converse`, on a gate whose ends are the test's business."""
    talk = gate.connect()
    talk.session.prefix = None
    talk.session.protocol = "test"
    talk.session.layer = layer
    talk.session.interest()
    return talk


def turn(gate):
    """Let the loop look at its sockets."""
    turns = []
    gate.loop.call_later(0.002, turns.append, 1)
    gate.step(lambda: turns)


def hear(talk, side, length):
    """Return what arrives at a side, as soon as it is so many bytes."""
    found = bytearray()

    def enough():
        found.extend(talk.heard(side))
        return len(found) >= length

    talk.gate.step(enough)
    return bytes(found)


def finished(gate, talk):
    """Close everything; return the session's frames and records."""
    talk.hang_up()
    gate.step(lambda: talk.session.closed)
    frames = gate.close()
    return frames, records(frames, talk.session.number)


def names(found):
    return [record["record"] for record in found]


# -- what a layer says


@pytest.mark.parametrize(("port", "protocol"), [(5432, "postgresql"), (5999, "opaque")])
def test_a_pause_in_the_first_message_is_no_way_around_a_protocol_on_its_own_port(
    gate, port, protocol
):
    talk = gate.connect(port)
    gate.talks.append(talk)
    start = b"\0\3\0\0user\0joe\0\0"
    start = (len(start) + 4).to_bytes(4, "big") + start
    talk.say(CLIENT, start[:6])
    paused = []
    gate.loop.call_later(2 * gate.config.gate.detect_ms / 1000, paused.append, 1)
    gate.step(lambda: paused)
    talk.say(CLIENT, start[6:])
    assert hear(talk, UPSTREAM, len(start)) == start
    assert talk.session.protocol == protocol


def test_a_record_of_a_request_comes_before_the_request_leaves(gate):
    class Recording(Plain):
        def data(self, event):
            assert gate.worker.writer.position == position[0]
            return [Audit(Fact("heard", {})), *super().data(event)]

    talk = converse(gate, Recording())
    position = [gate.worker.writer.position + 32 + 8]
    talk.say(CLIENT, b"question")
    assert hear(talk, UPSTREAM, 8) == b"question"
    frames, found = finished(gate, talk)
    order = [kind for kind, number, *_ in frames if number == talk.session.number]
    assert order.index(Kind.UP) < order.index(21)
    assert names(found)[-1] == "SessionClose"


def test_relay_passes_so_many_bytes_and_then_asks_the_layer_again(gate):
    class Counting(Plain):
        def data(self, event):
            return [*super().data(event), Relay(CLIENT, 10)]

    layer = Counting()
    talk = converse(gate, layer)
    talk.say(CLIENT, b"first")
    talk.say(CLIENT, b"0123456789second")
    assert hear(talk, UPSTREAM, 21) == b"first0123456789second"
    heard = [(bytes(e.data), e.offset) for e in layer.events]
    assert [data for data, _ in heard] == [b"first", b"second"]
    assert [offset for _, offset in heard] == [0, 15]


def test_relay_for_ever_asks_the_layer_no_more(gate):
    class Leaving(Plain):
        def data(self, event):
            return [*super().data(event), Relay(CLIENT, FOREVER), Relay(UPSTREAM, FOREVER)]

    layer = Leaving()
    talk = converse(gate, layer)
    for number in range(5):
        talk.say(CLIENT, b"up%d" % number)
        talk.say(UPSTREAM, b"down%d" % number)
    assert hear(talk, UPSTREAM, 15) == b"up0up1up2up3up4"
    assert hear(talk, CLIENT, 25) == b"down0down1down2down3down4"
    assert len(layer.events) == 1
    frames, _ = finished(gate, talk)
    assert half_stream(frames, talk.session.number, Kind.UP) == b"up0up1up2up3up4"


def test_a_side_that_is_not_to_be_read_waits(gate):
    class Turns(Plain):
        reading = ONLY_CLIENT

        def data(self, event):
            self.reading = ONLY_UPSTREAM if event.side is CLIENT else ONLY_CLIENT
            return super().data(event)

    layer = Turns()
    talk = converse(gate, layer)
    talk.server.sendall(b"too early")
    time.sleep(0.05)
    turn(gate)
    assert not layer.events
    talk.say(CLIENT, b"go on")
    assert hear(talk, CLIENT, 9) == b"too early"
    assert [event.side for event in layer.events] == [CLIENT, UPSTREAM]


def test_a_passive_side_is_forwarded_before_it_is_decoded(gate):
    class Looking(Plain):
        passive = ONLY_UPSTREAM

        def data(self, event):
            if event.side is CLIENT:
                return super().data(event)
            arrived.append(talk.heard(CLIENT))
            return []

    arrived = []
    talk = converse(gate, Looking())
    talk.say(UPSTREAM, b"answer")
    assert arrived == [b"answer"]


def test_timers_go_off_once_and_the_last_setting_counts(gate):
    class Timed(Plain):
        def data(self, event):
            return [SetTimer("slow", 60), SetTimer("quick", 60), SetTimer("quick", 0.01)]

        def handle(self, event):
            if isinstance(event, Elapsed):
                self.events.append(event)
                return [Forward(CLIENT, b"time", Origin.SYNTHESISED)]
            return super().handle(event)

    layer = Timed()
    talk = converse(gate, layer)
    talk.say(CLIENT, b"x")
    assert hear(talk, CLIENT, 4) == b"time"
    assert [event.timer for event in layer.events if isinstance(event, Elapsed)] == ["quick"]
    frames, _ = finished(gate, talk)
    assert half_stream(frames, talk.session.number, Kind.DOWN_OWN) == b"time"


def test_own_answers_that_nobody_reads_stop_the_questions(gate):
    class Chatty(Plain):
        def data(self, event):
            return [Forward(CLIENT, b"x" * 50_000, Origin.SYNTHESISED)]

    layer = Chatty()
    talk = converse(gate, layer)
    for _ in range(30):
        talk.client.sendall(b"?")
        turn(gate)
    assert not talk.session.up.reading
    most = MOST_OWN_BYTES + 50_000 * 2
    assert MOST_OWN_BYTES < talk.session.down.unsent_bytes <= most
    answered = sum(len(event.data) for event in layer.events)
    hear(talk, CLIENT, 50_000 * answered)
    gate.step(lambda: talk.session.up.reading)


# -- credentials


class Secretive(Plain):
    sensitive = ONLY_CLIENT

    def data(self, event):
        at = bytes(event.data).find(b"a secret")
        hide = [Hide(CLIENT, event.offset + at, 8, "password")] if at >= 0 else []
        return [*hide, *super().data(event)]


def test_what_a_layer_hides_arrives_and_is_recorded_blank(gate):
    talk = converse(gate, Secretive())
    talk.say(CLIENT, b"user; ")
    talk.say(CLIENT, b"say a secret!")
    assert hear(talk, UPSTREAM, 19) == b"user; say a secret!"
    frames, found = finished(gate, talk)
    assert half_stream(frames, talk.session.number, Kind.UP) == b"user; say " + bytes(8) + b"!"
    (hidden,) = [record for record in found if record["record"] == "Hidden"]
    assert (hidden["offset"], hidden["length"], hidden["kind"]) == (10, 8, "password")
    expected = gate.keys.hidden(talk.session.number, "client", 10, b"a secret")
    assert hidden["digest"] == expected
    assert not any(b"secret" in payload for *_, payload in frames)


@pytest.mark.parametrize("wrong", [ProtocolError(CLIENT, "nonsense"), ZeroDivisionError()])
def test_what_a_layer_cannot_read_among_credentials_is_recorded_blank_and_goes_nowhere(gate, wrong):
    class Failing(Secretive):
        def data(self, event):
            raise wrong

    talk = converse(gate, Failing())
    talk.say(CLIENT, b"it is secret")
    assert hear(talk, CLIENT, 8).startswith(b"refused:")
    assert talk.heard(UPSTREAM) == b""
    frames, found = finished(gate, talk)
    assert half_stream(frames, talk.session.number, Kind.UP) == bytes(12)
    assert "Gap" in names(found)
    assert found[-1]["reason"] == "protocol"


# -- layers that fail


def test_a_bug_in_a_layer_loses_its_meaning_and_no_byte(gate):
    class Buggy(Plain):
        def __init__(self):
            super().__init__()
            self.kept = b""

        def data(self, event):
            self.kept += bytes(event.data)
            if b"!" in self.kept:
                raise ZeroDivisionError
            return []

        def held(self, side):
            return self.kept if side is CLIENT else b""

    talk = converse(gate, Buggy())
    talk.say(CLIENT, b"held back, ")
    talk.say(CLIENT, b"then a bug!")
    assert hear(talk, UPSTREAM, 22) == b"held back, then a bug!"
    talk.say(CLIENT, b" and on")
    talk.say(UPSTREAM, b"answer")
    assert hear(talk, UPSTREAM, 7) == b" and on"
    assert hear(talk, CLIENT, 6) == b"answer"
    frames, found = finished(gate, talk)
    (gap,) = [record for record in found if record["record"] == "Gap"]
    assert gap["reason"] == "parser"
    up = half_stream(frames, talk.session.number, Kind.UP)
    assert up == b"held back, then a bug! and on"


def test_a_bug_in_decoding_a_passive_side_sends_nothing_twice(gate):
    class Buggy(Plain):
        passive = ONLY_UPSTREAM

        def data(self, event):
            if event.side is UPSTREAM:
                raise ZeroDivisionError
            return super().data(event)

    talk = converse(gate, Buggy())
    talk.say(UPSTREAM, b"once")
    talk.say(UPSTREAM, b", and on")
    assert hear(talk, CLIENT, 12) == b"once, and on"


def test_a_bug_at_a_timer_or_at_an_end_does_not_cut_the_session(gate):
    class Buggy(Plain):
        def handle(self, event):
            if isinstance(event, (Elapsed, Eof)):
                raise ZeroDivisionError
            return [SetTimer("t", 0.01), *super().handle(event)]

    talk = converse(gate, Buggy())
    talk.say(CLIENT, b"question")
    gate.step(lambda: talk.session.layer is gate.worker.opaque)
    talk.say(CLIENT, None)
    talk.say(UPSTREAM, b"answer")
    assert hear(talk, CLIENT, 6) == b"answer"


def test_a_peer_that_breaks_the_protocol_is_refused_after_what_came_before(gate):
    class Strict(Plain):
        def data(self, event):
            good = bytes(event.data).partition(b"!")[0]
            done = [Audit(Fact("good", {"length": len(good)})), Forward(UPSTREAM, good)]
            raise ProtocolError(CLIENT, "an exclamation mark", done)

    talk = converse(gate, Strict())
    talk.say(CLIENT, b"fine!bad")
    assert hear(talk, UPSTREAM, 4) == b"fine"
    assert b"an exclamation mark" in hear(talk, CLIENT, 20)
    frames, found = finished(gate, talk)
    assert names(found)[2:] == ["Fact", "Gap", "SessionClose"]
    assert found[-1]["reason"] == "protocol"
    assert half_stream(frames, talk.session.number, Kind.UP) == b"fine!bad"


def test_a_layer_that_cannot_even_refuse_is_cut(gate):
    class Speechless(Plain):
        def refuse(self, message):
            raise ZeroDivisionError

    talk = converse(gate, Speechless())
    talk.session.refuse("go away", "killed")
    assert talk.session.closed
    _, found = finished(gate, talk)
    assert (found[-1]["reason"], found[-1]["by"]) == ("killed", "gate")


def test_a_refusal_is_given_once(gate):
    talk = converse(gate, Plain())
    talk.client.settimeout(5)
    talk.session.refuse("first", "killed")
    talk.session.refuse("first", "killed")
    said = hear(talk, CLIENT, 10)
    assert said.count(b"refused:") == 1
    _, found = finished(gate, talk)
    assert found[-1]["reference"] in said.decode()


@pytest.mark.parametrize("how", ["outage", "bug"])
def test_after_a_request_was_refused_nothing_passes_without_the_layer(tmp_path, how):
    gate = Gate(tmp_path, on_evidence_failure="open")
    talk = gate.connect(80)
    first = b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n"
    talk.say(CLIENT, first)
    talk.say(CLIENT, b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")  # answered after /slow
    assert hear(talk, UPSTREAM, len(first)) == first
    if how == "outage":
        outage.begin(talk.session, gate.worker.now())
    else:
        talk.session.forget_protocol()
    with contextlib.suppress(OSError):
        talk.client.sendall(b"DELETE /smuggled HTTP/1.1\r\nHost: a\r\n\r\n")
    turn(gate)
    turn(gate)
    assert talk.heard(UPSTREAM) == b""
    assert talk.session.closed
    _, found = finished(gate, talk)
    assert (found[-1]["reason"], found[-1]["by"]) == ("protocol", "gate")


def test_on_a_route_that_waits_for_the_disk_bytes_leave_when_they_are_durable(tmp_path):
    gate = Gate(tmp_path, durability="fsync")
    talk = converse_on(gate, Plain())
    talk.say(CLIENT, b"question")
    said = gate.worker.writer.position
    assert hear(talk, UPSTREAM, 8) == b"question"
    assert gate.worker.writer.durable >= said
    talk.say(UPSTREAM, b"answer")
    assert hear(talk, CLIENT, 6) == b"answer"
    finished(gate, talk)


# -- evidence and identity


@pytest.mark.parametrize("how", ["detected", "private", "own"])
def test_bytes_that_cannot_be_recorded_go_nowhere(gate, how):
    class Answering(Plain):
        def data(self, event):
            return [Forward(CLIENT, b"own", Origin.SYNTHESISED)]

    if how == "detected":
        talk = gate.connect(9)
        gate.talks.append(talk)
    else:
        talk = converse(gate, Secretive() if how == "private" else Answering())

    def full(*_arguments, **_options):
        raise EvidenceError("no memory left")

    append, gate.worker.writer.append = gate.worker.writer.append, full
    talk.client.sendall(b"a question of which there will be no record")
    gate.step(lambda: talk.session.closed)
    gate.worker.writer.append = append
    with pytest.raises((ConnectionError, BlockingIOError)):
        raise_for_end(talk.server)
    assert talk.heard(CLIENT) == b""
    gate.worker._evidence_moved()
    frames, found = finished(gate, talk)
    assert half_stream(frames, talk.session.number, Kind.DOWN_OWN) == b""
    assert (found[-1]["record"], found[-1]["reason"]) == ("SessionClose", "evidence")


def raise_for_end(sock):
    """Raise what an aborted connection raises; the bytes of a live one are an error."""
    sock.settimeout(5)
    assert sock.recv(100) == b""
    raise ConnectionResetError


def accepted(gate, found=None, alarms=()):
    """Return a session as it is just after its accept, and the test's ends of it."""
    client, near = socket.socketpair()
    server, far = socket.socketpair()
    for sock in (near, far):
        sock.setblocking(False)
    worker = gate.worker
    number = worker.writer.new_session()
    session = Session(
        worker, number, gate.config.route[0], ("192.0.2.10", 4), ("198.51.100.10", 9), near, far,
        worker.now(),
    )  # fmt: skip
    worker.sessions[number] = session
    worker.dialling.add(session)
    if found is not None:
        session.attribute(found, list(alarms))
    return session, client, server


UNKNOWN = Attributed(None, "none", "none", "timeout")


def test_the_last_record_waits_for_the_identity(gate):
    session, client, server = accepted(gate)
    session.close("refused", "upstream", reset=True)
    assert session.number in gate.worker.sessions
    session.attribute(UNKNOWN, [])
    assert session.number not in gate.worker.sessions
    found = records(gate.close(), session.number)
    assert names(found) == ["Attributed", "SessionClose"]
    client.close()
    server.close()


def test_nothing_is_read_before_it_is_known_who_it_is(gate):
    session, client, server = accepted(gate)
    client.sendall(b"question")
    gate.step(lambda: session.connected)
    time.sleep(0.02)
    turn(gate)
    assert (session.up.received, session.prefix) == (0, b"")
    session.attribute(UNKNOWN, [])
    server.settimeout(5)
    gate.step(lambda: session.up.received == 8)
    assert server.recv(100) == b"question"
    client.close()
    server.close()


@pytest.mark.parametrize(
    ("reason", "cut"), [("forged", True), ("replayed", True), ("ambiguous", False)]
)
def test_only_a_forged_identity_is_refused_where_that_is_asked_for(tmp_path, reason, cut):
    gate = Gate(tmp_path)
    gate.worker.config = Gate.__new__(Gate) and replace_attribution(gate.config)
    session, client, server = accepted(
        gate, Attributed(None, "none", "none", reason), [Alarm(reason, {})]
    )
    assert session.closed is cut
    found = records(gate.close(), session.number)
    assert names(found)[:2] == ["Attributed", "Alarm"]
    assert found[-1]["reason"] == ("forged" if cut else "test")
    client.close()
    server.close()


def replace_attribution(config):
    from dataclasses import replace

    return replace(config, attribution=Attribution(on_forged="refuse"))


def test_records_that_find_no_memory_become_a_gap(gate):
    talk = converse(gate, Plain())

    def full(*_arguments, **_options):
        raise EvidenceError("no memory left")

    append, gate.worker.writer.append = gate.worker.writer.append, full
    for _ in range(3):
        talk.session.record(Fact("lost", {}))
    gate.worker.writer.append = append
    gate.worker._evidence_moved()
    frames, _ = finished(gate, talk)
    (gap,) = [r for r in records(frames, 0) if r["record"] == "Gap"]
    assert (gap["scope"], gap["reason"], gap["count"]) == ("worker", "records-lost", 3)
