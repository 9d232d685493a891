"""What a run will hold and take, said before it starts: counted where that can be, and else with an interval."""

from luthier.forecast.growth import Growth, Way, growth
from luthier.forecast.held import Held, Skeleton, held
from luthier.forecast.interval import Interval, Pair, Residuals, committed, constant_of, interval, leave_out, residuals
from luthier.forecast.probe import probe
from luthier.forecast.rates import Rates, measured_rates
from luthier.forecast.times import Span, Steps, TimePair, committed_times, residuals_of_times, span, spans_left_out
from luthier.forecast.work import Work
from luthier.runs.devices import Device, device_of

__all__ = [
    "Device", "Growth", "Held", "Interval", "Pair", "Rates", "Residuals", "Skeleton", "Span", "Steps", "TimePair",
    "Way", "Work", "committed", "committed_times", "constant_of", "device_of", "growth", "held", "interval",
    "leave_out", "measured_rates", "probe", "residuals", "residuals_of_times", "span", "spans_left_out",
]  # fmt: skip
