"""`narrows sessions list|show|export`: find sessions, read one, hand some over.

A list on a terminal shows the newest 100 unless `--limit` says otherwise; `--json` and exports give
everything. All of them hold one session at a time in memory.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from appliance.cli import settings
from appliance.cli.conversation import Conversation, header
from appliance.cli.outcome import FAILED, OK, USAGE, Refusal
from appliance.cli.printable import printable
from appliance.cli.reading import Evidence, evidence, tell_damage
from capture import index_query, plainjson
from capture.errors import ExportError
from capture.export import capturefile, ocsf, ocsf_records, raw
from capture.index_query import Filter, State
from capture.index_search import NoWords, expressions
from capture.moment import nanoseconds, rfc3339
from capture.session_json import SECTIONS, operation_objects, record_objects, session_object

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from capture.index import Index
    from capture.index_query import Session
    from capture.reader import Reader

TERMINAL_LIMIT = 100
EXPORT_BATCH = 500  #: sessions that are named in the evidence before their bytes are shown
_MOST = (1 << 63) - 1  #: of an integer in the index
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_COLUMNS = "{:13}  {:20}  {:16} {:28} {:11} {:21} {:>5} {:>10} {:>10}  {}"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's words."""
    verbs = parser.add_subparsers(required=True, metavar="list|show|export", dest="verb")
    listed = verbs.add_parser("list", help="list sessions, newest first")
    listed.add_argument("-q", "--query", metavar="TEXT", help="words that are in the session")
    listed.add_argument("--account", metavar="NAME", help="of this service account")
    listed.add_argument("--unknown", action="store_true", help="without a service account")
    listed.add_argument(
        "--since", metavar="TIME", type=_time,
        help="started at or after a time (2026-11-22T03:00:00Z) or so long ago (30m, 2h, 7d)",
    )  # fmt: skip
    listed.add_argument(
        "--until", metavar="TIME", type=_time, help="started before a time, likewise"
    )
    listed.add_argument("--state", choices=[state.value for state in State])
    listed.add_argument(
        "--limit", type=_count, metavar="N",
        help=f"at most so many, 0 for all (default: {TERMINAL_LIMIT}, with --json all)",
    )  # fmt: skip
    shown = verbs.add_parser("show", help="print one session as a conversation")
    shown.add_argument("id", metavar="ID", help="session, or the beginning of its id")
    shown.add_argument("--all", action="store_true", help="leave nothing out")
    shown.add_argument("--bytes", action="store_true", help="show bytes of decoded protocols too")
    exported = verbs.add_parser("export", help="write sessions in a format of others")
    exported.add_argument(
        "ids", nargs="*", metavar="ID", help="session, or the beginning of its id"
    )
    exported.add_argument("--all", action="store_true", help="every session")
    exported.add_argument("--format", choices=["ndjson", "raw", "pcapng"], default="ndjson")
    exported.add_argument(
        "--output", metavar="DIR",
        help="folder to write to, - for standard output (default: - for ndjson, else .)",
    )  # fmt: skip
    for verb in (listed, shown):
        verb.add_argument("--json", action="store_true", help="print JSON")
    for verb in (listed, shown, exported):
        settings.add_config(verb)


def run(words: argparse.Namespace) -> int:
    """Run one verb."""
    if words.verb == "export":
        if words.all == bool(words.ids):
            raise Refusal("which sessions?", "name some, or give --all", code=USAGE)
        if words.format == "raw" and words.output == "-":
            hint = "--output names a folder"
            raise Refusal("raw writes two files a session", hint, code=USAGE)
        if words.format == "pcapng" and words.output == "-" and sys.stdout.isatty():
            raise Refusal("pcapng is not for a terminal", "redirect it", code=USAGE)
    if words.verb == "list":
        _check_words(words)
    verbs: dict[str, Callable[[Evidence, argparse.Namespace], int]] = {
        "list": _list, "show": _show, "export": _export,
    }  # fmt: skip
    with evidence(words) as opened:
        return verbs[words.verb](opened, words)


def _time(text: str) -> int:
    """Return nanoseconds; what the index cannot hold (years 1677 to 2262) is its first or last."""
    ago = re.fullmatch(r"(\d{1,9})([smhd])", text)
    if ago:
        return _held(time.time_ns() - int(ago[1]) * _UNITS[ago[2]] * 1_000_000_000)
    try:
        return _held(nanoseconds(text))
    except (ValueError, OverflowError) as wrong:
        raise argparse.ArgumentTypeError(
            f"{printable(text)} is neither a time such as 2026-11-22T03:00:00Z nor a while like 2h"
        ) from wrong


def _held(number: int) -> int:
    return max(-_MOST, min(number, _MOST))


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 4000:
        raise argparse.ArgumentTypeError(f"{printable(text[:100])} is no count")
    return min(int(text), _MOST // 2)


def _check_words(words: argparse.Namespace) -> None:
    """Refuse a search that cannot find anything. Words are compared with recorded texts, in which
    bytes that are no UTF-8 are backslash escapes.
    """
    if words.account is not None:
        words.account = _as_recorded(words.account)
    if words.query is None:
        return
    words.query = _as_recorded(words.query)
    try:
        expressions(words.query)
    except NoWords as wrong:
        raise Refusal(f"-q {printable(words.query)}: {wrong}", code=USAGE) from wrong


def _as_recorded(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


# -- list


def _list(opened: Evidence, words: argparse.Namespace) -> int:
    opened.record("search" if words.query else "list")
    limit = words.limit
    if limit is None:
        limit = 0 if words.json else TERMINAL_LIMIT
    asked = limit + 1 if limit and not words.json else limit  # one more shows whether there are any
    state = None if words.state is None else State(words.state)
    chosen = Filter(
        words.query or "", words.account, words.unknown, words.since, words.until, state, asked
    )
    with opened.index() as index:
        found = index_query.sessions(index, chosen)
        if words.json:
            _print_array(map(session_object, found))
        else:
            _print_table(found, limit)
    return OK


def _print_array(objects: Iterable[Any]) -> None:
    """Print a JSON array, one object a line."""
    separator = "["
    for item in objects:
        sys.stdout.write(f"{separator}\n{plainjson.dumps(item)}")
        separator = ","
    print("\n]" if separator == "," else "[]")


def _print_table(found: Iterator[Session], limit: int) -> None:
    names = ("session", "started", "account", "process", "protocol", "target", "ops", "up", "down")
    print(_COLUMNS.format(*names, "state"))
    for count, session in enumerate(found):
        if limit and count == limit:
            print(f"narrows: only the newest {limit}; --limit 0 shows all", file=sys.stderr)
            break
        owner = session.owner or {}
        process = f"{owner.get('exe', '?')} [{owner.get('pid', '?')}]" if owner else "-"
        account = session.account or f"unknown ({session.unknown or '-'})"
        started = rfc3339(session.started)[:19] + "Z"
        texts = (account, process, session.protocol or "-", session.target or "-")
        numbers = (session.operations, session.bytes_up, session.bytes_down)
        shown = map(printable, texts)
        print(_COLUMNS.format(session.name, started, *shown, *numbers, session.state.value))


# -- show


def _show(opened: Evidence, words: argparse.Namespace) -> int:
    with opened.index() as index:
        [session] = opened.named(index, "show", [words.id])
        opened.record("show", [session])
        reader = opened.reader(index)
        if words.json:
            _print_object(reader, session)
        else:
            for line in header(session):
                print(line)
            print()
            for line in Conversation(
                reader, session, everything=words.all, raw=words.bytes
            ).lines():
                print(line)
        damaged = tell_damage(reader)
        reader.close()
    return FAILED if damaged else OK


def _print_object(reader: Reader, session: Session) -> None:
    """Print one object; each list is a pass over the session, so that none is held in memory."""
    head: dict[str, Any] = {**session_object(session)}
    del head["operations"]  # the number; here the operations themselves have that name
    sys.stdout.write(plainjson.dumps(head)[:-1] + ',\n"operations":')
    _print_array(operation_objects(reader.records(session.number)))
    for section, kind in SECTIONS.items():
        sys.stdout.write(f',"{section}":')
        _print_array(record_objects(reader.records(session.number), kind))
    print("}")


# -- export


def _export(opened: Evidence, words: argparse.Namespace) -> int:
    try:
        return _exported(opened, words)
    except ExportError as wrong:
        raise Refusal(f"the export cannot be made: {wrong}") from wrong


def _exported(opened: Evidence, words: argparse.Namespace) -> int:
    target = words.output or ("-" if words.format == "ndjson" else ".")
    folder = None if target == "-" else _folder(Path(target))
    with opened.index() as index:
        reader = opened.reader(index)
        if words.all:
            everything = Filter(until=time.time_ns(), oldest_first=True)
            for batch in _batches(index_query.sessions(index, everything)):
                opened.record("export", batch)
                _write(reader, batch, words.format, folder)
            if words.format == "ndjson":
                opened.record("export")
                _write_records(index, folder)
        else:
            batch = opened.named(index, "export", words.ids)
            opened.record("export", batch)
            _write(reader, batch, words.format, folder)
        damaged = tell_damage(reader)
        reader.close()
    return FAILED if damaged else OK


def _folder(path: Path) -> Path:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as wrong:
        raise Refusal(f"{path} cannot be written to: {wrong.strerror}") from wrong
    return path


def _batches(found: Iterator[Session]) -> Iterator[list[Session]]:
    batch: list[Session] = []
    for session in found:
        batch.append(session)
        if len(batch) == EXPORT_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _write(reader: Reader, batch: list[Session], form: str, folder: Path | None) -> None:
    if form == "pcapng" and folder is None:
        _write_lines(capturefile.export(reader, batch), None, "")  # a section for each
        return
    for session in batch:
        if form == "raw":
            assert folder is not None, "checked before anything was read"
            for blank in raw.export(reader, session, folder):
                print(
                    f"narrows: {blank.path}: {blank.length} bytes at {blank.offset} are zero:"
                    f" {printable(blank.why)}",
                    file=sys.stderr,
                )
        elif form == "pcapng":
            _write_lines(capturefile.export(reader, [session]), folder, f"{session.name}.pcapng")
        else:
            _write_lines(ocsf.export(reader, session), folder, f"{session.name}.ndjson")


def _write_records(index: Index, folder: Path | None) -> None:
    """Write what is neither an operation nor a session."""
    events = index_query.events(index, *ocsf_records.KNOWN)
    _write_lines(map(ocsf_records.record_line, events), folder, "records.ndjson")


def _write_lines(lines: Iterable[bytes], folder: Path | None, name: str) -> None:
    if folder is None:
        output: BinaryIO = sys.stdout.buffer
        output.writelines(lines)
        output.flush()
        return
    with raw.whole_file(folder / name) as file:
        file.writelines(lines)
