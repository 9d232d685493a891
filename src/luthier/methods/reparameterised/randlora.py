"""RandLoRA: an update of full rank from frozen random matrices that all sites share; their scales are trained.

    y = x W^T + b + s sum_k B_k diag(l_k) A diag(g_k) x

    A: (rank, d_in), B_k: (d_out, rank), frozen      l_k: (rank,)    g_k: (d_in,)

k runs to d / rank, d the smaller width; where d_out is the smaller one, A and the B_k change sides. l starts at zero,
so the tuned model starts as the base model. s = alpha / rank.

Albert et al. 2025, "RandLoRA: Full-rank Parameter-Efficient Fine-Tuning of Large Models", arXiv:2502.00987. The form is
that of peft 0.21, and so is the way the matrices are drawn from `draw`; they are not stored. In that form l counts the
random columns in another order than g, which means nothing, as they are random.

Count: sum over sites of d + d^2 / rank, rounded up, d being the smaller width.
Claims: full rank at LoRA's size; a larger `rank` is a smaller tuning.
Use it when: a low rank is what holds LoRA back, and time is no matter.
Not when: memory or time is short: an update as large as the weight is made in every pass.
Pitfalls: the matrices depend on the widest site, so other `sites` are other matrices.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import above, at_least
from luthier.methods.parts.dense import DenseUpdate
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base, Edit, PeftForm, attach_each


@METHODS.register("randlora", family="reparameterised", paper="arXiv:2502.00987")
@dataclass(frozen=True, kw_only=True)
class RandLoRA(AtProjections):
    """Settings of RandLoRA."""

    rank: Annotated[int, "width of one random pair: the larger, the fewer numbers are trained", at_least(1)] = 32
    alpha: Annotated[float, "the update is scaled by alpha / rank", above(0)] = 640.0
    draw: Annotated[int, "which matrices: any whole number", at_least(0)] = 0

    default_lr: ClassVar[float] = 1e-3
    start_is_drawn: ClassVar[bool] = False  # what is drawn follows from `draw`
    tiny: ClassVar[dict[str, float]] = {"rank": 7, "alpha": 20.0, "lr": 1e-2}
    peft: ClassVar[PeftForm | None] = PeftForm(
        "RANDLORA",
        {"randlora_lambda": "l", "randlora_gamma": "g"},
        {"r": "rank", "randlora_alpha": "alpha", "projection_prng_key": "draw"},
        {"sparse": False, "very_sparse": False},
        ignored=("randlora_dropout", "save_projection"),
        write=lambda method: {"save_projection": False},
        shared={"base_model.randlora_A": ("pool", "a"), "base_model.randlora_B": ("pool", "b")},
    )

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        sites = self.places(anatomy)
        widths = max(s.d_in for s in sites), max(s.d_out for s in sites)
        pool = Pool(min(widths), max(widths), self.rank, self.draw)
        yield from attach_each(sites, partial(self._scaled, pool), shared={"pool": pool})

    def params_at(self, site: Site) -> int:
        small = min(site.d_in, site.d_out)
        return -(-small // self.rank) * (self.rank + small)

    def build(self, site: Site, base: Base) -> Attachment:
        widths = site.d_in, site.d_out
        return self._scaled(Pool(min(widths), max(widths), self.rank, self.draw), site, base)

    def _scaled(self, pool: "Pool", site: Site, base: Base) -> Attachment:
        return ScaledPool(pool, site.d_in, site.d_out, self.rank, self.alpha / self.rank)


class Pool(nn.Module):
    """The frozen matrices. a: (rank, 1, smaller width)   b: (larger width, how many, rank)."""

    a: Tensor
    b: Tensor

    def __init__(self, small: int, large: int, rank: int, number: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(number)

        def drawn(*shape: int) -> Tensor:
            value = torch.empty(shape, dtype=torch.bfloat16, device="cpu")
            bound = 1 / (shape[1] * shape[2]) ** 0.5
            return value.uniform_(-bound, bound, generator=draw)

        # In bfloat16, as peft draws and scales them: one number then names the same matrices there and here.
        a = drawn(rank, 1, small)
        b = torch.cat([drawn(large, 1, rank) for _ in range(-(-small // rank))], 1)
        self.register_buffer("a", (a / a.std()).float(), persistent=False)
        self.register_buffer("b", (b / b.std()).float(), persistent=False)


class ScaledPool(DenseUpdate):
    """Adds the sum of the pool's products, scaled by l and g."""

    def __init__(self, pool: Pool, d_in: int, d_out: int, rank: int, scale: float) -> None:
        super().__init__()
        self.__dict__["pool"] = pool  # registered once, on the tuning
        self.small, self.large, self.turned, self.scale = min(d_in, d_out), max(d_in, d_out), d_in > d_out, scale
        n = -(-self.small // rank)
        self.l = nn.Parameter(torch.zeros(rank, n))
        self.g = nn.Parameter(torch.full((n, self.small), 1 / max(n, self.small)))

    def update(self) -> Tensor:
        pool: Pool = self.__dict__["pool"]
        b = pool.b[: self.large, : self.l.shape[1]].flatten(1).to(self.l.dtype)
        a = (self.l[:, :, None] * pool.a[:, :, : self.small].to(self.l.dtype) * self.g[None]).flatten(0, 1)
        found = b @ a * self.scale  # (larger, smaller)
        return found.T if self.turned else found
