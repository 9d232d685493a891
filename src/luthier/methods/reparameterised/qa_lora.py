"""QA-LoRA: a LoRA with one input for each quantisation group, so that it merges into the group's offsets exactly.

    y = x W^T + b + s pool(x) A^T B^T     pool(x)_g = sum of x over group g     A: (rank, groups)     B: (d_out, rank)

A group is 32 inputs. Over a base held in `int4`, W of row o and group g is alpha q + beta with q an integer; the update
is the same for all inputs of the group, so merged it is beta' = beta + s (B A), and no alpha and no q changes.

Xu, Xie, Gu, Chen, Chang, Zhang, Chen, Zhang, Tian 2023, "QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large
Language Models", arXiv:2309.14717, section 3.3, with the paper's sum over a group; the authors' repository has a mean,
and divides when it merges. The integers are rounded to the nearest (the paper takes GPTQ's), beta is fp32. A is drawn
from U(+-1/sqrt(d_in)), so that the sum over a group is as large as a LoRA's branch at its start; B is zero.

Count: sum over sites of rank * (ceil(d_in / 32) + d_out).
Claims: half of LoRA's numbers; a merged model that is still of 4 bits, with no loss by merging.
Cost: over a base in codes, the default of a run, each pass decodes each weight, as with qlora.
Use it when: what is served must stay in integers.
Not when: the base is in floats, where LoRA can do more with as many numbers; or nf4, which has no offsets to take it.
Pitfalls: a last group of fewer inputs sums fewer; offsets must be floats, packed integers would round them; dropout
acts before the sum. `luthier merge` writes the floats that the merged integers stand for.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Site
from luthier.core import above, at_least, between
from luthier.kernels import GROUP
from luthier.methods.parts.low_rank import Thin
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base


class PooledUpdate(Thin):
    """Adds `scale * B A pool(x)`; A as wide as x, its groups one number each, is a thin update like another."""

    def __init__(self, d_in: int, d_out: int, rank: int, scale: float, dropout: float) -> None:
        super().__init__(scale, dropout)
        self.d_in = d_in
        self.a = nn.Parameter(torch.empty(rank, math.ceil(d_in / GROUP)).uniform_(-1, 1) / math.sqrt(d_in))
        self.b = nn.Parameter(torch.zeros(d_out, rank))

    def thin(self) -> tuple[Tensor, Tensor]:
        # (rank, groups) -> (rank, groups * 32) -> without what a last group lacks (rank, d_in)
        return self.a.repeat_interleave(GROUP, 1)[:, : self.d_in], self.b

    def by_groups(self) -> Tensor:
        return (self.b @ self.a * self.scale).detach()


@METHODS.register("qa_lora", family="reparameterised", paper="arXiv:2309.14717")
@dataclass(frozen=True, kw_only=True)
class QALoRA(AtProjections):
    """Settings of QA-LoRA."""

    sites: Annotated[tuple[str, ...], "where to attach"] = ("*",)
    rank: Annotated[int, "width of the two thin matrices", at_least(1)] = 64
    alpha: Annotated[float, "the update is scaled by alpha / rank", above(0)] = 16.0
    dropout: Annotated[float, "share of the branch's input dropped in training", between(0, 0.99)] = 0.0

    default_lr: ClassVar[float] = 2e-4
    store: ClassVar[str | None] = "int4"
    tiny: ClassVar[dict[str, int]] = {"rank": 3}

    def params_at(self, site: Site) -> int:
        return self.rank * (math.ceil(site.d_in / GROUP) + site.d_out)

    def build(self, site: Site, base: Base) -> Attachment:
        return PooledUpdate(site.d_in, site.d_out, self.rank, self.alpha / self.rank, self.dropout)
