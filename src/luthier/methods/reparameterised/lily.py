"""Lily: neighbouring layers share A, all layers share several B, and each layer's router mixes these by what it reads.

    h = A x      p = softmax(R h)      y = x W^T + b + scale h (sum_e p_e B_e)

    A: (rank, d_in), of `stride` neighbours     B_e: (rank, d_out), of all sites of a kind     R: (experts, rank)

B starts at zero, so the tuned model starts as the base model. `route=row` takes the mean of p over the row's real
tokens, and in a generation that of the prompt; `route=token` lets each token have its own p, which looks at nothing
behind it.

Zhong, Zhao, Zhou 2024, "Low-Rank Interconnected Adaptation across Layers", arXiv:2407.09946. The authors' code, and
peft 0.21 after it, take the mean over all tokens of the whole batch, pads among them: there a row's answer depends on
its neighbours, and with a cache on one token alone. Here no row sees another; for one row without pads both compute the
same (tests/methods/test_lily.py). No file says which of the two is meant, so none is exchanged with peft. The authors'
code has a ReLU behind A in some places, peft has none, and neither has ours.

Count: per kind of site: ceil(n / stride) rank d_in + experts rank d_out + n experts rank, for its n sites.
Claims: updates of higher rank than LoRA's at the same count.
Use it when: an encoder or a classifier is tuned at about LoRA's size.
Not when: the weights have to take it in: what depends on the text cannot be merged. A model that writes: route=token.
Pitfalls: with `route=row` a decoder learns from the mean over tokens that it will not have when it writes; texts that
stand one behind the other in a row are refused there; a small stride and many experts undo the saving.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.anatomy.selection import is_projection
from luthier.core import above, at_least
from luthier.methods.parts.low_rank import check_rows
from luthier.methods.parts.text_mean import mean_over_text
from luthier.surgery import METHODS, Attach, Attachment, Edit, Method


@METHODS.register("lily", family="reparameterised", paper="arXiv:2407.09946")
@dataclass(frozen=True, kw_only=True)
class Lily(Method):
    """Settings of Lily."""

    sites: Annotated[tuple[str, ...], "where to attach: attn.q, ffn, attn.q@0-5, *@last4"] = ("attn.q", "attn.v")
    rank: Annotated[int, "width of the thin matrices", at_least(1)] = 16
    stride: Annotated[int, "neighbouring sites of a kind that share one A", at_least(1)] = 2
    experts: Annotated[int, "matrices B that all sites of a kind share", at_least(2)] = 3
    scale: Annotated[float, "multiplies the update", above(0)] = 1.0
    route: Annotated[Literal["row", "token"], "experts are mixed once for a row, or for each token"] = "row"

    looks_ahead: ClassVar[bool] = True
    default_lr: ClassVar[float] = 4e-3
    tiny: ClassVar[dict[str, float]] = {"rank": 3, "lr": 2e-2}

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        """The sites, in the order of the model."""
        sites = anatomy.sites(*self.sites, asked_by="lily.sites", fits=is_projection)
        return check_rows(anatomy, sites, "lily", 0.0)

    def alike(self, anatomy: Anatomy) -> list[list[Site]]:
        """The sites of one kind, stack and shape, group by group."""
        groups: dict[tuple[str, str, int, int], list[Site]] = {}
        for site in self.places(anatomy):
            groups.setdefault((site.kind, site.stack, site.d_in, site.d_out), []).append(site)
        return list(groups.values())

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        for number, sites in enumerate(self.alike(anatomy)):
            pool = Pool(self.experts, self.rank, sites[0].d_out)
            for first in range(0, len(sites), self.stride):
                down = Down(self.rank, sites[0].d_in)
                shared = {f"pool{number}": pool, f"down{number}_{first // self.stride}": down}
                for site in sites[first : first + self.stride]:
                    yield self._at(site, pool, down, shared)

    def _at(self, site: Site, pool: "Pool", down: "Down", shared: Mapping[str, nn.Module]) -> Attach:
        return Attach(site, lambda base: Routed(self, site, pool, down), shared)

    def n_params(self, anatomy: Anatomy) -> int:
        return sum(
            -(-len(sites) // self.stride) * self.rank * sites[0].d_in
            + self.experts * self.rank * (sites[0].d_out + len(sites))
            for sites in self.alike(anatomy)
        )


class Pool(nn.Module):
    """b: (experts, rank, d_out)."""

    def __init__(self, experts: int, rank: int, d_out: int) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(experts, rank, d_out))


class Down(nn.Module):
    """a: (rank, d_in)."""

    def __init__(self, rank: int, d_in: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, d_in))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))


class Routed(Attachment):
    """Adds the mixture of the pool's updates. router: (experts, rank)."""

    kind = "delta"
    per_token = False
    reads_whole_text = True

    def __init__(self, settings: Lily, site: Site, pool: Pool, down: Down) -> None:
        super().__init__()
        self.__dict__["pool"], self.__dict__["down"] = pool, down  # registered once, on the tuning
        self.scale, self.by_row = settings.scale, settings.route == "row"
        # Keys and values of cross-attention stand in the decoder and read the encoder.
        self.stack = "encoder" if site.kind in ("cross.k", "cross.v") else site.stack
        if not self.by_row:
            self.__dict__["per_token"], self.__dict__["reads_whole_text"] = True, False
        self.router = nn.Parameter(torch.empty(settings.experts, settings.rank))
        nn.init.kaiming_uniform_(self.router, a=math.sqrt(5))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        pool: Pool = self.__dict__["pool"]
        down: Down = self.__dict__["down"]
        rows = x if x.dim() == 3 else x.reshape(self.context.batch, -1, x.shape[-1])  # OPT flattens batch and tokens
        thin = rows @ down.a.T  # (B, T, rank)
        shares = (thin @ self.router.T).softmax(-1)  # (B, T, experts)
        if self.by_row:
            mask = self.context.mask_for(self.stack)
            shares = self.context.once(id(self), lambda: mean_over_text(shares, mask))  # (B, 1, experts)
        mixed = (shares[..., None] * thin[..., None, :]).flatten(-2)  # (B, T, experts, rank) -> (B, T, experts * rank)
        update: Tensor = mixed @ pool.b.flatten(0, 1) * self.scale
        return y + update.reshape(y.shape)
