import pytest
from hypothesis import given
from hypothesis import strategies as st
from messages import message

from appliance.wire.framing import hop

ROW, OTHER = ord("D"), ord("C")


@given(st.lists(st.binary(max_size=30), max_size=20), st.integers(0, 40), st.binary(max_size=9))
def test_rows_are_counted_up_to_the_first_that_is_not_one(bodies, cut, after):
    rows = b"".join(message("D", body) for body in bodies)
    data = rows + message("C", after)
    assert hop(data, 0, len(data), ROW) == (len(rows), len(bodies))
    short = data[: max(0, len(rows) - cut)]
    position, count = hop(short, 0, len(short), ROW)
    assert len(short) - position < 5 or position >= len(short)
    assert count <= len(bodies)


def test_the_last_row_may_reach_beyond_the_end():
    row = message("D", b"x" * 100)
    assert hop(row[:50], 0, 50, ROW) == (105, 1)


@pytest.mark.parametrize("length", range(4))
def test_a_length_that_cannot_be_ends_the_walk(length):
    data = b"D" + length.to_bytes(4, "big") + b"xxxx"
    assert hop(data, 0, len(data), ROW) == (0, 0)


def test_another_type_ends_the_walk_at_once():
    data = message("C", b"x")
    assert hop(memoryview(data), 0, len(data), ROW) == (0, 0)
    assert hop(memoryview(data), 0, len(data), OTHER) == (6, 1)
