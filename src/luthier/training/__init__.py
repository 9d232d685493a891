"""The one loop, and what a step touches: objective, optimiser, guards, evaluation, memory."""

from luthier.training.loop import Listener

__all__ = ["Listener"]
