import pytest
from messages import messages

from appliance.sansio import CLIENT, UPSTREAM

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


@pytest.fixture(scope="session")
def native():
    """Return how a refusal is checked, by protocol; a protocol without a check fails."""
    return {"opaque": _opaque, "postgresql": _postgresql}
