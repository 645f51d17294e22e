"""`narrows token create|list|revoke`: who may use the review API, and as what.

Making and revoking one is a Decision in the evidence, written before it is done.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from appliance.cli import settings
from appliance.cli.outcome import NOT_FOUND, OK, REFUSED, UNAVAILABLE, USAGE, Refusal
from appliance.cli.printable import printable
from appliance.web.tokens import Role, Token, Tokens, UnknownToken, make
from capture import plainjson
from capture.access import AccessLog
from capture.crypt import Keys
from capture.errors import EvidenceError, KeyFileError
from capture.store import Store

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from appliance.config import Config

_ROW = "{:8}  {:10}  {:20}  {:20}  {}"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's words."""
    verbs = parser.add_subparsers(required=True, metavar="create|list|revoke", dest="verb")
    create = verbs.add_parser("create", help="print a new token; it is kept nowhere")
    create.add_argument("--role", required=True, choices=[role.value for role in Role])
    create.add_argument("--name", default="", metavar="NAME", help="whose it is, for the record")
    listed = verbs.add_parser("list", help="list tokens, without what they are")
    listed.add_argument("--json", action="store_true", help="print JSON")
    revoke = verbs.add_parser("revoke", help="refuse a token from now on")
    revoke.add_argument("which", metavar="ID|NAME", help="token, or all of this name")
    for verb in (create, listed, revoke):
        settings.add_config(verb)


def run(words: argparse.Namespace) -> int:
    """Run one verb."""
    verbs: dict[str, Callable[[Config, argparse.Namespace], int]] = {
        "create": _create, "list": _list, "revoke": _revoke,
    }  # fmt: skip
    try:
        return verbs[words.verb](settings.chosen(words), words)
    except (KeyFileError, OSError) as wrong:
        hint = "run as root on the appliance, or name its configuration with --config"
        raise Refusal(f"tokens cannot be used: {wrong}", hint, code=UNAVAILABLE) from wrong


def _create(config: Config, words: argparse.Namespace) -> int:
    try:
        text, token = make(Role(words.role), words.name)
    except ValueError as wrong:
        raise Refusal(f"--name: {wrong}", code=USAGE) from wrong
    _record(config, "token-create", [token])
    Tokens(config.paths.state).add(token)
    print(text)
    return OK


def _list(config: Config, words: argparse.Namespace) -> int:
    tokens = Tokens(config.paths.state).all()
    if words.json:
        told = [
            {"id": t.id, "name": t.name, "role": t.role.value, "created": t.created,
             "revoked": t.revoked}
            for t in tokens
        ]  # fmt: skip
        print(plainjson.dumps(told))
        return OK
    print(_ROW.format("id", "role", "name", "created", "revoked"))
    for token in tokens:
        times = [time[:19] + "Z" if time else "-" for time in (token.created, token.revoked)]
        print(_ROW.format(token.id, token.role.value, printable(token.name) or "-", *times))
    return OK


def _revoke(config: Config, words: argparse.Namespace) -> int:
    tokens = Tokens(config.paths.state)
    try:
        chosen = tokens.chosen(words.which)
    except UnknownToken as wrong:
        hint = "narrows token list shows them"
        problem = f"no good token is called {printable(words.which)}"
        raise Refusal(problem, hint, code=NOT_FOUND) from wrong
    _record(config, "token-revoke", chosen)
    tokens.revoke(chosen)
    print(f"{len(chosen)} revoked", file=sys.stderr)
    return OK


def _record(config: Config, action: str, tokens: list[Token]) -> None:
    """Write the decision into the evidence; Refusal when that cannot be done."""
    store = Store(config.paths.state, config.paths.run)
    store.prepare()
    keys = Keys.load_or_create(store.state)
    try:
        with AccessLog(store, keys) as log:
            for token in tokens:
                log.decide(action, f"{token.id} {token.role.value} {token.name}".strip())
    except EvidenceError as wrong:
        hint = "nothing was changed; make space on the disk of the state directory"
        raise Refusal(f"the decision cannot be recorded: {wrong}", hint, code=REFUSED) from wrong
