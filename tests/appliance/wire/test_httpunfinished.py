import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from appliance.wire.httphead import FieldReader, Malformed
from appliance.wire.httpsecrets import Secrets, redact
from appliance.wire.httpunfinished import MOST_HEAD_BYTES, Unfinished

FIELDS = FieldReader(Secrets())
LINE_BYTES = 1_000
PIECES = [
    "a", "/", "?", "&", ";", "#", "=", "%3F", "%26", "%3D", "%253D", "%2", "token", "pwd", "sid",
    "access_token", "jsessionid", " ", "x=1", "?token=", ";pwd=", "://h/", ":", "abcdef" * 100,
]  # fmt: skip
NAMES = ["Cookie", "authorization", "X-Api-Key", "Referer", "X-Cookie", "Cookies", "Host"]
VALUES = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@st.composite
def heads(draw):
    lines = ["GET /" + draw(VALUES) + " HTTP/1.1"]
    for _ in range(draw(st.integers(0, 4))):
        blank = draw(st.sampled_from(["", " ", "  \t"]))
        lines.append(f"{draw(st.sampled_from(NAMES))}:{blank}{draw(VALUES)}")
    return "\r\n".join(lines).encode()


def hidden(data, cuts, line_bytes=100_000):
    """Return the positions that are hidden when `data` comes in pieces."""
    unfinished = Unfinished(FIELDS, 0, line_bytes)
    found = set()
    seen = 0
    for cut in [*sorted(cuts), len(data)]:
        for start, end, _ in unfinished.look(data[:cut], 0)[0]:
            new = set(range(max(start, seen), end))
            assert not new & found, "hidden twice"
            found |= new
        seen = cut
    return found


@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(heads(), st.data())
@example(b"GET /?token=" + b"a" * 2000 + b"&x=" + b"b" * 2000 + b";pwd=c", None)
@example(b"GET /a;pwd=%3Ftoken%3Dab?c&d HTTP/1.1\r\nCookie:  a", None)
def test_what_is_hidden_does_not_depend_on_how_a_head_comes(head, data):
    cuts = range(1, len(head)) if data is None else data.draw(st.sets(st.integers(1, len(head))))
    whole = {at for start, end, _ in FIELDS.secrets.in_lines(head) for at in range(start, end)}
    assert hidden(head, []) == whole
    assert hidden(head, cuts) == whole


def test_a_carriage_return_at_the_end_is_left_for_the_next_look():
    lines = b"GET / HTTP/1.1\r\nCookie: a\r\nX: b\r\n"
    assert hidden(lines, range(1, len(lines))) == {lines.index(b"a\r\nX")}


def test_the_first_line_is_told_when_it_is_whole():
    unfinished = Unfinished(FIELDS, 0, LINE_BYTES)
    assert unfinished.look(b"GET / HTTP/1.1\r", 0) == ([], b"")
    assert unfinished.look(b"GET / HTTP/1.1\r\nX", 0) == ([], b"GET / HTTP/1.1")
    assert unfinished.look(b"GET / HTTP/1.1\r\nX: 1\r\n", 0) == ([], b"")


def test_trailers_have_no_first_line():
    unfinished = Unfinished(FIELDS, 7, 0)
    buffer = b"junk...Cookie: abc\r\nX: 1\r\n"
    assert unfinished.look(buffer, 7) == ([(15, 18, "cookie")], b"")


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nX: a\nb",
        b"GET / HTTP/1.1\nX",
        b"GET / HTTP/1.1\r\nX: a\rb",
        b"GET / HTTP/1.1\r\nX: a\r\r",
        b"GET /\0",
        b"GET / HTTP/1.1\r\nX\0",
        b"GET / HTTP/1.1\r\n X",
        b"GET / HTTP/1.1\r\nX: 1\r\n Y",
        b"GET / HTTP/1.1\r\nX Y",
        b"GET / HTTP/1.1\r\nX : 1",
        b"GET / HTTP/1.1\r\nContent_Length: 1",
        b"GET / HTTP/1.1\r\n: 1",
        b"GET / HTTP/1.1\r\n" + b"X" * 300,
        b"GET /" + b"a" * LINE_BYTES,
        b"GET / HTTP/1.1\r\n" + b"X: 1\r\n" * (MOST_HEAD_BYTES // 6),
    ],
    ids=lambda head: repr(head[:40]),
)
def test_what_is_broken_already_need_not_be_waited_for(head):
    for cuts in ([], range(1, len(head))) if len(head) < 10_000 else ([],):
        with pytest.raises(Malformed):
            hidden(head, cuts, LINE_BYTES)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "line",
    [b"X: " + b"a" * 60_000, b"X: " + b"?a=b" * 15_000, b"Cookie: " + b"a" * 60_000,
     b"X: ?token=" + b"a" * 60_000, b"X: " + b"?token=a" * 7_500],
    ids=lambda line: repr(line[:12]),
)  # fmt: skip
def test_a_line_that_comes_byte_by_byte_is_looked_at_in_time(line):
    """Each byte used to cost a look at all that came before: hundreds of seconds."""
    head = b"GET / HTTP/1.1\r\n" + line
    unfinished = Unfinished(FIELDS, 0, LINE_BYTES)
    spans = []
    for end in range(len(head) - 20_000, len(head)):
        spans, _ = unfinished.look(head[:end], 0)
    assert (b"[hidden]" in redact(head, spans)) == (b"token" in line or b"Cookie" in line)
