"""AdapterFusion: in each block an attention over what several frozen adapters of other tasks give, token by token.

    v = LN(s + u)      z_n = W_u^n ReLU(W_d^n v + b_d^n) + b_u^n      α = softmax_n((Q v + b_q) · (K z_n + b_k))

    y = LN(s + Σ_n α_n V z_n + u)                        Q, K, V: (d, d)

The adapters are tunings of pfeiffer_adapter on the same base: two or more, named with --source, copied and frozen. Only
Q, K and V train, and a new head. V starts at the identity, so the model starts near the mean of its adapters.

Pfeiffer et al. 2021, "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", arXiv:2005.00247,
section 3.2.2; the scores are not divided, the regulariser is that of the authors' code. Their rate of 5e-5 is for large
sets: on some hundred rows ten times that and a hundred for the new head were best of those tried.

Count: per block 3 d² + 2 d, however many adapters; they are stored with it.
Claims: uses what several tasks have learnt without harming any of them.
Cost: three products of full width a block and every adapter's bottleneck: half more than LoRA's step.
Use it when: adapters of related tasks are there, and the task at hand has few rows.
Not when: one adapter is meant: adapter_soup and mera make one of several.
Pitfalls: attention over tokens, or scores divided by sqrt(d), is another method; 0.01 |I - V|² is added to the loss.
At 1e-3 for all, the head too, one seed of three fell to chance.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Self

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import ConfigError, at_least, between
from luthier.methods.parts.adopted import agreed, no_sources, own_sites
from luthier.methods.parts.behind import behind_params, behind_sites, closing_norm, reduced, stream
from luthier.methods.parts.bottleneck import Activation, activated
from luthier.methods.parts.own_tensors import own_modules
from luthier.surgery import METHODS, Attachment, Base, Edit, Method, Source, TunedView, attach_each


@METHODS.register("adapter_fusion", family="additive", paper="arXiv:2005.00247")
@dataclass(frozen=True, kw_only=True)
class AdapterFusion(Method):
    """Settings of AdapterFusion. The first four are the sources' own."""

    adapters: Annotated[int | None, "how many are fused; left out, as many as sources", at_least(1)] = None
    reduction: Annotated[int | None, "of the adapters; left out, the sources'", at_least(1)] = None
    activation: Annotated[Activation | None, "of the adapters; left out, the sources'"] = None
    sites: Annotated[tuple[str, ...], "where to attach; none: where the sources are"] = ()
    dropout: Annotated[float, "share of the scores dropped in training", between(0, 0.99)] = 0.1
    keep_value: Annotated[float, "times |I - V|² of every block is added to the loss", at_least(0)] = 0.01

    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 5e-4
    default_head_lr: ClassVar[float | None] = 5e-3
    sources: ClassVar[tuple[str, ...]] = ("pfeiffer_adapter",)
    least_sources: ClassVar[int] = 2
    tiny: ClassVar[dict[str, int | float | str]] = {"adapters": 2, "reduction": 8, "activation": "gelu", "lr": 0.02}

    def fitted(self, sources: Sequence[Source]) -> Self:
        if self.adapters not in (None, len(sources)):
            raise ConfigError(f"adapter_fusion: adapters={self.adapters}, and {len(sources)} sources are named.")
        same = {name: agreed(self, sources, name) for name in ("reduction", "activation", "sites")}
        return replace(self, adapters=len(sources), **same)

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        if self.adapters is None:
            raise no_sources(self, "adapters to fuse")
        norms = {site.key: closing_norm(anatomy, site, "adapter_fusion") for site in self._sites(anatomy)}
        yield from attach_each(self._sites(anatomy), lambda site, base: Fusion(self, base, norms[site.key]))

    def n_params(self, anatomy: Anatomy) -> int:
        return sum(3 * s.d_out**2 + 2 * s.d_out for s in self._sites(anatomy))

    def n_stored(self, anatomy: Anatomy) -> int:
        held = (self.adapters or 2) * behind_params(self._sites(anatomy), self.reduction or 16)
        return self.n_params(anatomy) + held

    def extra_loss(self, tuned: TunedView) -> Tensor | None:
        if self.keep_value == 0:
            return None
        away = [(m.value.weight - torch.eye(len(m.value.weight), device=m.value.weight.device)).square().sum()
                for m in own_modules(self, tuned, Fusion)]  # fmt: skip
        return self.keep_value * torch.stack(away).sum()

    @torch.no_grad()
    def adopt(self, tuned: TunedView, sources: Sequence[Source]) -> None:
        for key, fusion in own_sites(self, tuned, Fusion):
            parts = [source.part(key) for source in sources]
            for name in ("down.weight", "down.bias", "up.weight", "up.bias"):
                fusion.get_buffer(name.replace(".", "_")).copy_(torch.stack([part[name] for part in parts]))

    def _sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        return behind_sites(anatomy, self.sites, "adapter_fusion")


class Fusion(Attachment):
    """The adapters of one block, frozen, and the attention over what they give."""

    kind = "sequential"
    reads = "residual"

    down_weight: Tensor  # (N, r, d)
    down_bias: Tensor  # (N, r)
    up_weight: Tensor  # (N, d, r)
    up_bias: Tensor  # (N, d)

    def __init__(self, settings: AdapterFusion, base: Base, norm: str) -> None:
        super().__init__()
        d, n = base.site.d_out, settings.adapters or 1
        r = reduced(base.site, settings.reduction or 16)
        self.norm = base.beside("norm", norm) if norm else None
        self.activation: Activation = settings.activation or "relu"
        # Numbers of the sources, or of the saved tuning that is loaded; drawn only so that they are of some size.
        self.register_buffer("down_weight", torch.randn(n, r, d) / d**0.5)
        self.register_buffer("down_bias", torch.zeros(n, r))
        self.register_buffer("up_weight", torch.randn(n, d, r) / r**0.5)
        self.register_buffer("up_bias", torch.zeros(n, d))
        self.query, self.key, self.value = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d, bias=False)
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.value.weight.fill_(1e-6).fill_diagonal_(1.0)
        self.dropout = nn.Dropout(settings.dropout)

    def given(self, v: Tensor) -> Tensor:
        """z: what each adapter gives. v: (..., d) -> (..., N, d)."""
        hidden = activated(self.activation, torch.einsum("...d,nrd->...nr", v, self.down_weight) + self.down_bias)
        return torch.einsum("...nr,ndr->...nd", hidden, self.up_weight) + self.up_bias

    def shares(self, v: Tensor, z: Tensor) -> Tensor:
        """α: (..., N)."""
        q = self.query(v)
        # q · (K z_n + b) = (q K) · z_n + q · b: one product of full width, not one for each adapter.
        # (..., d) against (..., N, d): the adapters stand before the last dimension
        scores = (z * (q @ self.key.weight).unsqueeze(-2)).sum(-1) + (q * self.key.bias).sum(-1, keepdim=True)
        out: Tensor = self.dropout(scores).softmax(-1)
        return out

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        v = stream(self.norm, x, y)
        z = self.given(v)
        mixed = (self.shares(v, z).unsqueeze(-1) * z).sum(-2)  # (..., N, 1) * (..., N, d) -> (..., d)
        out: Tensor = y + self.value(mixed)
        return out
