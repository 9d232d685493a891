"""What a run will hold and take, said before it starts: counted where that can be, and else with an interval."""

from luthier.forecast.devices import Device, device_of
from luthier.forecast.growth import Growth, growth
from luthier.forecast.held import Held, Skeleton, held
from luthier.forecast.interval import Interval, Pair, Residuals, committed, interval, residuals

__all__ = [
    "Device", "Growth", "Held", "Interval", "Pair", "Residuals", "Skeleton", "committed", "device_of", "growth",
    "held", "interval", "residuals",
]  # fmt: skip
