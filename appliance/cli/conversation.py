"""One session as a conversation that a person can read.

    +0.001234  >  1 SELECT        select * from orders where id = $1
               |    $1 = 4711
    +0.002345  <  1 ok            SELECT 1, 1 row, 33 bytes, 1.1 ms

The first column is the time since the session began. `>` is what the client asked or sent, `<` what
came back, `|` goes on with the line before, `!` is what somebody should look at (gaps, alarms,
decisions, errors), `.` is anything else. Everything that a peer sent is escaped, and every line
begins with columns of ours, so that no peer can write a line.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from appliance.cli.printable import lines, octets, printable
from capture.index_query import State
from capture.moment import rfc3339
from capture.reader import Side

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from capture.index_query import Session
    from capture.reader import Frame, Reader

MOST_LINES = 400  #: of the conversation, without --all
MOST_BYTES = 4096  #: of each side, without --all
MOST_TEXT_LINES = 20  #: of one statement, without --all

_GUTTER = " " * 12 + "|    "
_ORDINARY = frozenset({"parameter", "backend-key"})  #: facts that only --all shows
_ARROWS = {
    Side.UP.value: ">  ", Side.DOWN.value: "<  ",
    Side.UP_OWN.value: "gate >", Side.DOWN_OWN.value: "gate <",
}  # fmt: skip


def header(session: Session) -> Iterator[str]:
    """Yield the lines that say whose session it is, and what became of it."""
    if session.account is None:
        account = f"unknown ({session.unknown or 'not attributed yet'})"
    else:
        account = f"{session.account}  ({session.assurance}, by {session.how})"
    yield f"session {session.name}"
    yield from _rows(account=account, **_owner(session.owner or {}))
    yield from _rows(
        client=session.client or "unknown",
        target=session.target or "unknown",
        protocol=f"{session.protocol or 'not detected'}, route {session.route or 'unknown'}",
        time=_times(session),
        bytes=f"{session.bytes_up} up, {session.bytes_down} down",
    )
    counts = {
        "operations": session.operations, "errors": session.errors, "denied": session.denied,
        "gaps": session.gaps, "alarms": session.alarms, "hidden ranges": session.hidden,
    }  # fmt: skip
    yield from _rows(counted=", ".join(f"{name} {n}" for name, n in counts.items() if n))


def _rows(**values: str) -> Iterator[str]:
    return (f"  {name:10}{printable(value)}" for name, value in values.items() if value)


def _owner(owner: dict[str, Any]) -> dict[str, str]:
    if not owner:
        return {}
    who = f"{owner.get('exe', '?')} [{owner.get('pid', '?')}] uid {owner.get('uid', '?')}"
    argv = owner.get("argv")
    return {
        "process": f"{who} on {owner['host']}" if owner.get("host") else who,
        "argv": json.dumps(argv, ensure_ascii=False) if argv else "",
        "cgroup": str(owner.get("cgroup") or ""),
        "unit": str(owner.get("unit") or ""),
        "container": str(owner.get("container") or ""),
    }


def _times(session: Session) -> str:
    began = rfc3339(session.started)
    if session.ended is None:
        return f"{began}, running"
    lasted = f"{(session.ended - session.started) / 1e9:.3f} s"
    if session.state is State.CUT:
        return f"{began}, cut after at most {lasted}: the gate's process ended"
    return f"{began}, {lasted}, {session.reason} by {session.ended_by}"


class Conversation:
    """Writes the lines of one session. `everything` lifts every bound; `raw` shows bytes also of
    decoded protocols.
    """

    def __init__(self, reader: Reader, session: Session, *, everything: bool, raw: bool) -> None:
        self._reader, self._session, self._everything = reader, session, everything
        self._raw = raw or session.protocol in (None, "opaque")
        self._left = dict.fromkeys(_ARROWS, 0 if not self._raw else MOST_BYTES)
        self._shown = 0
        self._skipped_lines = 0
        self._skipped_bytes = 0

    def lines(self) -> Iterator[str]:
        """Yield the conversation; the last line says what was left out."""
        for frame in self._reader.frames(self._session.number):
            for line in self._frame(frame):
                if self._everything or self._shown < MOST_LINES:
                    self._shown += 1
                    yield line
                else:
                    self._skipped_lines += 1
        if self._skipped_lines or self._skipped_bytes:
            yield (
                f"{'':12}.    left out: {self._skipped_lines} lines,"
                f" {self._skipped_bytes} bytes; --all shows them"
            )

    def _frame(self, frame: Frame) -> Iterator[str]:
        at = f"+{(frame.time_ns - self._session.started) / 1e9:<11.6f}"
        if not frame.is_record:
            yield from self._bytes(frame, at)
            return
        fields = frame.fields()
        tell = _TELLS.get(fields["record"])
        if tell is None:
            yield f"{at}.    {printable(json.dumps(fields))}"
        elif fields["record"] != "Fact" or self._everything or fields["kind"] not in _ORDINARY:
            first, *more = tell(fields)
            yield at + first
            yield from self._bounded([_GUTTER + line for line in more])

    def _bounded(self, more: list[str]) -> list[str]:
        if self._everything or len(more) <= MOST_TEXT_LINES:
            return more
        self._skipped_lines += len(more) - MOST_TEXT_LINES
        return [*more[:MOST_TEXT_LINES], _GUTTER + "..."]

    def _bytes(self, frame: Frame, at: str) -> Iterator[str]:
        if not self._raw or not frame.payload:
            return
        length = len(frame.payload)
        shown = length if self._everything else min(length, self._left[frame.kind])
        self._left[frame.kind] -= shown
        self._skipped_bytes += length - shown
        if shown:
            yield f"{at}{_ARROWS[frame.kind]:5}{length} bytes at {frame.offset}"
            for line in octets(bytes(frame.payload[:shown]), frame.offset):
                yield _GUTTER + line


def _operation(fields: dict[str, Any]) -> list[str]:
    text = list(lines(fields["text"])) or ["(empty)"]
    denied = " DENIED" if fields["verdict"] == "denied" else ""
    head = f">{fields['op']:3} {printable(fields['verb']) + denied:13} "
    binds = [f"${n} = {_value(value)}" for n, value in enumerate(fields["binds"], 1)]
    if fields["truncated"]:
        text.append("(the statement is longer)")
    return [f"{head}{text[0]}", *text[1:], *binds]


def _result(fields: dict[str, Any]) -> list[str]:
    said = [fields["tag"], f"{fields['rows']} rows", f"{fields['bytes']} bytes"]
    said.append(f"{fields['duration_ns'] / 1e6:.3f} ms")
    if fields["status"] == "error":
        said = [f"{fields['sqlstate']}: {fields['message']}"]
    mark = "!" if fields["status"] == "error" else "<"
    told = ", ".join(word for word in said if word)
    return [f"{mark}{fields['op']:3} {fields['status']:13} {printable(told)}"]


def _fact(fields: dict[str, Any]) -> list[str]:
    mark = "!" if fields["kind"] == "error" else "."
    return [f"{mark}    {printable(fields['kind']):13} {_values(fields['fields'])}"]


def _detected(fields: dict[str, Any]) -> list[str]:
    notes = [fields["reason"]] if fields["reason"] else []
    if fields.get("secrets"):
        notes.append(f"secrets {fields['secrets']}")
    why = f" ({', '.join(notes)})" if notes else ""
    return [f".    protocol      {printable(fields['protocol'] + why)}"]


def _attributed(fields: dict[str, Any]) -> list[str]:
    who = fields["account"] or f"unknown ({fields['reason']})"
    candidates = ", ".join(fields["candidates"])
    told = f"{who}, {fields['assurance']}, after {fields['waited_ns'] / 1e6:.3f} ms"
    return [f".    account       {printable(told + (f'; {candidates}' if candidates else ''))}"]


def _open(fields: dict[str, Any]) -> list[str]:
    told = f"{fields['durability']}, address of the {fields['source']}, worker {fields['worker']}"
    return [f".    open          {printable(told)}"]


def _close(fields: dict[str, Any]) -> list[str]:
    reference = f", reference {fields['reference']}" if fields["reference"] else ""
    return [f".    close         {printable(fields['reason'])} by {fields['by']}{reference}"]


def _tls(fields: dict[str, Any]) -> list[str]:
    stage, mode = fields["stage"], fields["mode"]
    mark = "!" if stage == "failed" else "."
    names: tuple[str, ...]
    if stage == "hello":
        names = ("sni", "alpn_offered", "versions_offered", "ja4")
    elif stage == "failed":
        names = ("by", "why", "verified")
    else:
        names = (
            "alpn", "client_version", "client_cipher", "upstream_version", "upstream_cipher",
            "verified",
        )  # fmt: skip
    told = {name: fields[name] for name in names if fields[name]}
    if fields["certificate_asked"]:
        told["certificate_asked"] = True
    found = [f"{mark}    tls           {printable(stage)}, {printable(mode)} {_values(told)}"]
    for each in fields["chain"]:
        found.append(printable(f"{each.get('subject', 'unreadable')}  sha256 {each['sha256']}"))
    return found


def _range(fields: dict[str, Any]) -> str:
    return f"{fields['side']}'s bytes {fields['offset']} to {fields['offset'] + fields['length']}"


def _hidden(fields: dict[str, Any]) -> list[str]:
    return [f".    hidden        {_range(fields)}: {printable(fields['kind'])}"]


def _withheld(fields: dict[str, Any]) -> list[str]:
    return [f"!    withheld      {_range(fields)}: {printable(fields['why'])}"]


def _gap(fields: dict[str, Any]) -> list[str]:
    numbers = ("bytes_up", "bytes_down", "packets", "count", "detail")
    told = {name: fields[name] for name in numbers if fields[name]}
    return [f"!    gap           {printable(fields['reason'])} {_values(told)}"]


def _alarm(fields: dict[str, Any]) -> list[str]:
    return [f"!    alarm         {printable(fields['kind'])} {_values(fields['detail'])}"]


def _decision(fields: dict[str, Any]) -> list[str]:
    told = f"{fields['action']} by {fields['actor']}: {fields['reason']} ({fields['outcome']})"
    return [f"!    decision      {printable(told)}"]


def _value(value: Any) -> str:
    return printable(json.dumps(value, ensure_ascii=False))


def _values(values: dict[str, Any]) -> str:
    return " ".join(
        f"{printable(name)}={printable(value) if isinstance(value, str) else _value(value)}"
        for name, value in values.items()
        if value not in ("", None)
    )


_TELLS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "SessionOpen": _open,
    "Attributed": _attributed,
    "Detected": _detected,
    "Operation": _operation,
    "Result": _result,
    "Fact": _fact,
    "Hidden": _hidden,
    "Withheld": _withheld,
    "Gap": _gap,
    "Alarm": _alarm,
    "Decision": _decision,
    "Tls": _tls,
    "SessionClose": _close,
}
