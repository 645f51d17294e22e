"""The one configuration: strict TOML in, frozen dataclasses out.

Every process loads it at start and never again. An unknown key, a wrong type or a bad value is a
`ConfigError` with file, line, key and hint, and the process ends with exit code 78. The fields'
`#:` comments are the reference that docs/configuration.md is checked against. This module knows no
meaning beyond shape: overlapping accounts, for example, are found by
`appliance.attribution.accounts`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import ipaddress
import re
import tomllib
import types
import typing
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from appliance.ports import Ports

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
EVERYWHERE = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))
EXIT_CONFIG = 78
_NAME = re.compile(r"[!#$%&'*+.^_`|~\w-]{1,64}", re.ASCII)

#: What numbers may be, both ends included; docs/configuration.md tells them.
BOUNDS: dict[str, tuple[float, float]] = {
    "gate.workers": (0, 256),
    "gate.listen_port": (1, 65535),
    "gate.connect_timeout_s": (0.1, 3600),
    "gate.detect_ms": (1, 60_000),
    "gate.max_sessions": (1, 1_000_000),
    "evidence.segment_bytes": (8 << 20, 1 << 36),
    "evidence.segment_s": (0, 86_400),
    "evidence.chunk_count": (3, 1024),
    "evidence.commit_ms": (1, 10_000),
    "evidence.reserve_bytes": (0, 1 << 36),
    "evidence.checkpoint_s": (1, 5),
    "evidence.rewrite_s": (0, 86_400),
    "attribution.wait_ms": (0, 60_000),
    "attribution.replay_entries": (1 << 10, 1 << 26),
    "review.port": (1, 65535),
}
#: What is held back must take what two chunks of memory hold.
LEAST_RESERVE_BYTES = 8 << 20
MOST_NAME_BYTES = 128
_PROTOCOLS = frozenset({"tcp", "udp", "icmp", *map(str, range(256))} - {"6"})


class ConfigError(Exception):
    """The configuration cannot be used; one line says where, what and what to do."""

    def __init__(self, path: str, line: int, key: str, problem: str, hint: str = "") -> None:
        where = f"{path}:{line}" if line else path
        super().__init__(f"{where}: {key}: {problem}" + (f" ({hint})" if hint else ""))
        self.key = key
        self.line = line
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Paths:
    """[paths]"""

    state: Path = Path("/var/lib/narrows")  #: keys, evidence, ledger, index
    run: Path = Path("/run/narrows")  #: sockets and memory of this boot; must be tmpfs
    blob: Path = Path("/usr/lib/narrows/sensor.blob")  #: compiled BPF programs


@dataclass(frozen=True, slots=True)
class Gate:
    """[gate]"""

    workers: int = 0  #: processes; 0 means one a core
    listen_port: int = 15001  #: port of the transparent listeners
    connect_timeout_s: float = 10.0  #: for the upstream connection
    #: how long the first bytes of a client may be undecided before its session is opaque
    detect_ms: int = 200
    max_sessions: int = 9000  #: per worker; above it connections wait in the backlog


@dataclass(frozen=True, slots=True)
class Redirect:
    """[redirect]"""

    clients: tuple[Network, ...] = ()  #: subnets whose traffic is redirected
    bypass: tuple[Network, ...] = ()  #: destinations that are routed and not touched
    management: tuple[Network, ...] = ()  #: networks that clients may never reach through the gate
    quic_reject: bool = True  #: reject UDP/443, so that QUIC falls back to TCP


@dataclass(frozen=True, slots=True)
class Evidence:
    """[evidence]"""

    segment_bytes: int = 256 << 20  #: size of a segment file, preallocated
    segment_s: int = 300  #: a segment is ended when it is so old, so that it can be rewritten
    chunk_count: int = 6  #: 4 MiB pieces of memory per worker
    commit_ms: int = 50  #: longest time that evidence is in memory only
    reserve_bytes: int = 32 << 20  #: disk held back per writer for an orderly stop
    checkpoint_s: int = 5  #: longest time between signed checkpoints
    rewrite_s: int = 30  #: how long a finished segment is left as it is


@dataclass(frozen=True, slots=True)
class Attribution:
    """[attribution]"""

    wait_ms: int = 50  #: longest wait for an owner before the first upstream byte
    #: what to do with a forged or replayed identity
    on_forged: Literal["continue", "refuse"] = "continue"
    replay_entries: int = 1 << 18  #: size of the replay cache that the workers share


@dataclass(frozen=True, slots=True)
class Sensor:
    """[sensor]"""

    #: subtree whose processes are seen, below the cgroup v2 mount; "" is all of it
    cgroup: str = ""
    prefixes: tuple[Network, ...] = ()  #: destinations towards which the SYN option is written
    covers: tuple[Network, ...] = ()  #: client addresses that this sensor answers for
    host: str = ""  #: name of this host in owner records; "" is the host name


@dataclass(frozen=True, slots=True)
class Review:
    """[review]"""

    address: str = "127.0.0.1"  #: address that the review API listens on; never a client network's
    port: int = 8443  #: and its port
    certificate: str = ""  #: PEM file; "" is review.crt in the state directory, made by itself
    key: str = ""  #: PEM file, mode 0600; "" is review.key in the state directory


@dataclass(frozen=True, slots=True)
class Http:
    """[http]"""

    #: headers whose values are never in the clear, besides those of docs/protocols/http1.md
    secret_headers: tuple[str, ...] = ()
    #: query parameters whose values are never in the clear, besides those listed there
    secret_parameters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tls:
    """[tls]"""

    #: certificate of the gate's own authority; empty: ca.pem in `paths.state`, made when it is
    #: not there
    ca: str = ""
    ca_key: str = ""  #: its key, mode 0600; empty: ca.key in `paths.state`


@dataclass(frozen=True, slots=True)
class Route:
    """[[route]], first match wins"""

    name: str
    destinations: tuple[Network, ...] = EVERYWHERE  #: destination networks
    ports: Ports = field(default_factory=Ports)  #: destination ports
    protocol: str = "tcp"  #: "tcp", "udp", "icmp" or an IP protocol number
    #: "allow" is for what is not TCP: routed and counted
    action: Literal["intercept", "allow"] = "intercept"
    durability: Literal["write", "fsync"] = "write"  #: when bytes may leave
    on_evidence_failure: Literal["closed", "open"] = "closed"  #: when evidence cannot be written
    on_failure: Literal["closed", "bypass"] = "closed"  #: when no gate process is there
    source: Literal["client", "gate"] = "client"  #: whose address the upstream sees
    tls: Literal["intercept", "passthrough"] = "passthrough"  #: whether TLS is opened
    #: how the upstream's certificate is checked where TLS is opened
    tls_verify: Literal["system", "pinned", "off"] = "system"
    tls_ca: str = ""  #: file of the authorities that "pinned" means
    tls_certificate: str = ""  #: file of the server's own certificate (chain), to show to clients
    tls_key: str = ""  #: its key, mode 0600
    #: "plain": TLS ends at the gate, and the upstream is spoken to in the clear
    tls_upstream: Literal["tls", "plain"] = "tls"


@dataclass(frozen=True, slots=True)
class Match:
    """[account.match], all given selectors must hold"""

    cgroup: str = ""  #: cgroup path, or a path and everything below it when it ends in "/*"
    unit: str = ""  #: systemd unit
    container: str = ""  #: container id, or its first 12 letters
    exe: str = ""  #: path of the executable
    exe_sha256: str = ""  #: digest of the executable
    uid: int = -1  #: user id
    network: tuple[Network, ...] = ()  #: client addresses


@dataclass(frozen=True, slots=True)
class Account:
    """[[account]]"""

    name: str
    owner: str  #: person or team that answers for it
    purpose: str
    ticket: str = ""
    expires: date | None = None  #: last day on which it is known
    match: Match = field(default_factory=Match)


@dataclass(frozen=True, slots=True)
class Config:
    """Everything; `sha256` is that of the file."""

    paths: Paths = field(default_factory=Paths)
    gate: Gate = field(default_factory=Gate)
    redirect: Redirect = field(default_factory=Redirect)
    evidence: Evidence = field(default_factory=Evidence)
    attribution: Attribution = field(default_factory=Attribution)
    sensor: Sensor = field(default_factory=Sensor)
    tls: Tls = field(default_factory=Tls)
    review: Review = field(default_factory=Review)
    http: Http = field(default_factory=Http)
    route: tuple[Route, ...] = ()
    account: tuple[Account, ...] = ()
    file: str = ""
    sha256: str = ""


def load(path: Path) -> Config:
    """Return the configuration in `path`; ConfigError when it cannot be used."""
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as wrong:
        why = wrong.strerror if isinstance(wrong, OSError) else wrong
        hint = "--config FILE or $NARROWS_CONFIG names another; a lab that is up has its own"
        raise ConfigError(str(path), 0, "file", f"cannot be read: {why}", hint) from wrong
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as wrong:
        found = re.search(r"line (\d+)", str(wrong))
        raise ConfigError(str(path), int(found[1]) if found else 0, "syntax", str(wrong)) from wrong
    reader = _Reader(str(path), text)
    config: Config = reader.table(Config, tree, "")
    reader.check(config)
    return dataclasses.replace(config, file=str(path), sha256=hashlib.sha256(content).hexdigest())


class _Reader:
    """Turns TOML tables into dataclasses and knows where a key stands."""

    def __init__(self, path: str, text: str) -> None:
        self._path = path
        self._lines = text.splitlines()

    def fail(self, key: str, problem: str, hint: str = "") -> ConfigError:
        name = re.sub(r"\[\d+\]", "", key).rpartition(".")[2]
        pattern = re.compile(rf"\s*(\[+.*\b{re.escape(name)}\b.*\]+|\"?{re.escape(name)}\"?\s*=)")
        line = next((n for n, text in enumerate(self._lines, 1) if pattern.match(text)), 0)
        return ConfigError(self._path, line, key, problem, hint)

    def table(self, kind: Any, values: Any, key: str) -> Any:
        if not isinstance(values, dict):
            raise self.fail(key, "must be a table")
        hints = typing.get_type_hints(kind)
        known = {f.name: f for f in dataclasses.fields(kind) if f.name not in {"file", "sha256"}}
        given = {}
        for name, value in values.items():
            full = f"{key}.{name}" if key else name
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
                raise self.fail(full, "unknown key", hint)
            given[name] = self.value(hints[name], value, full)
        for name, spec in known.items():
            required = (
                spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
            )
            if required and name not in given:
                raise self.fail(f"{key}.{name}" if key else name, "is required")
        return kind(**given)

    def value(self, hint: Any, value: Any, key: str) -> Any:
        if dataclasses.is_dataclass(hint) and hint is not Ports:
            return self.table(hint, value, key)
        if hint is Ports:
            return self._converted(Ports.parse, value, key)
        if get_origin(hint) is tuple:
            return self._list(get_args(hint)[0], value, key)
        if get_origin(hint) is Literal:
            if value not in get_args(hint):
                raise self.fail(
                    key, f"{value!r} is not allowed", "one of " + ", ".join(get_args(hint))
                )
            return value
        if hint is Path:
            if not isinstance(value, str) or not value.startswith("/"):
                raise self.fail(key, "must be an absolute path")
            return Path(value)
        if get_origin(hint) is types.UnionType and date in get_args(hint):
            if type(value) is not date:
                raise self.fail(key, "must be a date such as 2027-01-31")
            return value
        return self._plain(hint, value, key)

    def _plain(self, hint: Any, value: Any, key: str) -> Any:
        if hint is float and type(value) is int:
            value = float(value)
        if type(value) is not hint:
            raise self.fail(key, f"must be {'text' if hint is str else hint.__name__}")
        if hint in (int, float) and value < 0:
            raise self.fail(key, "must not be negative")
        return value

    def _list(self, item: Any, value: Any, key: str) -> Any:
        if not isinstance(value, list):
            raise self.fail(key, "must be a list")
        if dataclasses.is_dataclass(item):
            return tuple(self.table(item, entry, f"{key}[{n}]") for n, entry in enumerate(value))
        convert = _name if item is str else _network
        return tuple(self._converted(convert, entry, key) for entry in value)

    def _converted(self, convert: Any, value: Any, key: str) -> Any:
        try:
            return convert(value)
        except (ValueError, TypeError) as wrong:
            raise self.fail(key, str(wrong)) from wrong

    def check(self, config: Config) -> None:
        """Refuse values that fit their type and mean nothing."""
        for key, (low, high) in BOUNDS.items():
            table, _, name = key.partition(".")
            if not low <= getattr(getattr(config, table), name) <= high:  # NaN is out, too
                raise self.fail(key, f"must be {low} to {high}")
        if config.evidence.segment_bytes % 4096:
            raise self.fail("evidence.segment_bytes", "must be a multiple of 4096")
        reserve = config.evidence.reserve_bytes
        if reserve and (reserve % 4096 or reserve < LEAST_RESERVE_BYTES):
            problem = f"must be 0, or a multiple of 4096 from {LEAST_RESERVE_BYTES} on"
            raise self.fail("evidence.reserve_bytes", problem)
        self._check_review(config.review)
        for kind, entries in (("route", config.route), ("account", config.account)):
            names = [entry.name for entry in entries]
            for name in names:
                self._check_name(f"{kind}.name", name)
            double = next((name for name in names if names.count(name) > 1), None)
            if double is not None:
                raise self.fail(f"{kind}.name", f"{double!r} is there twice")
        for route in config.route:
            self._check_protocol(route)
            self._check_tls(route)
        self._check_pair("tls.ca", config.tls.ca, "tls.ca_key", config.tls.ca_key)
        for account in config.account:
            if account.match == Match():
                raise self.fail("account.match", f"account {account.name!r} has no selector")

    def _check_review(self, review: Review) -> None:
        try:
            ipaddress.ip_address(review.address)
        except ValueError as wrong:
            raise self.fail("review.address", "must be an IP address") from wrong
        for name, path in (("certificate", review.certificate), ("key", review.key)):
            if path and not path.startswith("/"):
                raise self.fail(f"review.{name}", "must be an absolute path")
        if bool(review.certificate) != bool(review.key):
            raise self.fail("review.key", "certificate and key belong together", "give both")

    def _check_name(self, key: str, name: str) -> None:
        """Names stand in records, tables, kernel objects and the lab's paths."""
        usable = name.isprintable() and name == name.strip() and "/" not in name
        if not usable or not 0 < len(name.encode()) <= MOST_NAME_BYTES or name in {".", ".."}:
            hint = (
                f"1 to {MOST_NAME_BYTES} bytes of printable characters, no /, no space at the ends"
            )
            raise self.fail(key, f"{name[:MOST_NAME_BYTES]!r} is no name", hint)

    def _check_protocol(self, route: Route) -> None:
        if route.protocol not in _PROTOCOLS:
            hint = '"tcp", "udp", "icmp" or the number of another'
            raise self.fail("route.protocol", f"{route.protocol!r} is not known", hint)
        if (route.action == "allow") == (route.protocol == "tcp"):
            hint = "TCP is intercepted, everything else is allowed or dropped"
            raise self.fail(
                "route.action", f"{route.action!r} does not fit {route.protocol!r}", hint
            )

    def _check_tls(self, route: Route) -> None:
        """Refuse a route whose `tls_...` keys do not fit together."""
        certificate, key = route.tls_certificate, route.tls_key
        self._check_pair("route.tls_certificate", certificate, "route.tls_key", key)
        self._check_pair("route.tls_ca", route.tls_ca, "", route.tls_ca)
        if (route.tls_verify == "pinned") != bool(route.tls_ca):
            name = "route.tls_ca" if route.tls_ca else "route.tls_verify"
            raise self.fail(name, '"pinned" and tls_ca go together')
        if route.tls == "passthrough":
            opening = {"certificate": certificate, "ca": route.tls_ca}
            opening["upstream"] = route.tls_upstream.removeprefix("tls")
            for name in (name for name, value in opening.items() if value):
                hint = 'set tls = "intercept"'
                raise self.fail(f"route.tls_{name}", "TLS is not opened here", hint)

    def _check_pair(self, key: str, value: str, other: str, value2: str) -> None:
        if bool(value) != bool(value2):
            raise self.fail(key if value else other, "a certificate and its key go together")
        if any(path and not path.startswith("/") for path in (value, value2)):
            raise self.fail(key, "must be an absolute path")


def _name(value: Any) -> str:
    if not (isinstance(value, str) and _NAME.fullmatch(value)):
        raise ValueError(f"{value!r} is no name of a header or parameter")
    return value


def _network(value: Any) -> Network:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no network")
    return ipaddress.ip_network(value)
