"""DoRA: split each weight into a magnitude per output and a direction; train both, the direction by two thin matrices.

    W' = m * (W + s B A) / |W + s B A|      m: (d_out,)    A: (rank, d_in)    B: (d_out, rank)    s = alpha / rank

|.| is the norm of each row, over the inputs; it is held constant in the backward pass. m starts at |W| and B at zero,
so the tuned model starts as the base model.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353, sections 4.1 and 4.3. With dropout
only the update's input is dropped; the authors' code drops the frozen product's input too.

`scaling`, `b_rate`, `train_a`, `train_b` and `start` are those of `lora`, with the same meaning: with a start that is
not zero the update is how far A and B have moved, s (B A - B0 A0), so m starts at |W| there too.

Count: sum over sites of rank * (d_in + d_out) + d_out. With a start that is not zero the file holds the start too.
Claims: closer to full fine-tuning than LoRA at the same rank, most of all at small ranks; merged exactly.
Use it when: LoRA falls short of full fine-tuning, and a tenth to a fifth more time a step is no matter.
Not when: the base is quantised, since it needs the norms of the weights; or LoRA is already enough.
Pitfalls: the norm runs over the inputs, not the outputs; a norm that is not held constant gives other gradients and
costs more memory; about half of LoRA's learning rate; a row of zeros has no direction and is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, NumberBySite, Site, WholeBySite
from luthier.core import AnatomyError, above, at_least, between
from luthier.kernels import dora_linear, dora_norm, row_squares
from luthier.methods.parts.low_rank import MovedUpdate, Thin, ThinUpdate, fusable, live_bias
from luthier.methods.parts.low_rank_axes import LowRankAxes
from luthier.methods.parts.row_starts import FromRows
from luthier.methods.parts.starts import Start
from luthier.surgery import METHODS, Attachment, Base, Method


@METHODS.register("dora", family="reparameterised", paper="arXiv:2402.09353")
@dataclass(frozen=True, kw_only=True)
class DoRA(LowRankAxes):
    """Settings of DoRA."""

    sites: Annotated[tuple[str, ...], "where to attach: attn.q, ffn, attn.q@0-5, *@last4"] = ("attn.q", "attn.v")
    rank: Annotated[int | WholeBySite, "width of the two thin matrices; by place: 8, attn.q@0: 16", at_least(1)] = 8
    alpha: Annotated[float | NumberBySite, "the update is scaled by alpha / rank", above(0)] = 16.0
    dropout: Annotated[float, "share of the update's input dropped in training", between(0, 0.99)] = 0.0
    scaling: Annotated[Literal["rank", "root"], "alpha is divided by the rank, or by its square root"] = "rank"
    b_rate: Annotated[float, "times the learning rate of A at which B learns", above(0)] = 1.0
    train_a: Annotated[bool, "A learns too, and is not left as it was drawn"] = True
    train_b: Annotated[bool, "B learns too, and is not left where it started"] = True
    start: Annotated[Start, "where A and B start: zero, in the weight (svd, minor, qr), or where rows say"] = "zero"
    data: Annotated[float, "eva, corda, lora_ga: share of the first epoch looked at", between(0.001, 1)] = 0.1

    mergeable: ClassVar[bool] = True
    default_lr: ClassVar[float] = 1e-3
    tiny: ClassVar[dict[str, int]] = {"rank": 3}

    def params_at(self, site: Site) -> int:
        return super().params_at(site) + site.d_out

    def n_stored(self, anatomy: Anatomy) -> int:
        return super().n_stored(anatomy) + sum(site.d_out for site in self.places(anatomy))

    def conflicts(self, other: Method) -> str | None:
        if other.computes_tensors:
            return f"dora measures the frozen weight and bias, which {other.name} computes anew. Use lora with it."
        return None

    def build(self, site: Site, base: Base) -> Attachment:
        made: Turned = self.update_at(site, base, (ThinTurn, MovedTurn, TurnFromRows))
        made.measure(base)
        return made


class Turned(Thin):
    """Turns the rows of the weight by `scale * B A`, whatever A and B are made of, and gives them the lengths m."""

    reads_base_weight = True
    squares: Tensor

    def measure(self, base: Base) -> None:
        """m begins as the rows' lengths.

        Raises:
            AnatomyError: a row is zero.
        """
        squares = row_squares(base.weight())
        if not squares.is_meta and not bool(squares.all()):
            dead = int((squares == 0).sum())
            raise AnatomyError(
                f"dora: {dead} of the {len(squares)} rows of {base.site.key} are zero and have no direction to turn. "
                "Use lora, or leave this site out."
            )
        self.__dict__["base"] = base
        self.magnitude = nn.Parameter(squares.sqrt())
        # Where W is frozen its share of the norm is summed once.
        self.register_buffer("squares", squares, persistent=False)

    @property
    def known(self) -> Tensor | None:
        """What is known of the rows' lengths beforehand; nothing where another method trains the weight."""
        return None if self.__dict__["base"].moves else self.squares

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        base: Base = self.__dict__["base"]
        bias = live_bias(base)
        a, b = self.thin()
        z = y if bias is None else y - bias
        z = z + (self.dropout(x, self.training) @ a.T @ b.T) * self.scale
        norm = dora_norm(base.weight(), a, b, self.scale, self.known)
        z = z * (self.magnitude / norm)
        return z if bias is None else z + bias

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # The norm is that of this attachment's own frozen weight; `weight` may hold another tuning's merge by now.
        a, b = self.thin()
        update = b @ a * self.scale
        base: Base = self.__dict__["base"]
        norm = torch.linalg.vector_norm((base.weight() + update).detach(), dim=1)
        return (weight + update) * (self.magnitude / norm)[:, None], bias

    def fused(self, base: Base, x: Tensor) -> Tensor | None:
        if not fusable(base):
            return None
        seed = self.dropout.seed(self.training)
        p = 0.0 if seed is None else self.dropout.p
        a, b = self.thin()
        return dora_linear(x, base.frozen(), base.bias(), a, b, self.magnitude, self.scale, p, seed, self.known)

    def still(self, base: Base) -> None:
        """Nothing: the lengths are no thin update."""

    @classmethod
    def together(cls, members: Sequence[Attachment], dtype: torch.dtype) -> None:
        """Nothing, likewise."""


class ThinTurn(Turned, ThinUpdate):
    """The turn of A and B as they are."""


class MovedTurn(Turned, MovedUpdate):
    """The turn of what A and B have moved from their start."""


class TurnFromRows(Turned, FromRows):
    """The same, from where rows say."""
