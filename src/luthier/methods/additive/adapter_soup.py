"""AdapterSoup: one adapter whose numbers are the mean of several that were trained on other domains.

    Φ = 1/|S| Σ_{n in S} Φ_n          every tensor of the adapters alike

The adapters are tunings of pfeiffer_adapter on the same base, named with --source. Nothing of the mean trains, only a
new head where the model has one; with train=true the mean is where an adapter's training starts.

Chronopoulou et al. 2023, "AdapterSoup: Weight Averaging to Improve Generalization of Pretrained Language Models",
arXiv:2302.07027, section 2.

Count: none; with train=true, one Pfeiffer adapter, 2 d r + r + d per block.
Claims: better on domains that no adapter has seen than any single adapter, at the cost of one.
Use it when: adapters of several domains are there, and the new domain has no rows to learn from.
Not when: the adapters come from unlike starts or tasks: the mean of unlike numbers is no adapter. See mera.
Pitfalls: a head that trains alone wants a large rate, head_only's: at the adapters' own of 1e-3 it hardly moves in a
few hundred steps. The mean of what adapters give, not of their numbers, is an ensemble at N times the cost. The paper
chooses S by clustering texts of the domains; here you choose it, by naming the sources. A language model has no head to
train: attach(model, "adapter_soup", sources=[...]).save(folder) makes the soup without a run.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Self

import torch

from luthier.anatomy import Anatomy, Site
from luthier.core import ConfigError, at_least
from luthier.methods.parts.adopted import agreed, mean_of, own_sites
from luthier.methods.parts.behind import Behind, behind_sites, closing_norm, reduced
from luthier.methods.parts.bottleneck import Activation
from luthier.surgery import METHODS, Base, Edit, Method, Source, TunedView, attach_each


@METHODS.register("adapter_soup", family="additive", paper="arXiv:2302.07027")
@dataclass(frozen=True, kw_only=True)
class AdapterSoup(Method):
    """Settings of AdapterSoup. The first three are the sources' own."""

    reduction: Annotated[int | None, "of the adapters; left out, the sources'", at_least(1)] = None
    activation: Annotated[Activation | None, "of the adapters; left out, the sources'"] = None
    sites: Annotated[tuple[str, ...], "where to attach; none: where the sources are"] = ()
    train: Annotated[bool, "let the mean train on"] = False

    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 1e-3
    default_head_lr: ClassVar[float | None] = 3e-2
    sources: ClassVar[tuple[str, ...]] = ("pfeiffer_adapter",)
    tiny: ClassVar[dict[str, int | str | bool]] = {"reduction": 8, "activation": "gelu", "train": True}

    def fitted(self, sources: Sequence[Source]) -> Self:
        return replace(self, **{name: agreed(self, sources, name) for name in ("reduction", "activation", "sites")})

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        if self.reduction is None:
            raise ConfigError(
                "adapter_soup: no adapters to average. Name tunings of pfeiffer_adapter: --source runs/a --source "
                "runs/b, or attach(..., sources=[...])."
            )
        norms = {site.key: closing_norm(anatomy, site, "adapter_soup") for site in self._sites(anatomy)}
        yield from attach_each(self._sites(anatomy), lambda site, base: self._adapter(base, norms[site.key]))

    def _adapter(self, base: Base, norm: str) -> Behind:
        made = Behind(base, norm, reduced(base.site, self.reduction or 16), self.activation or "relu")
        return made.requires_grad_(self.train)

    def n_params(self, anatomy: Anatomy) -> int:
        return self.n_stored(anatomy) if self.train else 0

    def n_stored(self, anatomy: Anatomy) -> int:
        widths = ((s.d_out, reduced(s, self.reduction or 16)) for s in self._sites(anatomy))
        return sum(2 * d * r + r + d for d, r in widths)

    @torch.no_grad()
    def adopt(self, tuned: TunedView, sources: Sequence[Source]) -> None:
        for key, adapter in own_sites(self, tuned, Behind):
            adapter.load_state_dict(mean_of(sources, key))

    def _sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        return behind_sites(anatomy, self.sites, "adapter_soup")
