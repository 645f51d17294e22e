"""`python -m capture.verify STATE_DIR`: exit 0 valid, 1 invalid, 2 incomplete, 64 usage."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NoReturn

from capture.verify.check import verify

_USAGE = 64


class _Parser(argparse.ArgumentParser):
    """Leaves exit code 2 to incomplete evidence."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """End the program; a usage error has code 64."""
        if message:
            sys.stderr.write(message)
        sys.exit(_USAGE if status == 2 else status)


def main(words: list[str] | None = None) -> int:
    """Verify as the words of the command line say; return the exit code."""
    parser = _Parser(prog="python -m capture.verify", description=__doc__)
    parser.add_argument("state", type=Path, help="the state directory, or a copy of it")
    parser.add_argument("what", nargs="?", default="all", help="all, a segment or a session")
    parser.add_argument("--ledger-key", help="the log's verifier key, or a file that holds it")
    parser.add_argument("--key", type=Path, help="the appliance's key file")
    parser.add_argument(
        "--checkpoint", type=Path, action="append", default=[], help="a checkpoint that you kept"
    )
    parser.add_argument("--json", action="store_true")
    given = parser.parse_intermixed_args(words)
    vkey = given.ledger_key
    try:
        if vkey is not None and "+" not in vkey:
            vkey = Path(vkey).read_text("ascii")
        report = verify(given.state, given.what, vkey, key=given.key, kept=given.checkpoint)
    except (OSError, ValueError) as wrong:
        parser.error(str(wrong))
    print(json.dumps(report.json(), indent=2) if given.json else report.text())
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
