"""Pfeiffer adapter: one bottleneck per block, behind the feed-forward layer, that reads the normed stream.

    v = LN(s + u)        y = LN(s + W_u ReLU(W_d v + b_d) + b_u + u)          W_d: (r, d)    W_u: (d, r)

s is what the feed-forward layer gives, u the stream it read, LN the frozen norm that closes the block: it acts twice,
with the same weights. In a model that norms before its sublayers there is no such norm, and v = s + u. The weights
start small, so the model starts near the base; with init="zero_up" it starts at it.

Pfeiffer et al. 2021, "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", arXiv:2005.00247,
section 3.2; the placement became AdapterHub's usual one.

Count: per block 2 d r + r + d, with r = d / reduction.
Claims: as good as two adapters a block, at half their cost; the material of adapter_fusion, adapter_soup and mera.
Cost: one bottleneck and one more norm in every block: about what LoRA costs.
Use it when: several tasks' adapters shall be combined later, or other tools' adapters of this form are the measure.
Not when: answers must cost what the base's cost: it does not merge.
Pitfalls: reading s alone, or s + u without the norm, trains well and is another function than adapters of this form;
the norm itself stays frozen.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from luthier.anatomy import Anatomy, Site
from luthier.core import at_least
from luthier.methods.parts.behind import Behind, behind_params, behind_sites, closing_norm, reduced
from luthier.methods.parts.bottleneck import Activation
from luthier.surgery import METHODS, Edit, Method, attach_each


@METHODS.register("pfeiffer_adapter", family="additive", paper="arXiv:2005.00247")
@dataclass(frozen=True, kw_only=True)
class PfeifferAdapter(Method):
    """Settings of the Pfeiffer adapter."""

    sites: Annotated[tuple[str, ...], "where to attach; none: ffn_out of every layer"] = ()
    reduction: Annotated[int, "how many times narrower than the stream the bottleneck is", at_least(1)] = 16
    activation: Annotated[Activation, "between its two layers"] = "relu"
    init: Annotated[Literal["paper", "zero_up"], "small normal weights, or a second layer of zeros"] = "paper"

    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 1e-3
    # Kinks of ReLU turn roundings of a tiny model into other gradients.
    tiny: ClassVar[dict[str, int | str]] = {"reduction": 8, "activation": "gelu"}

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        norms = {site.key: closing_norm(anatomy, site, "pfeiffer_adapter") for site in self._sites(anatomy)}
        yield from attach_each(
            self._sites(anatomy),
            lambda site, base: Behind(base, norms[site.key], reduced(site, self.reduction), self.activation, self.init),
        )

    def n_params(self, anatomy: Anatomy) -> int:
        return behind_params(self._sites(anatomy), self.reduction)

    def _sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        return behind_sites(anatomy, self.sites, "pfeiffer_adapter")
