"""What a PostgreSQL client's text asks for: statements, verb, relations, fingerprint.

Protocols call `Analyser.parts` with the text of a message; it never raises. The parser is
libpg_query (PostgreSQL 18's own grammar), reached through postgast here and nowhere else. What it
cannot parse is "unknown", never guessed: a syntax error, a text over 64 KiB, a tree over 100 levels
deep, a text that is not valid UTF-8.

Two things keep it off the hot path:

* a cache by exact text;
* for SELECT, INSERT, UPDATE and DELETE, a cache by *shape*: the text with string and short integer
  literals replaced. Literals of one class never change how PostgreSQL's grammar reads a text, nor
  its fingerprint, with the exceptions that `_LITERAL_MATTERS` names; and only literals that are
  certain to be literals are replaced. A backslash, a comment, a dollar quote, U&'' or a second
  statement make a text ineligible: it is parsed in full.

libpg_query recurses once a level of its tree (about 400 bytes of stack), without a limit of its own
where the grammar is left-recursive: 20,000 times "1+" kill the process. `_may_overflow` keeps such
texts away from it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import postgast
from google.protobuf.message import DecodeError
from postgast.errors import PgQueryError

from appliance.wire.sqltree import UNKNOWN, Meaning, meaning

MOST_TEXT_CHARS = 64 * 1024
MOST_NESTING_TOKENS = 2_500
_MOST_CACHED_TEXT = 4 * 1024
_MOST_CACHE_CHARS = 4 * 1024 * 1024

EMPTY = "EMPTY"  #: verb of a text without a statement


class Analysis(NamedTuple):
    """What one statement does."""

    verb: str
    tables: tuple[str, ...] = ()
    fingerprint: str = ""  #: libpg_query's, 16 hex digits; "" when unknown
    prepares: str | None = None  #: SQL PREPARE: the name that it defines
    prepared_verb: str = ""
    deallocates: str | None = None  #: SQL DEALLOCATE or DISCARD ALL: the name that goes, "" for all
    executes: str | None = None  #: SQL EXECUTE: the name that it runs


class Part(NamedTuple):
    """One statement of a text: bytes `start` to `end` of its UTF-8 form."""

    start: int
    end: int
    analysis: Analysis


NOT_KNOWN = Analysis(UNKNOWN)

#: Literals become a mark, strings with a quote before it. A number stands alone and has at most
#: nine digits; one with a dot, an exponent or a letter beside it stands as it is.
_STRING = re.compile(r"'[^'\\]*'")
_INTEGER = re.compile(
    r"""[0-9](?<![\w$."\u0080-\U0010ffff][0-9])[0-9]{0,8}(?![\w$.\u0080-\U0010ffff])""", re.ASCII
)
_PLAIN_IDENTIFIER = re.compile(r'"[\w$]*"')
_DOLLAR_QUOTE = re.compile(r"\$(?![0-9])")
#: float(p) picks its type by p; JSON and XML syntax has strings that are part of the tree.
_LITERAL_MATTERS = re.compile(r"float|json|xml|&'|escape", re.IGNORECASE)
_BY_SHAPE = frozenset({"SELECT", "INSERT", "UPDATE", "DELETE"})

_ATOMS = r"(?:null|true|false|default)\b|[0-9]"
_NESTING = re.compile(
    rf"(?!{_ATOMS})[\w$\u0080-\U0010ffff]+|[-+*/<>=~!@#%^&|`?:.\[]+", re.IGNORECASE | re.ASCII
)
_QUOTED = re.compile(r"""'[^']*'|"[^"]*\"""")


class Analyser:
    """Analyses texts and remembers what it found. One per process; bounded."""

    def __init__(self) -> None:
        self._single: dict[str, Analysis] = {}
        self._shapes: dict[str, Analysis] = {}
        self._cached_chars = 0

    def single(self, text: str) -> Analysis | None:
        """Return the analysis of a text that is known to hold exactly one statement, else None."""
        found = self._single.get(text)
        if found is None and len(text) <= MOST_TEXT_CHARS:
            shape = _shape(text)
            if shape is not None:
                return self._shapes.get(shape)
        return found

    def parts(self, text: str) -> tuple[Part, ...]:
        """Return the statements of `text` in order; none when it is empty, one "unknown" when it
        does not parse.
        """
        found = self.single(text)
        if found is not None:
            return (Part(0, len(text.encode()), found),)
        parts = _parse(text)
        if len(parts) == 1:
            self._remember(text, parts[0].analysis)
        return parts

    def _remember(self, text: str, analysis: Analysis) -> None:
        # a text with parameters comes again as it is: it needs no shape
        shape = _shape(text) if analysis.verb in _BY_SHAPE and "$" not in text else None
        if shape is not None and _LITERAL_MATTERS.search(shape) is None:
            cache, key = self._shapes, shape
        else:
            cache, key = self._single, text
        if len(key) > _MOST_CACHED_TEXT and cache is self._single:
            return
        self._cached_chars += len(key) + 200  # the entry and its analysis
        if self._cached_chars > _MOST_CACHE_CHARS:
            self._single.clear()
            self._shapes.clear()
            self._cached_chars = len(key) + 200
        cache[key] = analysis


def _shape(text: str) -> str | None:
    """Return `text` with its literals replaced, or None when that is not certain to be right.

    Every double quote must belong to an identifier of word characters, so that none holds what
    looks like a literal.
    """
    if '"' in text and 2 * len(_PLAIN_IDENTIFIER.findall(text)) != text.count('"'):
        return None
    shape = _STRING.sub("'\x01", text) if "'" in text else text
    shape = _INTEGER.sub("\x01", shape)
    if "\\" in shape or "--" in shape or "/*" in shape or "\x01" in text:
        return None
    if ";" in shape and shape.index(";") != len(shape) - 1:
        return None
    if "$" in shape and _DOLLAR_QUOTE.search(shape):
        return None
    return shape


def _may_overflow(text: str) -> bool:
    """Return whether libpg_query's recursion on `text` could exhaust the stack.

    Each level of a tree costs a word, an operator or a bracket; atoms and commas cost none, so that
    long lists of literals pass. Where a quote might not be a quote, everything between quotes
    counts.
    """
    if len(text) <= MOST_NESTING_TOKENS or _nesting(text) <= MOST_NESTING_TOKENS:
        return False
    if "\\" in text or "--" in text or "/*" in text or _DOLLAR_QUOTE.search(text):
        return True
    return _nesting(_QUOTED.sub("''", text)) > MOST_NESTING_TOKENS


def _nesting(text: str) -> int:
    return sum(1 for _ in _NESTING.finditer(text))


def _parse(text: str) -> tuple[Part, ...]:
    """Return what libpg_query makes of `text`."""
    raw = text.encode()
    unknown = (Part(0, len(raw), NOT_KNOWN),)
    if len(text) > MOST_TEXT_CHARS or _may_overflow(text):
        return unknown
    try:
        statements = postgast.parse(text).stmts
        whole = [meaning(statement.stmt) for statement in statements]
        if len(statements) == 1:
            return (Part(0, len(raw), _analysis(whole[0], text)),)
        parts: list[Part] = []
        start = 0
        for statement, found in zip(statements, whole, strict=True):
            end = statement.stmt_location + statement.stmt_len if statement.stmt_len else len(raw)
            while raw[start:end][:1] in (b" ", b"\n", b"\t", b"\r", b"\f", b";"):
                start += 1
            parts.append(Part(start, end, _analysis(found, raw[start:end].decode())))
            start = end
    except (PgQueryError, DecodeError, UnicodeDecodeError):
        return unknown
    return tuple(parts)


def _analysis(found: Meaning, text: str) -> Analysis:
    return Analysis(
        found.verb,
        found.tables,
        postgast.fingerprint(text).hex,
        found.prepares,
        found.prepared_verb,
        found.deallocates,
        found.executes,
    )
