"""Who a session belongs to: kernel facts from the sensor, joined to the declared accounts."""

from appliance.attribution.accounts import Register, check_overlaps
from appliance.attribution.join import Attributor
from appliance.attribution.replay import ReplayCache
from appliance.attribution.sensor_link import SensorLink

__all__ = ["Attributor", "Register", "ReplayCache", "SensorLink", "check_overlaps"]
