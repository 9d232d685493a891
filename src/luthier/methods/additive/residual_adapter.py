"""Residual adapter: a bottleneck with a norm of its own at the end of each block, on the residual stream.

    y <- y + W_u ReLU(W_d LN_a(y) + b_d) + b_u          W_d: (r, d)    W_u: (d, r)    LN_a: new, trained

y is the stream as the block hands it on. The norm stands inside the branch, so a larger or a shifted y gives the same
branch. The weights start small, so the model starts near the base; with init="zero_up" it starts at it.

Lin, Madotto, Fung 2020, "Exploring Versatile Generative Language Model via Parameter-Efficient Transfer Learning",
arXiv:2004.03829, section 3.1. LoRA's tables call it Adapter-L.

Count: per block 2 d r + r + 3 d.
Claims: one GPT-2 serves five tasks with 2 to 3 % more numbers for each.
Cost: one bottleneck and one norm in every block; gradients go through every block, as with any adapter.
Use it when: a decoder serves several tasks and one adapter a block is enough.
Not when: answers must cost what the base's cost: it does not merge.
Pitfalls: a norm outside of the branch would change the stream itself; the paper chooses the width per task, 10 to 300.
Its task embeddings, new words in front of the text, are not part of this method here: they are prompt_tuning with one
vector, and stand beside it (`residual_adapter+prompt_tuning`).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import AnatomyError, at_least
from luthier.methods.parts.bottleneck import Activation, Bottleneck
from luthier.surgery import METHODS, Edit, Method, attach_each


@METHODS.register("residual_adapter", family="additive", paper="arXiv:2004.03829")
@dataclass(frozen=True, kw_only=True)
class ResidualAdapter(Method):
    """Settings of the residual adapter."""

    sites: Annotated[tuple[str, ...], "where to attach; none: block_out of every layer"] = ()
    width: Annotated[int, "width of the bottleneck", at_least(1)] = 100
    activation: Annotated[Activation, "between its two layers"] = "relu"
    init: Annotated[Literal["paper", "zero_up"], "small normal weights, or a second layer of zeros"] = "paper"

    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 5e-4
    # Kinks of ReLU turn roundings of a tiny model into other gradients.
    tiny: ClassVar[dict[str, int | str]] = {"width": 6, "activation": "gelu"}

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        yield from attach_each(
            self._sites(anatomy), lambda site, base: Residual(site.d_out, self.width, self.activation, self.init)
        )

    def n_params(self, anatomy: Anatomy) -> int:
        return sum(2 * s.d_out * self.width + self.width + 3 * s.d_out for s in self._sites(anatomy))

    def _sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        found = anatomy.sites(*(self.sites or ("block_out",)), asked_by="residual_adapter.sites", fits=_ends_a_block)
        for site in found:
            if not _ends_a_block(site):
                raise AnatomyError(f"residual_adapter.sites: {site.key} is not the end of a block. Use block_out.")
        return found


def _ends_a_block(site: Site) -> bool:
    return site.kind == "block_out"


class Residual(Bottleneck):
    """Adds a bottleneck of the normed stream to the stream."""

    kind = "sequential"
    needs_input = False

    def __init__(self, d: int, width: int, activation: Activation, init: Literal["paper", "zero_up"]) -> None:
        super().__init__(d, width, activation)
        self.norm = nn.LayerNorm(d)
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=0.02)
        if init == "zero_up":
            nn.init.zeros_(self.up.weight)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return self.add(y, self.norm(y))
