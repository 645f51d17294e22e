"""Credentials on command lines: what of a program's arguments must not reach the evidence.

`appliance.attribution.sensor_link` blanks the arguments of every owner before anything else sees
them. Known are the common ways in which a program is told a secret:

    --password=X, --token X, PGPASSWORD=X     a name that ends in a word for a secret, and its value
    "password": "X", user=a&password=X        the same inside a body, a connection string, a script
    Authorization: Bearer X                   a header whose value is secret (`wire.httpsecrets`)
    https://ann:X@host/?access_token=X        user and password, and secret parameters, of a URL
    -u ann:X, --user ann:X, --proxy-user      what stands behind the first colon
    curl -b X, mysql -pX, redis-cli -a X      options of certain programs

It is a judgement by names, so it may miss a secret (`tool X`), and it hides what only looks like
one; programs that take secrets from files or the environment need it in neither case.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from appliance.wire.httpsecrets import HIDDEN, Secrets, redact

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_NAME = (
    rb"[\w.\-]*(?:passw(?:or)?d|passphrase|pwd|secret|token|credentials?|oauth2-bearer"
    rb"|(?:api|access|private|account|secret|auth)[_\-]?key)"
)
_VALUE = rb"""(\\?"[^"]*"?|'[^']*'?|[^\s&;,"'}]+)"""
_IN_WORD = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # a name, = or :, and a value; a URL's //... is none
        rb"(?<![\w\-])" + _NAME + rb"""\\?["']?\s*[=:]\s*(?!//)""" + _VALUE,
        rb"(?<!\S)--?" + _NAME + rb"\s+" + _VALUE,
        rb"""(?<!\S)(?:-[uU]|--(?:proxy-)?user)(?:\s*|=)["']?[^\s:"']*:([^\s"']+)""",
        rb"""\b(?:curl|wget)\b.*?\s(?:-b|--cookie)[\s=]*("[^"]*"?|'[^']*'?|\S+)""",
    )
)
_SECRET_OPTION = re.compile(rb"--?" + _NAME, re.IGNORECASE)
_PAIR_OPTIONS = frozenset({b"-u", b"-U", b"--user", b"--proxy-user"})
#: Beginning of a program's name -> options whose value is secret.
_OPTIONS = (
    (b"curl", (b"-b", b"--cookie")), (b"ldap", (b"-w",)), (b"mariadb", (b"-p",)),
    (b"mongo", (b"-p",)), (b"mysql", (b"-p",)), (b"redis-cli", (b"-a",)), (b"sshpass", (b"-p",)),
)  # fmt: skip
#: Of these the value must follow without a space: `mysql -p shop` asks for it.
_GLUED_ONLY = (b"mysql", b"mariadb")


def blanked(argv: Sequence[str], secrets: Secrets) -> list[str]:
    """Return arguments with a mark in the place of each secret."""
    words = [word.encode("utf-8", "surrogatepass") for word in argv]
    program = words[0].rpartition(b"/")[2] if words else b""
    options = next((names for begin, names in _OPTIONS if program.startswith(begin)), ())
    found: list[bytes] = []
    before = b""
    for word in words:
        found.append(_word(word, before, program, options, secrets))
        before = word
    return [word.decode("utf-8", "surrogatepass") for word in found]


def _word(
    word: bytes, before: bytes, program: bytes, options: tuple[bytes, ...], secrets: Secrets
) -> bytes:
    """Return one argument; `before` is the one in front of it."""
    if _SECRET_OPTION.fullmatch(before) and not word.startswith(b"--"):
        return HIDDEN
    if before in options and not program.startswith(_GLUED_ONLY):
        return HIDDEN
    if before in _PAIR_OPTIONS and b":" in word:
        return word.partition(b":")[0] + b":" + HIDDEN
    for option in options:
        glued = option if len(option) == 2 else option + b"="
        if word.startswith(glued) and len(word) > len(glued):
            return glued + HIDDEN
    spans = [(start, end, "") for start, end, _ in secrets.in_junk(word)]
    return redact(word, list(_apart([*spans, *_spans(word)])))


def _spans(word: bytes) -> Iterator[tuple[int, int, str]]:
    for pattern in _IN_WORD:
        for match in pattern.finditer(word):
            yield match.start(1), match.end(1), ""


def _apart(spans: Iterable[tuple[int, int, str]]) -> Iterator[tuple[int, int, str]]:
    """Yield spans in order, those that overlap as one."""
    first, last = -1, -1
    for start, end, _ in sorted(spans):
        if start > last:
            if last > first:
                yield first, last, ""
            first, last = start, end
        last = max(last, end)
    if last > first:
        yield first, last, ""
