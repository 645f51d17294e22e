"""The sensor process: builds its settings, and runs it until SIGTERM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebpf import procfs
from ebpf.sensor import SensorSettings
from ebpf.sensor import run as follow

if TYPE_CHECKING:
    from appliance.config import Config


def run(config: Config) -> int:
    """Run the sensor until SIGTERM or SIGINT; return the exit code."""
    settings = SensorSettings(
        cgroup=procfs.cgroup_mount() / config.sensor.cgroup.strip("/"),
        socket=config.paths.run / "sensor.sock",
        blob=config.paths.blob,
        prefixes=config.sensor.prefixes,
        covers=config.sensor.covers,
        host=config.sensor.host,
    )
    return follow(settings)
