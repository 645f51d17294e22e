"""`narrows evidence verify|reindex|seal|log`: is it whole, make the index anew, seal it now, what
happened to it.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance.cli import settings
from appliance.cli.outcome import FAILED, OK, USAGE, Refusal
from appliance.cli.printable import printable
from appliance.cli.reading import Evidence, evidence
from capture import index_query, plainjson, records
from capture.compression import decompress
from capture.crypt import credential
from capture.errors import EvidenceError
from capture.index_fill import rebuild
from capture.seal import Seal, SealRuns
from capture.sealed import RewriteSettings
from capture.session_json import event_object
from capture.verify import verify

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

SEAL_PACE_S = 0.2
SEAL_PATIENCE_S = 10.0  #: longest wait for a file that a verifier keeps

#: What `log` shows: records that are not about one session's content.
LOGGED = (
    records.Gap, records.Access, records.Decision, records.Alarm, records.Refused, records.Flow,
    records.Start, records.Stop, records.Recovered,
)  # fmt: skip
#: Only shown when asked for: one a worker every few seconds.
FREQUENT = (records.Heartbeat,)
_NAMES = {kind.__name__.lower(): records.KINDS[kind] for kind in (*LOGGED, *FREQUENT)}
_WHOLE = re.compile("all|[0-9a-f]{8}|[0-9a-hjkmnp-tv-z]{13}")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's words."""
    verbs = parser.add_subparsers(required=True, metavar="verify|reindex|seal|log", dest="verb")
    checked = verbs.add_parser(
        "verify", help="check the evidence: 0 valid, 1 invalid, 2 incomplete"
    )
    checked.add_argument(
        "what", nargs="?", default="all", metavar="SEGMENT|SESSION|all", help="default: all"
    )
    checked.add_argument("--ledger-key", metavar="FILE|KEY", help="the log's key that you trust")
    checked.add_argument(
        "--checkpoint", metavar="FILE", action="append", default=[],
        help="a checkpoint of the log that you kept; may be given several times",
    )  # fmt: skip
    checked.add_argument("--json", action="store_true", help="print JSON")
    anew = verbs.add_parser("reindex", help="make the search index anew from the segments")
    now = verbs.add_parser(
        "seal", help="sign what is on disk, and rewrite what is finished, without the seal process"
    )
    log = verbs.add_parser(
        "log", help="gaps, reads, decisions, alarms, refusals, flows, starts and stops"
    )
    log.add_argument("--kind", choices=sorted(_NAMES), help="only this kind")
    log.add_argument("--json", action="store_true", help="print JSON")
    for verb in (checked, anew, now, log):
        settings.add_config(verb)


def run(words: argparse.Namespace) -> int:
    """Run one verb."""
    verbs: dict[str, Callable[[Evidence, argparse.Namespace], int]] = {
        "verify": _verify, "reindex": _reindex, "seal": _seal, "log": _log,
    }  # fmt: skip
    with evidence(words) as opened:
        return verbs[words.verb](opened, words)


def _verify(opened: Evidence, words: argparse.Namespace) -> int:
    what = words.what.lower()
    if not _WHOLE.fullmatch(what):
        with opened.index() as index:
            [session] = opened.named(index, "verify", [what])
        what = session.name
    opened.record("verify")
    vkey, kept = _ledger_key(words.ledger_key), [_readable(name) for name in words.checkpoint]
    report = verify(
        opened.store.state, what, vkey, key=credential(), kept=kept, decompress=decompress
    )
    print(plainjson.dumps(report.json()) if words.json else report.text())
    return report.exit_code


def _ledger_key(given: str | None) -> str | None:
    """Return the verifier key that a file or the word itself holds."""
    if given is None or "+" in given:
        return given
    return _readable(given).read_text(encoding="utf-8").strip()


def _readable(name: str) -> Path:
    """Return the path of a file of plain text; Refusal when it cannot be read."""
    path = Path(name)
    try:
        path.read_text(encoding="utf-8")
    except (OSError, ValueError) as wrong:
        raise Refusal(f"{printable(name)} cannot be read: {wrong}", code=USAGE) from wrong
    return path


def _reindex(opened: Evidence, words: argparse.Namespace) -> int:
    del words
    opened.record("reindex")
    try:
        sessions = rebuild(opened.store, opened.keys)
    except EvidenceError as wrong:
        raise Refusal(str(wrong), "the old index is as it was") from wrong
    print(f"{sessions} sessions are in the index", file=sys.stderr)
    return OK


def _seal(opened: Evidence, words: argparse.Namespace) -> int:
    del words
    opened.record("seal")
    try:
        seal = Seal(opened.store, opened.keys, SEAL_PACE_S, RewriteSettings(after_s=-1))
    except SealRuns:
        print("the seal process runs, and does it", file=sys.stderr)
        return OK
    except (EvidenceError, OSError) as wrong:
        raise Refusal(str(wrong), "narrows evidence verify says what is wrong") from wrong
    left, changed = (-1, -1), time.monotonic()
    try:
        while seal.step() or (seal.backlog[0] and time.monotonic() - changed < SEAL_PATIENCE_S):
            if seal.backlog != left:
                left, changed = seal.backlog, time.monotonic()
            time.sleep(0.001)
    finally:
        seal.close()
    print(f"{seal.backlog[0]} finished segments are not rewritten", file=sys.stderr)
    return FAILED if seal.backlog[0] else OK


def _log(opened: Evidence, words: argparse.Namespace) -> int:
    opened.record("list")
    kinds = [_NAMES[words.kind]] if words.kind else [records.KINDS[kind] for kind in LOGGED]
    with opened.index() as index:
        for entry in map(event_object, index_query.events(index, *kinds)):
            if words.kind is None and _is_read(entry["fields"]):
                continue  # its Access record tells it
            if words.json:
                print(plainjson.dumps(entry))
            else:
                told = " ".join(f"{n}={_shown(v)}" for n, v in entry["fields"].items() if v)
                session = entry["session"] or "-"
                print(f"{entry['time']}  {entry['kind']:10} {session:13}  {told}")
    return OK


def _is_read(fields: dict[str, Any]) -> bool:
    """Say whether a Start or Stop record is that of a command like this one."""
    return fields.get("role") == "cli" or fields == {"reason": "read"}


def _shown(value: Any) -> str:
    return printable(value if isinstance(value, str) else plainjson.dumps(value))
