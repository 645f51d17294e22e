"""The lab's certificate authority, its server's certificate, and what its clients trust.

`Lab.up` makes them, before the gate starts; they go with the lab. The gate checks upstreams against
this authority, and shows clients leaves of its own: the lab's clients trust both.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from appliance.lab.topology import SERVER4, SERVER6
from appliance.proxy.tls import Authority
from appliance.proxy.tls.authority import pem

if TYPE_CHECKING:
    from pathlib import Path

    from appliance.config import Config

#: OpenSSL takes no wildcard with fewer than two dots behind it: "*.lab" would be for no name.
SERVER_NAMES = (SERVER4, SERVER6, "server.lab", "*.server.lab")
#: By which OpenSSL and Python, curl, libpq, Python's requests, git, Node.js and Go find authorities
_VARIABLES = (
    "SSL_CERT_FILE", "CURL_CA_BUNDLE", "PGSSLROOTCERT", "REQUESTS_CA_BUNDLE", "GIT_SSL_CAINFO",
    "NODE_EXTRA_CA_CERTS",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Certificates:
    """The files, in a folder of the lab; keys have mode 0600."""

    folder: Path

    @property
    def ca(self) -> Path:
        """Return the lab's authority; its key is ca.key."""
        return self.folder / "ca.pem"

    @property
    def server(self) -> Path:
        """Return the chain of the server host, for its addresses, server.lab and *.server.lab."""
        return self.folder / "server.pem"

    @property
    def server_key(self) -> Path:
        """Return its key."""
        return self.folder / "server.key"

    @property
    def trusted(self) -> Path:
        """Return the authorities that clients trust: the lab's and the gate's."""
        return self.folder / "trusted.pem"

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables that make a client's programs trust them."""
        return dict.fromkeys(_VARIABLES, str(self.trusted))

    def make(self) -> None:
        """Make the authority and the server's certificate."""
        self.folder.mkdir(mode=0o755)
        leaf = Authority.in_folder(self.folder, "Narrows lab").leaf(SERVER_NAMES)
        self.server.write_bytes(leaf.chain)
        self.server_key.touch(mode=0o600)
        self.server_key.write_bytes(leaf.key)

    def trust(self, config: Config) -> None:
        """Write down whom clients trust; the gate's authority is made if need be. Raises OSError,
        KeyFileError.
        """
        gate = pem(Authority.load_or_create(config).certificate)
        scratch = self.trusted.with_suffix(".new")
        scratch.write_bytes(self.ca.read_bytes() + gate)
        os.replace(scratch, self.trusted)
