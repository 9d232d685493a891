"""Update inside the backward pass, so that no two tensors ever hold a gradient (LOMO, AdaLomo).

    lomo       p <- p - rate (c g + decay p)               c = min(1, clip / ||all gradients||)
    adalomo    v <- b v + (1 - b) g^2,  b = 1 - t^-0.8     a matrix keeps the means of its rows and columns alone
               u = g / sqrt(v);   u <- u / max(1, rms(u));   p <- p - rate max(1e-3, rms(p)) (u + decay p)

Each gradient is used as soon as it is whole, and dropped. A norm to clip to is known only after all gradients, so with
`--clip` above 0 a step is two passes over the same rows with the same dropout; with 0 it is one. `form = "adalomo"`
bounds each tensor's step by itself and needs no clip: use `--clip 0`.

`--lr` has to be given: 0.03 for lomo in the paper's runs of LLaMA on SuperGLUE, about 1e-3 for adalomo, which takes it
relative to the size of each tensor. lomo is what `--optimiser lomo` names too, to the bit.

Paper: arXiv:2306.09782, section 3; AdaLomo is arXiv:2310.10195. A step there is one micro-batch, as here.

Neutral: none; it is plain descent, to the bit `--optimiser sgd`.
Cost: with a clip, one forward and one backward pass more. Memory for one gradient at a time, and no moments.
Claims: full fine-tuning in little more memory than inference with activations.
Pitfalls: a step cannot be cut: `--accumulate` is refused, and so is all that looks at whole gradients.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from luthier.runs.spec import OptimSpec
from luthier.surgery import Group
from luthier.training.optimiser import Lomo, Optimiser
from luthier.training.strategy import STRATEGIES, Strategy


class AdaLomo(Lomo):
    """The same with a factored second moment: `first` holds means of rows (or of numbers), `second` of columns."""

    def __init__(self, named: dict[str, nn.Parameter], groups: list[Group], spec: OptimSpec, lr: float) -> None:
        super().__init__(named, groups, spec, lr)
        for name, p in named.items():
            wide = p.detach().new_zeros(p.shape, dtype=torch.float32)
            self.first[name] = wide.mean(-1) if p.dim() > 1 else wide
            self.second[name] = wide.mean(-2) if p.dim() > 1 else wide.new_zeros(0)

    def _update(
        self, names: list[str], count: int, rate: float, decay: float, rest: float, beta1: float, beta2: float
    ) -> None:
        kept = 1 - count**-0.8
        for name in names:
            p, slope = self.named[name], self.named[name].grad
            assert slope is not None
            slope = slope.float()
            square = slope.square() + 1e-30
            rows, columns = self.first[name], self.second[name]
            if p.dim() > 1:
                rows.lerp_(square.mean(-1), 1 - kept)
                columns.lerp_(square.mean(-2), 1 - kept)
                scale = (rows / rows.mean(-1, keepdim=True)).rsqrt()[..., None] * columns.rsqrt()[..., None, :]
            else:
                rows.lerp_(square, 1 - kept)
                scale = rows.rsqrt()
            step = slope * scale
            step /= _rms(step).clamp(min=1.0)
            own = rate * _rms(p.float()).clamp(min=1e-3)
            if decay:
                p.sub_(own * decay * (p - rest))
            p.sub_(own * step)
        self.counts.update(dict.fromkeys(names, count))


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


@STRATEGIES.register("lomo", family="gradient", paper="arXiv:2306.09782")
@dataclass(frozen=True, kw_only=True)
class LOMO(Strategy):
    """Descent inside the backward pass."""

    neutral: ClassVar[dict[str, Any] | None] = None
    whole_step: ClassVar[bool] = True
    extra_passes: ClassVar[float] = 1.0

    form: Annotated[Literal["lomo", "adalomo"], "plain descent, or steps scaled by a factored second moment"] = "lomo"

    def optimiser(self, named: dict[str, nn.Parameter], groups: list[Group], spec: OptimSpec, lr: float) -> Optimiser:
        return (AdaLomo if self.form == "adalomo" else Lomo)(named, groups, spec, lr)
