import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.wire.httpchunks import Chunks, Part
from appliance.wire.httphead import FieldReader, Malformed
from appliance.wire.httpsecrets import Secrets

FIELDS = FieldReader(Secrets())


def walk(data, pieces=None, *, request=True):
    """Return (chunks, bytes that were decided) of data given in pieces, as an inlet would."""
    chunks = Chunks(FIELDS, request=request)
    kept, decided = b"", 0
    for piece in pieces or [data]:
        buffer = kept + piece
        at = chunks.walk(buffer, 0)
        decided += at
        kept = buffer[at:]
        if chunks.part is Part.DONE:
            break
    return chunks, decided


BODIES = st.lists(st.binary(min_size=1, max_size=50), max_size=6)


@given(BODIES, st.sampled_from([b"", b"X-Sum: 1\r\n", b"A: 1\r\nB: 2\r\n"]), st.data())
def test_chunks_are_counted_however_they_are_cut(bodies, trailers, data):
    wire = b"".join(b"%x\r\n%s\r\n" % (len(body), body) for body in bodies)
    wire += b"0\r\n" + trailers + b"\r\n"
    cuts = sorted(data.draw(st.sets(st.integers(1, len(wire)), max_size=20)) | {len(wire)})
    pieces = [wire[a:b] for a, b in zip([0, *cuts], cuts, strict=False)]
    chunks, decided = walk(wire, pieces)
    assert chunks.part is Part.DONE
    assert decided == len(wire)
    assert chunks.data_bytes == sum(map(len, bodies))


def test_the_walk_stops_where_the_body_ends():
    chunks, decided = walk(b"1\r\nx\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n")
    assert chunks.part is Part.DONE
    assert decided == len(b"1\r\nx\r\n0\r\n\r\n")


def test_sizes_may_have_extensions_zeros_and_either_case():
    wire = b"000a;name=value;flag\r\n0123456789\r\n0A\r\n0123456789\r\n000;x\r\n\r\n"
    chunks, decided = walk(wire)
    assert (chunks.data_bytes, decided) == (20, len(wire))


def test_only_a_response_may_pad_its_sizes():
    wire = b"1  \r\nx\r\n0 \r\n\r\n"
    assert walk(wire, request=False)[0].part is Part.DONE
    with pytest.raises(Malformed):
        walk(wire)


@pytest.mark.parametrize(
    "wire",
    [
        b"\r\n", b"x\r\n", b"-1\r\n", b"+1\r\n", b"0x1\r\n", b" 1\r\n", b"1\n", b"1\nx\r\n",
        b"1;a\nb\r\n", b"1;a\rb\r\nx\r\n", b"1 ;a\r\n", b"1\x00\r\n", b"1_0\r\n", b"1\r\nxy",
        b"1\r\nx\n", b"1\r\nx\rx", b"1\r\nx0\r\n", b"1234567890abcdef\r\n", b"1;" + b"a" * 2000,
        b"1;" + b"a" * 2000 + b"\r\n", b"0\r\nContent-Length: 5\r\n\r\n",
        b"0\r\nTransfer-Encoding: chunked\r\n\r\n", b"0\r\nHost: a\r\n\r\n",
        b"0\r\n X: 1\r\n\r\n", b"0\r\nX : 1\r\n\r\n", b"0\r\nX: a\nb\r\n\r\n",
        b"0\r\nX: " + b"a" * 20_000, b"\xd9\xa1\r\n",
    ],
    ids=repr,
)  # fmt: skip
def test_a_body_whose_end_could_be_elsewhere_is_refused(wire):
    with pytest.raises(Malformed):
        walk(wire)
    with pytest.raises(Malformed):
        walk(wire, [wire[at : at + 1] for at in range(len(wire))])


def test_secrets_in_trailers_are_found():
    wire = b"1\r\nx\r\n0\r\nA: 1\r\nSet-Cookie: canary\r\n\r\n"
    chunks, _ = walk(wire)
    assert [wire[start:end] for start, end, _ in chunks.spans] == [b"canary"]


def test_what_passed_elsewhere_is_part_of_the_chunk():
    chunks = Chunks(FIELDS, request=True)
    assert chunks.walk(b"64\r\n0123456789", 0) == 14
    assert chunks.left == 90
    chunks.skip(90)
    assert chunks.walk(b"\r\n0\r\n\r\n", 0) == 7
    assert chunks.data_bytes == 100
