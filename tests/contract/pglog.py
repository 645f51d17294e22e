"""What a PostgreSQL server logged with `log_statement = all`: the oracle for what was asked of it.

The server's log_line_prefix is "%c|%h|" (session, client). Statements of more than one line go on
in lines that begin with a tab. What came over the server's own socket is left out.
"""

import re
from typing import NamedTuple

_LINE = re.compile(r"^([0-9a-f]+\.[0-9a-f]+)\|([^|\n]*)\|([A-Z]+):  ", re.MULTILINE)
_STATEMENT = re.compile(
    r"(?:statement|received replication command|execute (?P<name>.*?)): (?P<text>.*)"
    r"|fastpath function call: .*\(OID (?P<oid>\d+)\)",
    re.DOTALL,
)


class Logged(NamedTuple):
    """One statement that the server ran."""

    pid: int
    text: str
    name: str  #: of a prepared statement; "" for the unnamed one
    extended: bool
    parameters: tuple


def statements(log):
    """Return what the server ran, in the order of the log."""
    found = []
    text = log.read_text(encoding="utf-8", errors="surrogateescape")
    starts = list(_LINE.finditer(text))
    for number, start in enumerate(starts):
        end = starts[number + 1].start() if number + 1 < len(starts) else len(text)
        if start[2] == "[local]":
            continue
        body = text[start.end() : end].removesuffix("\n").replace("\n\t", "\n")
        pid = int(start[1].partition(".")[2], 16)
        if start[3] == "DETAIL" and found and body.lower().startswith("parameters: "):
            found[-1] = found[-1]._replace(parameters=_parameters(body[len("parameters: ") :]))
        if start[3] != "LOG":
            continue
        match = _STATEMENT.fullmatch(body)
        if match is None:
            continue
        if match["oid"]:
            found.append(Logged(pid, f"function {match['oid']}", "", extended=False, parameters=()))
            continue
        name = match["name"]
        extended = name is not None
        name = (name or "").removeprefix("fetch from ").partition("/")[0]
        name = "" if name == "<unnamed>" else name
        found.append(Logged(pid, match["text"], name, extended, ()))
    return found


def _parameters(text):
    """Return the values of "$1 = 'a', $2 = NULL"."""
    values = []
    for value in re.findall(r"\$\d+ = (NULL|'(?:[^']|'')*')(?:, |$)", text):
        values.append(None if value == "NULL" else value[1:-1].replace("''", "'"))
    return tuple(values)
