"""What a run will hold and take, said before it starts: counted where that can be, and else with an interval."""

from luthier.forecast.devices import Device, device_of
from luthier.forecast.held import Held, Skeleton, held

__all__ = ["Device", "Held", "Skeleton", "device_of", "held"]
