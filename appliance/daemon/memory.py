"""What a process that writes evidence asks of its run directory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from appliance.config import ConfigError

if TYPE_CHECKING:
    from appliance.config import Config
    from capture.store import Store


def require_memory(config: Config, store: Store) -> None:
    """Refuse to write chunks to a disk, in the clear. Raises ConfigError."""
    if not store.run_is_memory:
        problem = f"{store.run} is not on a tmpfs: captured bytes would be on a disk in the clear"
        hint = "use a directory under /run, or mount a tmpfs there"
        raise ConfigError(config.file, 0, "paths.run", problem, hint)
