"""Delta-LoRA: LoRA whose product also moves the weight itself, step by step, without a gradient of the weight.

    y = x W_t^T + b + s x A^T B^T      after step t > wait:  W <- W + l s (B_t+1 A_t+1 - B_t A_t)      s = alpha / rank

B starts at zero, so the tuned model starts as the base model.

Zi et al. 2023, "Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices", arXiv:2309.02411,
section 3. The sum telescopes: W_T = W + l s (B_T A_T - B_w A_w), w being step `wait`. So W is never touched here, and
what is kept is one more pair, B_w A_w; in exact arithmetic the function and its gradients are the same. It also follows
that the whole change has rank 2 rank at most, whatever the title says.

Count: as LoRA, sum over sites of rank * (d_in + d_out); the file holds the second pair too.
Claims: better than LoRA at the same memory.
Use it when: it is compared with. By the sum above it is LoRA with a larger scale in the forward pass only.
Not when: the run is shorter than `wait`: then it is LoRA.
Pitfalls: no dropout on the branch, or the product's gradient is not the weight's; kept in a bf16 weight, as the paper
does, steps round to nothing; an error of one in `wait` moves the start of the sum.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from luthier.anatomy import Anatomy, Site
from luthier.core import above, at_least
from luthier.methods.parts.low_rank import ThinUpdate
from luthier.methods.parts.own_tensors import own_modules
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base, TunedView


@METHODS.register("delta_lora", family="reparameterised", paper="arXiv:2309.02411")
@dataclass(frozen=True, kw_only=True)
class DeltaLoRA(AtProjections):
    """Settings of Delta-LoRA."""

    rank: Annotated[int, "width of the two thin matrices", at_least(1)] = 8
    alpha: Annotated[float, "the update is scaled by alpha / rank", above(0)] = 16.0
    share: Annotated[float, "l: how much of each step's change of the product the weight takes", at_least(0)] = 2.0
    wait: Annotated[int, "steps before the weight begins to move", at_least(0)] = 500

    default_lr: ClassVar[float] = 1e-3
    tiny: ClassVar[dict[str, float]] = {"rank": 3, "wait": 2, "lr": 1e-2}

    def params_at(self, site: Site) -> int:
        return self.rank * (site.d_in + site.d_out)

    def n_stored(self, anatomy: Anatomy) -> int:
        return 2 * self.n_params(anatomy)

    def build(self, site: Site, base: Base) -> Attachment:
        return TelescopedUpdate(site.d_in, site.d_out, self.rank, self.alpha / self.rank, self.share)

    def on_step(self, tuned: TunedView, step: int, total: int) -> None:
        if step == self.wait:
            for module in own_modules(self, tuned, TelescopedUpdate):
                module.begin()


class TelescopedUpdate(ThinUpdate):
    """Adds `scale * (B A + share * (B A - B_w A_w)) x`; the share has no gradient of its own."""

    a_w: Tensor
    b_w: Tensor
    begun: Tensor

    def __init__(self, d_in: int, d_out: int, rank: int, scale: float, share: float) -> None:
        super().__init__(d_in, d_out, rank, scale)
        self.share = share
        self.register_buffer("a_w", torch.zeros(rank, d_in))
        self.register_buffer("b_w", torch.zeros(d_out, rank))
        self.register_buffer("begun", torch.zeros(()))  # 1 once the weight moves

    @torch.no_grad()
    def begin(self) -> None:
        """From here on the weight takes its share."""
        self.a_w.copy_(self.a)
        self.b_w.copy_(self.b)
        self.begun.fill_(1.0)

    def thin(self) -> tuple[Tensor, Tensor]:
        if not self.share:
            return self.a, self.b
        moved = self.share * self.begun
        a = torch.cat([self.a, self.a.detach(), self.a_w])
        return a, torch.cat([self.b, self.b.detach() * moved, -self.b_w * moved], 1)
