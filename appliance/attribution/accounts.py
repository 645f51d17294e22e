"""The register of service accounts: whose a session is, and whether the declarations can be used.

The gate asks `Register.match` once per session; `narrows config check` and the gate's start call
`check_overlaps`, which turns declarations that can be seen to overlap into a `ConfigError` (exit
78). Pure: the date is passed in.

    one account matches              that account
    two or more match                nobody: ambiguous, with their names
    only expired accounts match      nobody: expired, with their names
    none matches                     nobody

An account past its `expires` day takes no part in overlaps and ambiguity, so that its successor may
take over its selectors. How strong the match is follows from the selectors: an account that names
nothing but source networks is known by `network`, however well the owner is known; any other by
`kernel`.
"""

from __future__ import annotations

import ipaddress
import itertools
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from appliance.attribution import selectors
from appliance.config import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import date

    from appliance.config import Account

KERNEL: Literal["kernel"] = "kernel"
NETWORK: Literal["network"] = "network"


@dataclass(frozen=True, slots=True)
class Found:
    """What the register says of one session."""

    account: str | None = None
    assurance: str = "none"  #: "kernel" or "network" when there is an account
    reason: str | None = None  #: "no-account", "ambiguous" or "expired" when there is none
    candidates: tuple[str, ...] = ()  #: the accounts that are ambiguous or expired


class Register:
    """The declared accounts, ready to be matched."""

    def __init__(self, accounts: Sequence[Account]) -> None:
        self._accounts = [(entry, selectors.given(entry.match)) for entry in accounts]
        self._by_network = [
            (entry, given) for entry, given in self._accounts if set(given) == {selectors.NETWORK}
        ]

    def match(self, owner: Mapping[str, Any] | None, client: str, today: date) -> Found:
        """Return whose session one from address `client` is.

        Without an owner only accounts that name nothing but networks can match.
        """
        address = ipaddress.ip_address(client.partition("%")[0])
        pool = self._by_network if owner is None else self._accounts
        matching = [
            (entry, given) for entry, given in pool if selectors.holds(given, owner, address)
        ]
        living = [(entry, given) for entry, given in matching if not _expired(entry, today)]
        if len(living) == 1:
            entry, given = living[0]
            by_network = set(given) == {selectors.NETWORK}
            return Found(entry.name, NETWORK if by_network else KERNEL)
        reason = "ambiguous" if living else "expired" if matching else "no-account"
        return Found(reason=reason, candidates=tuple(entry.name for entry, _ in living or matching))


def overlaps(accounts: Sequence[Account], today: date) -> list[tuple[Account, Account]]:
    """Return every pair of living accounts whose selectors can be seen to overlap."""
    living = [
        (entry, selectors.given(entry.match)) for entry in accounts if not _expired(entry, today)
    ]
    return [
        (one, other)
        for (one, mine), (other, theirs) in itertools.combinations(living, 2)
        if selectors.overlap(mine, theirs)
    ]


def check_overlaps(accounts: Sequence[Account], file: str, today: date | None = None) -> None:
    """Refuse declarations that cannot mean one account: ConfigError with the line in `file`."""
    today = today or datetime.now(UTC).date()
    for one, other in overlaps(accounts, today):
        shared = sorted(set(selectors.given(one.match)) & set(selectors.given(other.match)))
        problem = f"{other.name!r} overlaps {one.name!r} in {', '.join(shared)}"
        hint = "give one of them a selector that tells them apart"
        raise _error(file, other.name, problem, hint)
    for account in accounts:
        problem, hint = _unusable(account)
        if problem:
            raise _error(file, account.name, f"{account.name!r}: {problem}", hint)


def _unusable(account: Account) -> tuple[str, str]:
    match = account.match
    if match.container and not re.fullmatch(r"[0-9A-Za-z_.-]{12,}", match.container):
        return "container is no id", "give the full id, or its first 12 letters"
    if match.exe_sha256 and not re.fullmatch(r"[0-9A-Fa-f]{64}", match.exe_sha256):
        return "exe_sha256 is no digest", "sha256sum prints 64 hexadecimal digits"
    if match.exe and not match.exe.startswith("/"):
        return "exe is no absolute path", "the path that /proc/PID/exe shows"
    return "", ""


def _error(file: str, name: str, problem: str, hint: str) -> ConfigError:
    return ConfigError(file, _line(file, name), "account.match", problem, hint)


def _line(file: str, name: str) -> int:
    """Return the line that names the account; 0 when it cannot be told."""
    pattern = re.compile(rf"""\s*name\s*=\s*["']{re.escape(name)}["']""")
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((number for number, text in enumerate(lines, 1) if pattern.match(text)), 0)


def _expired(account: Account, today: date) -> bool:
    return account.expires is not None and account.expires < today
