import pytest
from messages import messages
from webresponses import responses

from appliance.sansio import CLIENT, UPSTREAM
from capture.records import Operation

REFERENCE = b"reference 0123456789abc"


def _opaque(replay, _pieces):
    """An unknown protocol has no error of its own."""
    assert not replay.own[CLIENT]


def _postgresql(replay, pieces):
    """What the client has received is whole messages, and the last one is the error."""
    seen, own = bytes(replay.relayed[UPSTREAM]), bytes(replay.own[CLIENT])
    up = b"".join(data or b"" for side, data in pieces if side is CLIENT)
    if up[4:8] == b"\x04\xd2\x16\x2f":  # SSLRequest: one byte comes before the messages
        if seen[:1] == b"S":
            assert not own
            return
        seen = seen[1:]
    if up[4:8] == b"\x04\xd2\x16\x2e":  # CancelRequest has no answer
        assert len(up) < int.from_bytes(up[:4], "big") or not own
        return
    _received, rest = messages(seen)
    if rest:
        assert not own
        return
    error, rest = messages(own)
    assert [kind for kind, _ in error] == ["E"]
    assert not rest
    fields = {field[:1]: field[1:] for field in error[0][1].split(b"\0") if field}
    assert fields[b"S"] == fields[b"V"] == b"FATAL"
    assert fields[b"C"] == b"57P01"
    assert REFERENCE in fields[b"M"]


def _tls(replay, pieces):
    """An alert is all that a client gets, and understands, before the server has said anything."""
    answered = any(data and side is UPSTREAM for side, data in pieces)
    assert bytes(replay.own[CLIENT]) == (b"" if answered else b"\x15\x03\x03\x00\x02\x02\x31")


def _http1(replay, _pieces):
    """The answer of the gate, if there is one, is the last thing that the client gets, and whole.

    It may not stand inside another answer: only where all that was answered is whole.
    """
    own = bytes(replay.own[CLIENT])
    if not own:
        return
    asked = [record.verb for record in replay.of(Operation)]
    found = list(responses(bytes(replay.relayed[UPSTREAM]) + own, asked))
    assert all(response.whole for response in found)
    assert found[-1].status == 503
    assert found[-1].head.endswith(b"Connection: close\r\n\r\n")
    if asked[len([one for one in found if one.status >= 200]) - 1] != "HEAD":
        assert REFERENCE in found[-1].body


@pytest.fixture(scope="session")
def native():
    """Return how a refusal is checked, by protocol; a protocol without a check fails."""
    return {"opaque": _opaque, "http1": _http1, "postgresql": _postgresql, "tls": _tls}
