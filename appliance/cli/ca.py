"""`narrows ca export`: the certificate that clients must trust where the gate opens TLS.

It reads no evidence. The authority is made when there is none yet, so that its certificate can be
given out before the first session.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.cli import settings
from appliance.cli.outcome import OK, UNAVAILABLE, Refusal
from appliance.proxy.tls import Authority
from appliance.proxy.tls.authority import pem
from capture.errors import KeyFileError

if TYPE_CHECKING:
    import argparse

    from cryptography.x509 import Certificate

    from appliance.config import Config


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's words."""
    verbs = parser.add_subparsers(required=True, metavar="export", dest="verb")
    export = verbs.add_parser("export", help="print the authority's certificate as PEM")
    export.add_argument("--output", type=Path, metavar="FILE", help="write it there instead")
    settings.add_config(export)


def run(words: argparse.Namespace) -> int:
    """Print the certificate, never the key."""
    text = pem(_certificate(settings.chosen(words))).decode("ascii")
    if words.output is None:
        sys.stdout.write(text)
        return OK
    try:
        words.output.write_text(text, encoding="ascii")
    except OSError as wrong:
        raise Refusal(f"{words.output} cannot be written: {wrong.strerror}") from wrong
    return OK


def _certificate(config: Config) -> Certificate:
    try:
        return Authority.load_or_create(config).certificate
    except (OSError, KeyFileError) as wrong:
        raise Refusal(f"the authority cannot be read: {wrong}", code=UNAVAILABLE) from wrong
