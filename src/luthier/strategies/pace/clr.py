"""The rate swings between two bounds, up and down again, instead of falling only.

    s = T / (2 cycles)                             steps from a lowest rate to the next highest
    c = floor(1 + t / (2 s)),   u = |t / s - 2 c + 1|
    rate = peak * (low + (1 - low) * max(0, 1 - u) * scale),     t = step - 1
    scale = 1 (triangular),  1 / 2^(c - 1) (triangular2),  gamma^t (exp_range)

Whole cycles fit into the run, so it ends where it began, at the low bound. `luthier find-lr` finds the bounds.

Paper: arXiv:1506.01186.

Neutral: none; low = 1 is a constant rate. The schedule and the warm-up of the spec are not used.
Claims: good accuracy in fewer steps than with a fixed rate, without a search for the best one. Half cycles of 2 to 10
epochs, and a low bound of a third to a quarter of the peak, are quoted from the paper.
Pitfalls: a run ends at its lowest rate, which is no small one: low = .25 leaves noise that a falling rate takes away.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from luthier.core import ConfigError, at_least, between
from luthier.runs.spec import RunSpec
from luthier.training.strategy import STRATEGIES, Strategy


@STRATEGIES.register("clr", family="pace", paper="arXiv:1506.01186")
@dataclass(frozen=True, kw_only=True)
class CLR(Strategy):
    """Cyclical learning rates."""

    neutral: ClassVar[dict[str, Any] | None] = None
    tiny: ClassVar[dict[str, Any]] = {"cycles": 1}

    cycles: Annotated[int, "rises and falls in the run", at_least(1)] = 2
    low: Annotated[float, "lowest rate, as a share of the peak", between(0, 1)] = 0.25
    form: Annotated[Literal["triangular", "triangular2", "exp_range"], "how the peaks of later cycles fall"] = (
        "triangular"
    )
    gamma: Annotated[float, "share of the swing that each step leaves, of exp_range", between(0, 1)] = 0.999

    def check(self, spec: RunSpec) -> None:
        if spec.steps is not None and spec.steps < 2 * self.cycles:
            raise ConfigError(
                f"clr.cycles: {self.cycles} rises and falls do not fit into {spec.steps} steps. Use at most "
                f"{max(1, spec.steps // 2)}, or more steps."
            )

    def rate(self, step: int, total: int) -> float:
        t, half = step - 1, total / (2 * self.cycles)
        cycle = int(1 + t / (2 * half))
        away = abs(t / half - 2 * cycle + 1)
        scale = {"triangular": 1.0, "triangular2": 0.5 ** (cycle - 1), "exp_range": self.gamma**t}[self.form]
        return self.low + (1 - self.low) * max(0.0, 1 - away) * scale
