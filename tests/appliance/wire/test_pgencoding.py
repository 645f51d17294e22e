import pytest
from hypothesis import given
from hypothesis import strategies as st
from pgserver import PgServer

from appliance.wire.pgencoding import UTF8, codec, read, whole_characters


@pytest.fixture(scope="module")
def server():
    with PgServer(15) as server:
        yield server


def test_every_encoding_that_the_server_offers_a_client_is_known_or_refused(server):
    """What Python has no codec for: the server's text is then not certain, and says so."""
    unknown = set()
    offered = "SELECT DISTINCT pg_encoding_to_char(n) FROM generate_series(0, 60) n"
    for name in server.psql(offered).stdout.split():
        if codec(name) is None:
            unknown.add(name)
        else:
            assert b"abc\\".decode(codec(name)) == "abc\\"
    assert unknown == {"EUC_JIS_2004", "EUC_TW", "MULE_INTERNAL", "SHIFT_JIS_2004"}


@pytest.mark.parametrize(
    ("name", "letter"),
    [("LATIN1", "é"), ("WIN1252", "€"), ("KOI8R", "Ж"), ("LATIN9", "€"), ("SJIS", "ソ"),
     ("BIG5", "功"), ("GBK", "誠"), ("EUC_KR", "한"), ("UHC", "똠"), ("GB18030", "中"),
     ("WIN1251", "Я"), ("ISO_8859_7", "Ω")],
)  # fmt: skip
def test_a_letter_is_what_the_server_makes_of_it(server, name, letter):
    raw = server.psql(f"SELECT encode(convert_to('{letter}', '{name}'), 'hex')").stdout
    assert read(bytes.fromhex(raw.strip()), codec(name)) == (letter, True)


def test_what_cannot_be_read_is_shown_and_not_certain():
    assert read(b"\xff", UTF8) == ("\\xff", False)
    assert read(b"abc", None) == ("abc", False)


@given(st.text(max_size=40), st.integers(0, 60))
def test_a_cut_never_leaves_half_a_character(text, cut):
    raw = text.encode()[:cut]
    whole = whole_characters(raw)
    assert raw.startswith(whole)
    assert len(raw) - len(whole) < 4
    assert text.startswith(whole.decode())
