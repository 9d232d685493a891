"""Real steps of a method on the whole model, its numbers random: what a step takes on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from luthier import kernels
from luthier.data.tasks import Task
from luthier.forecast.growth import Way, batch_of, tuned_in
from luthier.forecast.times import Steps
from luthier.runs.spec import OptimSpec
from luthier.surgery import Method
from luthier.training.optimiser import optimiser_of
from luthier.training.precision import Precision

__all__ = ["PROBED", "probe"]

PROBED = 3


def probe(
    method: Method, config: Any, task: Task, make: Callable[[Any, torch.dtype], Any], steps: Steps, *,
    dtype: torch.dtype, precision: Precision, device: torch.device, way: Way, optim: OptimSpec,
) -> float:  # fmt: skip
    """Seconds of a step: the middle one of three, after one that warms up.

    Args:
        make: the model with the task's head from a configuration, its numbers of the given type.

    Raises:
        Any error of a method that cannot be put on the model, or of memory that runs out.
    """
    tuned, loss_of = tuned_in(method, make(config, dtype).to(device).eval(), task, way)
    optimiser = optimiser_of(optim, tuned.trained(), tuned.groups(), method.default_lr)
    width = max(1, round(steps.width))
    pieces = max(1, round(steps.pieces))
    rows = max(1, round(steps.tokens / width / pieces))
    batch = batch_of(rows, width, task, config, steps.supervised).to(device)
    taken = []
    with kernels.plain(not way.fast):
        for _ in range(1 + PROBED):
            begun = time.perf_counter()
            for _ in range(pieces):
                with precision.autocast(device):
                    loss = loss_of(batch)
                if loss.requires_grad:
                    torch.autograd.backward(loss / (pieces * max(1, batch.n_targets)))
            optimiser.clip(optimiser.norm())
            optimiser.step(1e-3)
            optimiser.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - begun)
    return statistics.median(taken[1:])
