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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from luthier.anatomy import Anatomy
from luthier.methods.parts.adopted import mean_of, own_sites
from luthier.methods.parts.behind import Behind
from luthier.methods.parts.of_adapters import OneOfAdapters
from luthier.surgery import METHODS, Base, Source, TunedView


@METHODS.register("adapter_soup", family="additive", paper="arXiv:2302.07027")
@dataclass(frozen=True, kw_only=True)
class AdapterSoup(OneOfAdapters):
    """Settings of AdapterSoup. All but `train` are the sources' own."""

    train: Annotated[bool, "let the mean train on"] = False

    default_head_lr: ClassVar[float | None] = 3e-2
    tiny: ClassVar[dict[str, int | str | bool]] = {"reduction": 8, "activation": "gelu", "train": True}

    def adapter(self, base: Base, norm: str) -> Behind:
        return super().adapter(base, norm).requires_grad_(self.train)

    def n_params(self, anatomy: Anatomy) -> int:
        return self.n_stored(anatomy) if self.train else 0

    def n_stored(self, anatomy: Anatomy) -> int:
        return super().n_params(anatomy)

    @torch.no_grad()
    def adopt(self, tuned: TunedView, sources: Sequence[Source]) -> None:
        for key, adapter in own_sites(self, tuned, Behind):
            adapter.load_state_dict(mean_of(sources, key))
