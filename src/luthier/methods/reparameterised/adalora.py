"""AdaLoRA: updates in the shape of a singular value decomposition, and one budget of ranks for all sites.

    y = x W^T + b + s x Q^T diag(l) P^T      P: (d_out, rank)    l: (rank,)    Q: (rank, d_in)    s = alpha / rank

l starts at zero, so the tuned model starts as the base model. A triplet (P_k, l_k, Q_k) is as important as

    S_k = e(l_k) + mean e(P_k) + mean e(Q_k)      e = smoothed |w g| times its smoothed deviation

and every `every` steps the l of all but the most important triplets of the whole model are set to zero. Their number
falls from rank to target_rank per site, by a cubic; until it has arrived a triplet may come back.

Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv:2303.10512,
sections 3.1 to 3.3. |w g| is taken where the gradient was taken, before clipping; the authors' code reads weights that
have moved and gradients that are clipped. Its threshold also prunes all ties; here ties go to the earlier triplet. As
in that code, s keeps the rank of the start, and the penalty is the mean norm of P^T P - I and Q Q^T - I.

Count: sum over sites of rank * (d_in + d_out + 1) in training; about target_rank of it is stored.
Claims: better than LoRA at the same stored rank, where some sites need more rank than others.
Use it when: the budget of ranks is fixed and nobody knows which layers need them.
Not when: the run has a few dozen steps only: ranks need time to be moved.
Pitfalls: changing s when triplets are pruned; a schedule that never arrives (its shares are of the whole run here);
half again as many trained numbers as the LoRA it is compared with, and two moments of importance for each.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.anatomy import Anatomy, Site
from luthier.core import ConfigError, above, at_least, between
from luthier.methods.parts.masks import top_k
from luthier.methods.parts.own_tensors import own_modules
from luthier.methods.parts.projections import AtProjections
from luthier.methods.parts.triplets import TripletUpdate
from luthier.surgery import (
    METHODS,
    Attachment,
    Base,
    PeftForm,
    PeftIn,
    PeftOut,
    PeftTaken,
    PeftWhole,
    TunedView,
)

_MEANS = ("mean_p", "mean_l", "mean_q")
_SPREADS = ("spread_p", "spread_l", "spread_q")


_THEIRS = {"q": "lora_A", "l": "lora_E", "p": "lora_B"}
_TINY = 1e-5  # peft divides alpha by the rank and this


def _out(going: PeftOut) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Pruned triplets go out as zeros: peft's own pattern of ranks computes the same."""
    rank, tensors = going.method.rank, {}
    for name, value in going.by_layer(_THEIRS).items():
        wide = value[:, None] if name.endswith("lora_E") else value
        missing = rank - wide.shape[1 if name.endswith("lora_B") else 0]
        tensors[name] = F.pad(wide, (0, missing) if name.endswith("lora_B") else (0, 0, 0, missing))
    return tensors, {"lora_alpha": going.method.alpha * (rank + _TINY) / rank, "total_step": 1}


def _back(coming: PeftIn) -> PeftTaken:
    words, stored = coming.by_layer({theirs: ours for ours, theirs in _THEIRS.items()})
    stored = {n: t.flatten() if n.endswith(".l") else t for n, t in stored.items()}
    rank = int(coming.facts.get("init_r", 12))
    alpha = float(coming.facts.get("lora_alpha", 8)) * rank / (rank + _TINY)
    target = min(int(coming.facts.get("target_r", 8)), rank)
    return PeftTaken({"sites": words, "rank": rank, "target_rank": target, "alpha": alpha}, stored)


@METHODS.register("adalora", family="reparameterised", paper="arXiv:2303.10512")
@dataclass(frozen=True, kw_only=True)
class AdaLoRA(AtProjections):
    """Settings of AdaLoRA."""

    rank: Annotated[int, "triplets per site at the start", at_least(1)] = 12
    target_rank: Annotated[int, "triplets per site at the end, on average", at_least(1)] = 8
    alpha: Annotated[float, "the update is scaled by alpha / rank", above(0)] = 16.0
    beta1: Annotated[float, "how slowly the importance follows", between(0, 1)] = 0.85
    beta2: Annotated[float, "how slowly its deviation follows", between(0, 1)] = 0.85
    orthogonality: Annotated[float, "weight of the penalty that keeps P and Q orthogonal", at_least(0)] = 0.1
    penalty: Annotated[Literal["norm", "square"], "mean of the norms (authors' code), or sum of squares (paper)"] = (
        "norm"
    )
    warmup: Annotated[float, "share of the run before the first pruning", between(0, 1)] = 0.1
    settled: Annotated[float, "share of the run after the last pruning", between(0, 1)] = 0.4
    every: Annotated[int, "optimiser steps from one pruning to the next", at_least(1)] = 10

    default_lr: ClassVar[float] = 2e-3
    tiny: ClassVar[dict[str, int]] = {"rank": 3, "target_rank": 2}
    peft: ClassVar[PeftForm | None] = PeftWhole(
        "ADALORA",
        out=_out,
        back=_back,
        write=lambda method: {"init_r": method.rank, "target_r": method.target_rank},
        fixed={"use_dora": False, "use_rslora": False},
        also=("r", "init_r", "target_r", "lora_alpha"),
        ignored=(
            "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "rank_pattern",
            "lora_dropout", "init_lora_weights",
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.target_rank > self.rank:
            raise ConfigError(f"adalora: target_rank {self.target_rank} is above rank {self.rank}, where it starts.")
        if self.warmup + self.settled >= 1:
            raise ConfigError(
                f"adalora: warmup {self.warmup:g} and settled {self.settled:g} leave no part of the run to prune in; "
                "their sum must be below 1."
            )

    def params_at(self, site: Site) -> int:
        return self.rank * (site.d_in + site.d_out + 1)

    def n_stored(self, anatomy: Anatomy) -> int:
        """After a whole run, if every site keeps its share; exact where all sites have one shape."""
        return sum(self.target_rank * (site.d_in + site.d_out + 1) for site in self.places(anatomy))

    def build(self, site: Site, base: Base) -> Attachment:
        return Triplets(site.d_in, site.d_out, self.rank, self.alpha / self.rank)

    def budget(self, step: int, total: int, start: int, end: int) -> int:
        """Triplets of the whole model after `step` of `total` steps: `start` at first, `end` at last."""
        first, last = self.warmup * total, (1 - self.settled) * total
        if step <= first:
            return start
        if step >= last:
            return end
        left = 1 - (step - first) / (last - first)
        return round(end + (start - end) * left**3)

    def extra_loss(self, tuned: TunedView) -> Tensor | None:
        held = [m for m in own_modules(self, tuned, Triplets) if m.l.numel()]
        if not held or self.orthogonality == 0:
            return None
        gaps = [gap for m in held for gap in m.gaps()]
        if self.penalty == "square":
            return self.orthogonality * torch.stack([gap.square().sum() for gap in gaps]).sum()
        return self.orthogonality * torch.stack([torch.linalg.vector_norm(gap) for gap in gaps]).mean()

    def after_backward(self, tuned: TunedView, step: int, total: int) -> None:
        if step < (1 - self.settled) * total:
            for module in own_modules(self, tuned, Triplets):
                module.sense()

    def on_step(self, tuned: TunedView, step: int, total: int) -> None:
        modules = own_modules(self, tuned, Triplets)
        if not modules:
            return
        last = (1 - self.settled) * total
        if step < last:
            for module in modules:
                module.remember(self.beta1, self.beta2)
        arrived = step >= last and not bool(modules[0].arrived)
        if arrived or (self.warmup * total < step < last and step % self.every == 0):
            start = sum(m.l.numel() for m in modules)
            masks = top_k(
                [m.importance() for m in modules],
                self.budget(step, total, start, min(start, self.target_rank * len(modules))),
            )
            for module, mask in zip(modules, masks, strict=True):
                module.keep.copy_(mask)
                module.arrived.fill_(step >= last)
                module.prune()
        elif step >= last:
            for module in modules:
                module.prune()

    def finish(self, tuned: TunedView) -> None:
        for module in own_modules(self, tuned, Triplets):
            module.restore(module.stored())


class Triplets(TripletUpdate):
    """Some of the triplets may be pruned.

    keep: (rank,) bool, the triplets inside the budget. mean_*, spread_*: smoothed importance of every number and its
    smoothed deviation.
    """

    keep: Tensor
    arrived: Tensor

    def __init__(self, d_in: int, d_out: int, rank: int, scale: float) -> None:
        super().__init__(d_in, d_out, rank, scale)
        self._sensed: tuple[Tensor, ...] | None = None
        self.forget()

    def forget(self) -> None:
        """No importance yet, and every triplet inside the budget."""
        for names in (_MEANS, _SPREADS):
            for name, parameter in zip(names, (self.p, self.l, self.q), strict=True):
                self.register_buffer(name, torch.zeros_like(parameter.detach()))
        self.register_buffer("keep", torch.ones_like(self.l.detach(), dtype=torch.bool))
        self.register_buffer("arrived", torch.zeros((), dtype=torch.bool, device=self.l.device))

    def acts(self) -> Tensor:
        """Those inside the budget, or grown since."""
        return self.keep | (self.l.detach() != 0)

    @torch.no_grad()
    def sense(self) -> None:
        """Take |w g| of every number; it counts once the step is accepted."""
        found = ((p, p.grad) for p in (self.p, self.l, self.q))
        self._sensed = tuple(torch.zeros_like(p) if g is None else (p * g).abs() for p, g in found)

    @torch.no_grad()
    def remember(self, beta1: float, beta2: float) -> None:
        """Let the sensed importance into the two moving averages."""
        if self._sensed is None:
            return
        for mean_name, spread_name, sensed in zip(_MEANS, _SPREADS, self._sensed, strict=True):
            mean, spread = self.get_buffer(mean_name), self.get_buffer(spread_name)
            mean.lerp_(sensed.to(mean.dtype), 1 - beta1)
            spread.lerp_((sensed - mean).abs(), 1 - beta2)
        self._sensed = None

    def importance(self) -> Tensor:
        """S_k of each triplet, (rank,)."""
        p, l, q = (self.get_buffer(m) * self.get_buffer(s) for m, s in zip(_MEANS, _SPREADS, strict=True))
        return l + p.mean(0) + q.mean(1)

    @torch.no_grad()
    def prune(self) -> None:
        """Set l to zero outside the budget; P and Q stay, so that a triplet may come back."""
        self.l.mul_(self.keep)
