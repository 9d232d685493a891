"""The one loop, and what a step touches: objective, optimiser, guards, evaluation, memory."""

from luthier.training.listener import Listener
from luthier.training.strategy import STRATEGIES, Strategy

__all__ = ["STRATEGIES", "Listener", "Strategy"]
