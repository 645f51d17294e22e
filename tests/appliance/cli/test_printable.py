from hypothesis import given
from hypothesis import strategies as st

from appliance.cli.printable import lines, octets, printable

ANY = st.text(st.characters() | st.sampled_from("\\\n\r\t\x1b\x7f\x9b\u202e\u2028\ufeff"))


def test_escapes_are_what_a_reader_expects():
    assert printable("plain text, with spaces") == "plain text, with spaces"
    assert printable("a\nb\r\t\\") == "a\\nb\\r\\t\\\\"
    assert printable("\x1b[31m\x00\x7f") == "\\x1b[31m\\x00\\x7f"
    assert printable("\x9b \u202e \u200b \U000e0001") == "\\u009b \\u202e \\u200b \\U000e0001"
    assert printable("Grüße 日本 \udcff") == "Grüße 日本 \\xff"


@given(ANY)
def test_what_is_printed_is_one_printable_line(text):
    assert printable(text).isprintable()


@given(ANY, ANY)
def test_two_texts_never_look_the_same(one, other):
    assert (printable(one) == printable(other)) == (one == other)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_lines_hold_everything_and_end_where_the_text_breaks(text):
    found = list(lines(text))
    assert "".join(found) == printable(text)
    assert all(line.isprintable() for line in found)
    assert sum(line.endswith("\\n") for line in found) >= text.count("\n")


@given(st.binary(max_size=300), st.integers(0, 1 << 33))
def test_bytes_are_shown_on_printable_lines(data, offset):
    found = list(octets(data, offset))
    assert all(line.isprintable() for line in found)
    assert bool(found) == bool(data)


def test_binary_is_dumped_with_its_place_and_text_is_not():
    assert list(octets(bytes(17), 16)) == [
        "00000010  " + "00 " * 15 + "00  ................",
        "00000020  00" + " " * 47 + ".",
    ]
    assert list(octets(b"GET / HTTP/1.1\r\nA: \xff\x1b!\n", 0)) == [
        "GET / HTTP/1.1\\r\\n",
        "A: \\xff\\x1b!\\n",
    ]
