"""DoRA: split each weight into a magnitude per output and a direction; train both, the direction by two thin matrices.

    W' = m * (W + s B A) / |W + s B A|      m: (d_out,)    A: (rank, d_in)    B: (d_out, rank)    s = alpha / rank

|.| is the norm of each row, over the inputs; it is held constant in the backward pass. m starts at |W| and B at zero,
so the tuned model starts as the base model.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353, sections 4.1 and 4.3. With dropout
only the update's input is dropped; the authors' code drops the frozen product's input too.

Count: sum over sites of rank * (d_in + d_out) + d_out.
Claims: closer to full fine-tuning than LoRA at the same rank, most of all at small ranks; merged exactly.
Use it when: LoRA falls short of full fine-tuning, and a tenth to a fifth more time a step is no matter.
Not when: the base is quantised, since it needs the norms of the weights; or LoRA is already enough.
Pitfalls: the norm runs over the inputs, not the outputs; a norm that is not held constant gives other gradients and
costs more memory; about half of LoRA's learning rate; a row of zeros has no direction and is refused.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, NumberBySite, Site, WholeBySite, at_site
from luthier.core import AnatomyError, above, at_least, between
from luthier.kernels import dora_linear, dora_norm, row_squares
from luthier.methods.parts.low_rank import SmallDropout, check_projections, fusable, live_bias
from luthier.surgery import METHODS, Attachment, Base, Method, PerSite


@METHODS.register("dora", family="reparameterised", paper="arXiv:2402.09353")
@dataclass(frozen=True, kw_only=True)
class DoRA(PerSite):
    """Settings of DoRA."""

    sites: Annotated[tuple[str, ...], "where to attach: attn.q, ffn, attn.q@0-5, *@last4"] = ("attn.q", "attn.v")
    rank: Annotated[int | WholeBySite, "width of the two thin matrices; by place: 8, attn.q@0: 16", at_least(1)] = 8
    alpha: Annotated[float | NumberBySite, "the update is scaled by alpha / rank", above(0)] = 16.0
    dropout: Annotated[float, "share of the update's input dropped in training", between(0, 0.99)] = 0.0

    mergeable: ClassVar[bool] = True
    starts_at_base: ClassVar[bool] = True
    default_lr: ClassVar[float] = 1e-3
    tiny: ClassVar[dict[str, int]] = {"rank": 3}

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        return check_projections(anatomy, super().places(anatomy), "dora", self.dropout)

    def params_at(self, site: Site) -> int:
        return at_site(self.rank, site) * (site.d_in + site.d_out) + site.d_out

    def conflicts(self, other: Method) -> str | None:
        if other.computes_tensors:
            return f"dora measures the frozen weight and bias, which {other.name} computes anew. Use lora with it."
        return None

    def build(self, site: Site, base: Base) -> Attachment:
        rank = at_site(self.rank, site)
        return ThinTurn(base, rank, at_site(self.alpha, site) / rank, self.dropout)


class ThinTurn(Attachment):
    """Turns the rows of the weight by `scale * B A` and gives them the lengths m."""

    kind = "delta"
    reads_base_weight = True
    squares: Tensor

    def __init__(self, base: Base, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        weight = base.weight()
        squares = row_squares(weight)
        if not weight.is_meta and not bool(squares.all()):
            dead = int((squares == 0).sum())
            raise AnatomyError(
                f"dora: {dead} of the {len(squares)} rows of {base.site.key} are zero and have no direction to turn. "
                "Use lora, or leave this site out."
            )
        self.base = base
        self.scale = scale
        self.dropout = SmallDropout(dropout)
        self.a = nn.Parameter(weight.new_empty(rank, weight.shape[1], dtype=squares.dtype))
        self.b = nn.Parameter(squares.new_zeros(weight.shape[0], rank))
        self.magnitude = nn.Parameter(squares.sqrt())
        # Where W is frozen its share of the norm is summed once.
        self.register_buffer("squares", squares, persistent=False)
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    @property
    def known(self) -> Tensor | None:
        """What is known of the rows' lengths beforehand; nothing where another method trains the weight."""
        return None if self.base.moves else self.squares

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        bias = live_bias(self.base)
        z = y if bias is None else y - bias
        z = z + (self.dropout(x, self.training) @ self.a.T @ self.b.T) * self.scale
        norm = dora_norm(self.base.weight(), self.a, self.b, self.scale, self.known)
        z = z * (self.magnitude / norm)
        return z if bias is None else z + bias

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # The norm is that of this attachment's own frozen weight; `weight` may hold another tuning's merge by now.
        update = self.b @ self.a * self.scale
        norm = torch.linalg.vector_norm((self.base.weight() + update).detach(), dim=1)
        return (weight + update) * (self.magnitude / norm)[:, None], bias

    def fused(self, base: Base, x: Tensor) -> Tensor | None:
        if not fusable(base):
            return None
        seed = self.dropout.seed(self.training)
        p = 0.0 if seed is None else self.dropout.p
        return dora_linear(
            x, base.frozen(), base.bias(), self.a, self.b, self.magnitude, self.scale, p, seed, self.known
        )
