"""What a run will hold and take, said before it starts: counted where that can be, and else with an interval."""

from luthier.forecast.devices import Device, device_of
from luthier.forecast.growth import Growth, growth
from luthier.forecast.held import Held, Skeleton, held
from luthier.forecast.interval import Interval, Pair, Residuals, committed, constant_of, interval, leave_out, residuals

__all__ = [
    "Device", "Growth", "Held", "Interval", "Pair", "Residuals", "Skeleton", "committed", "constant_of", "device_of",
    "growth", "held", "interval", "leave_out", "residuals",
]  # fmt: skip
