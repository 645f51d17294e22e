"""Where a lab lives: its namespaces, its cgroup, its folders; and the configuration of its gate.

The lab of `./run lab` has the prefix "narrows"; tests and the demo's tests make others beside it.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from appliance.lab import cgroups, state
from appliance.lab.certificates import Certificates
from appliance.lab.topology import MANAGEMENT_GATE, Topology

if TYPE_CHECKING:
    from appliance.config import Config

DEFAULT = Path(__file__).with_name("default.toml")
BLOB = Path(__file__).parents[2] / "build" / "sensor.blob"
UNASSIGNED = "unassigned"  #: cgroup of what runs without an account


@dataclass(frozen=True, slots=True)
class Place:
    """The names and folders of one lab. `memory` must be on a tmpfs, `disk` must not."""

    prefix: str = "narrows"
    folder: Path = state.FOLDER  #: lab.json, configuration, logs
    disk: Path = Path("/var/lib/narrows-lab")  #: the gate's state, the servers' files
    memory: Path = Path("/dev/shm/narrows-lab")  # noqa: S108 - the boot's memory is what it is
    management: bool = True

    @property
    def topology(self) -> Topology:
        """Return the lab's network namespaces."""
        return Topology(self.prefix, management=self.management)

    @property
    def cgroup(self) -> Path:
        """Return the lab's own cgroup subtree."""
        return cgroups.root() / self.prefix

    @property
    def clients(self) -> Path:
        """Return the cgroup that the sensor watches."""
        return self.cgroup / "clients"

    @property
    def token(self) -> Path:
        """Return the path of a token of the lab's review API, role admin, mode 0600."""
        return self.folder / "api.token"

    @property
    def config(self) -> Path:
        """Return the path of the configuration in use."""
        return self.folder / "narrows.toml"

    @property
    def certificates(self) -> Certificates:
        """Return the lab's certificates, and what its clients trust."""
        return Certificates(self.folder / "tls")

    def account_cgroup(self, config: Config, name: str) -> Path:
        """Return the cgroup that makes a process the account's; KeyError for an unknown name."""
        account = {account.name: account for account in config.account}[name]
        path = account.match.cgroup.removesuffix("/*").strip("/")
        if path and (cgroups.root() / path).is_relative_to(self.clients):
            return cgroups.root() / path
        return self.clients / name

    def configuration(self, given: str = "") -> str:
        """Return the text of a configuration: `given`, and the lab's own for what it lacks."""
        words = {
            "@STATE@": str(self.disk / "state"),
            "@MEMORY@": str(self.memory),
            "@BLOB@": str(BLOB),
            "@CGROUP@": self.prefix,
            "@TLS@": str(self.certificates.folder),
            "@REVIEW@": MANAGEMENT_GATE if self.management else "127.0.0.1",
        }
        default = DEFAULT.read_text(encoding="utf-8")
        for word, value in words.items():
            default = default.replace(word, value)
        if not given:
            return default
        return "\n".join([given, *_missing(given, default)])


def _missing(given: str, default: str) -> list[str]:
    """Return the default's tables that `given` does not have; all of `given` is kept as it is."""
    try:
        present = set(tomllib.loads(given))
    except tomllib.TOMLDecodeError:
        return []  # the loader says what is wrong with it, and where
    blocks = [block for block in default.split("\n\n") if block.startswith("[")]
    return [block for block in blocks if block.split("]", 1)[0].strip("[") not in present]
