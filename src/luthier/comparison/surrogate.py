"""A Gaussian process that guesses the scores of configurations that were not tried.

Kernel: Matérn 5/2 over the switches of layers and the steps of sizes, each with a scale of its own. Scales, height and
noise are those of the highest posterior, with half-Cauchy priors on the scales, so that what does not matter is held at
nothing (Eriksson & Jankowiak 2021, arXiv:2103.00349, who average over draws of the posterior instead). Scores go
through their ranks to a normal's quantiles, so that a few runs that failed to learn do not set the scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Surrogate", "quantiles"]

STEPS = 60
"""Of the climb to the highest posterior."""
SHRINKS = 0.1
"""Scale of the half-Cauchy priors: how far from nothing a scale is before it has to be paid for."""


def quantiles(scores: Sequence[float]) -> NDArray[np.float64]:
    """A normal's quantile for each score, by its rank; equal scores have equal ones.

    >>> [round(float(z), 2) for z in quantiles([0.5, 0.9, 0.7])]
    [-0.67, 0.67, 0.0]
    """
    found = np.asarray(scores, dtype=np.float64)
    below = (found[None] < found[:, None]).sum(1) + 0.5 * ((found[None] == found[:, None]).sum(1) - 1)
    shares = torch.from_numpy((below + 1) / (len(found) + 1))
    return np.asarray((math.sqrt(2) * torch.erfinv(2 * shares - 1)).numpy())


class Surrogate:
    """Fitted to what was tried.

    Args:
        points: (n, dims), each between 0 and 1.
        values: (n), about normal.
    """

    def __init__(self, points: NDArray[np.float64], values: NDArray[np.float64]) -> None:
        self.x, self.y = torch.from_numpy(points), torch.from_numpy(values)
        dims = points.shape[1]
        raw = torch.cat([torch.full((dims,), math.log(0.3)), torch.tensor([0.0, math.log(0.1)])]).double()
        raw.requires_grad_(True)
        climb = torch.optim.Adam([raw], lr=0.1)
        for _ in range(STEPS):
            climb.zero_grad()
            loss = self._against(raw)
            loss.backward()  # type: ignore[no-untyped-call]
            climb.step()
        self.scales, self.height, self.noise = self._read(raw.detach())
        self._settle()

    def also(self, points: NDArray[np.float64]) -> None:
        """Take its own guesses there for what they will give: the next questions of a batch then look elsewhere."""
        mean, _ = self.guess(points)
        self.x, self.y = torch.cat([self.x, torch.from_numpy(points)]), torch.cat([self.y, torch.from_numpy(mean)])
        self._settle()

    def guess(self, points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation of each point's value, without the noise of a run."""
        across = self._kernel(torch.from_numpy(points), self.x, self.scales, self.height)
        mean = across @ self.weights
        part = torch.linalg.solve_triangular(self.root, across.T, upper=False)
        spread = (self.height - part.square().sum(0)).clamp(min=1e-12).sqrt()
        return np.asarray(mean.numpy()), np.asarray(spread.numpy())

    def _settle(self) -> None:
        inner = self._kernel(self.x, self.x, self.scales, self.height)
        self.root = torch.linalg.cholesky(inner + self.noise * torch.eye(len(self.x), dtype=torch.float64))
        self.weights = torch.cholesky_solve(self.y[:, None], self.root)[:, 0]

    def _against(self, raw: Tensor) -> Tensor:
        """Minus the logarithm of the posterior."""
        scales, height, noise = self._read(raw)
        inner = self._kernel(self.x, self.x, scales, height) + noise * torch.eye(len(self.x), dtype=torch.float64)
        root = torch.linalg.cholesky(inner)
        weights = torch.cholesky_solve(self.y[:, None], root)[:, 0]
        fit = 0.5 * self.y @ weights + root.diagonal().log().sum()
        prior = torch.log1p((scales / SHRINKS) ** 2).sum() + 0.5 * (height.log() ** 2 + (noise.log() + 2.3) ** 2 / 2)
        found: Tensor = fit + prior
        return found

    @staticmethod
    def _read(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Squared inverse lengths, height, noise; the last at least what keeps the matrix regular."""
        return raw[:-2].exp(), raw[-2].exp(), raw[-1].exp() + 1e-4

    @staticmethod
    def _kernel(a: Tensor, b: Tensor, scales: Tensor, height: Tensor) -> Tensor:
        left, right = a * scales.sqrt(), b * scales.sqrt()
        squared = left.square().sum(1)[:, None] + right.square().sum(1)[None] - 2 * left @ right.T
        far = (5 * squared.clamp(min=1e-12)).sqrt()
        return height * (1 + far + far.square() / 3) * torch.exp(-far)
