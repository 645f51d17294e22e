"""`narrows config check|show|example`: is the configuration valid, what is in force, how one looks.

They read no evidence.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance.attribution import check_overlaps
from appliance.cli import settings
from appliance.cli.example import EXAMPLE
from appliance.cli.outcome import OK
from appliance.ports import Ports
from capture import plainjson

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from appliance.config import Config


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's words."""
    verbs = parser.add_subparsers(required=True, metavar="check|show|example", dest="verb")
    check = verbs.add_parser("check", help="say whether the configuration can be used")
    show = verbs.add_parser("show", help="print what is in force, defaults too")
    show.add_argument("--json", action="store_true", help="print JSON")
    verbs.add_parser("example", help="print a commented example")
    for verb in (check, show):
        settings.add_config(verb)


def run(words: argparse.Namespace) -> int:
    """Run one verb; exit 78 when the configuration cannot be used."""
    if words.verb == "example":
        print(EXAMPLE, end="")
        return OK
    config = settings.chosen(words)
    check_overlaps(config.account, config.file)
    if words.verb == "check":
        print(f"{config.file}: valid, SHA-256 {config.sha256}")
    elif words.json:
        told = {"file": config.file, "sha256": config.sha256, **_values(config)}
        print(plainjson.dumps(told))
    else:
        print("\n".join(_toml(_values(config), "")))
    return OK


def _values(config: Config) -> dict[str, Any]:
    found: dict[str, Any] = _plain(config)
    return {name: value for name, value in found.items() if name not in {"file", "sha256"}}


def _plain(value: Any) -> Any:
    """Return a value of the configuration as the TOML that means it."""
    if isinstance(value, Ports):
        return [str(low) if low == high else f"{low}-{high}" for low, high in value.ranges]
    if dataclasses.is_dataclass(value):
        return {
            field.name: _plain(inner)
            for field in dataclasses.fields(value)
            if (inner := getattr(value, field.name)) is not None
        }
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    if isinstance(value, Path | ipaddress.IPv4Network | ipaddress.IPv6Network | date):
        return str(value)
    return value


def _toml(table: dict[str, Any], name: str) -> Iterator[str]:
    """Yield a table: its own keys first, then the tables inside it."""
    inner: list[tuple[str, str, dict[str, Any]]] = []
    for key, value in table.items():
        full = f"{name}.{key}" if name else key
        if isinstance(value, dict):
            inner.append((f"\n[{full}]", full, value))
        elif value and isinstance(value, list) and isinstance(value[0], dict):
            inner += [(f"\n[[{full}]]", full, item) for item in value]
        elif key == "expires":
            yield f"{key} = {value}"
        elif not (key == "uid" and value < 0):
            yield f"{key} = {json.dumps(value)}"
    for head, full, values in inner:
        yield head
        yield from _toml(values, full)
