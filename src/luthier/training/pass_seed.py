"""What a forward pass of a step draws is named by the run's seed, the step and the micro-batch."""

import torch

from luthier.core import key

__all__ = ["seed_pass"]


def seed_pass(seed: int, step: int, micro: int, device: torch.device) -> None:
    """Seed the ambient generators: asked for twice, the same dropout is drawn.

    `torch.manual_seed` notes every call for devices that are never used: 0.7 ms a step.

    Args:
        step: from 0. micro: the number of the micro-batch in it, from 0.
    """
    number = key(seed, "step", step, micro)
    torch.default_generator.manual_seed(number)
    if device.type in ("cuda", "mps", "xpu"):
        torch.manual_seed(number)
