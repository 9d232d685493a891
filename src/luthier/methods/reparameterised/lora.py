"""LoRA: leave the weight frozen, train a product of two thin matrices beside it.

    y = x W^T + b + (alpha / rank) dropout(x) A^T B^T          A: (rank, d_in)    B: (d_out, rank)

B starts at zero, so the tuned model starts as the base model.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1. A is drawn from
U(±1/sqrt(d_in)), as the authors' code does; the paper says Gaussian.

`scaling=root` divides by sqrt(rank) instead (arXiv:2312.03732), `b_rate` is how many times faster B learns than A
(arXiv:2402.12354); `rslora` and `lora_plus` are LoRA with these.

Count: sum over sites of rank * (d_in + d_out).
Claims: quality of full fine-tuning with a fraction of its trained numbers; no cost at inference once merged.
Use it when: in doubt. It is close to full fine-tuning, costs little, merges, and many tools read it.
Not when: the model must learn what is far from it, such as a new language, where low rank is too little.
Pitfalls: the effective scale is alpha / rank, so raising the rank alone weakens the update; dropout belongs on the
branch, never on the base path; a bf16 merge loses most of a small update, so merging is done in fp32 and cast once;
at the first step A has no gradient at all, because B is zero.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from luthier.anatomy import Anatomy, NumberBySite, Site, WholeBySite, at_site
from luthier.core import above, at_least, between
from luthier.methods.parts.low_rank import ThinUpdate, check_projections
from luthier.methods.parts.own_tensors import group_names, own_modules
from luthier.surgery import METHODS, Attachment, Base, Group, PerSite, TunedView


@METHODS.register("lora", family="reparameterised", paper="arXiv:2106.09685")
@dataclass(frozen=True, kw_only=True)
class LoRA(PerSite):
    """Settings of LoRA."""

    sites: Annotated[tuple[str, ...], "where to attach: attn.q, ffn, attn.q@0-5, *@last4"] = ("attn.q", "attn.v")
    rank: Annotated[int | WholeBySite, "width of the two thin matrices; by place: 8, attn.q@0: 16", at_least(1)] = 8
    alpha: Annotated[float | NumberBySite, "the update is scaled by alpha / rank", above(0)] = 16.0
    dropout: Annotated[float, "share of the branch's input dropped in training", between(0, 0.99)] = 0.0
    scaling: Annotated[Literal["rank", "root"], "alpha is divided by the rank, or by its square root"] = "rank"
    b_rate: Annotated[float, "times the learning rate of A at which B learns", above(0)] = 1.0

    mergeable: ClassVar[bool] = True
    starts_at_base: ClassVar[bool] = True
    default_lr: ClassVar[float] = 2e-3
    tiny: ClassVar[dict[str, int]] = {"rank": 3}

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        return check_projections(anatomy, super().places(anatomy), "lora", self.dropout)

    def params_at(self, site: Site) -> int:
        return at_site(self.rank, site) * (site.d_in + site.d_out)

    def build(self, site: Site, base: Base) -> Attachment:
        rank = at_site(self.rank, site)
        scale = at_site(self.alpha, site) / (math.sqrt(rank) if self.scaling == "root" else rank)
        return ThinUpdate(site.d_in, site.d_out, rank, scale, self.dropout)

    def groups(self, tuned: TunedView) -> list[Group]:
        if self.b_rate == 1.0:
            return []
        return [Group(group_names(tuned, (m.b for m in own_modules(self, tuned, ThinUpdate))), lr_factor=self.b_rate)]
