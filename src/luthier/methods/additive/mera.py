"""MerA: several adapters become one, their neurons matched before they are averaged; then the one trains.

    C_ij = |φ_i of the first - φ_j of another|      Π = the cheapest matching of its neurons to the first's

    W_d <- Π W_d      b_d <- Π b_d      W_u <- W_u Π^T      then the mean of all, or their sum

φ_i is row i of [W_d, b_d]. A matched adapter computes what it did before; only the order of its neurons is another. The
adapters are tunings of pfeiffer_adapter on the same base, two or more, named with --source.

He et al. 2023, "MerA: Merging Pretrained Adapters For Few-Shot Learning", arXiv:2308.15982, section 3.

Count: one Pfeiffer adapter, per block 2 d r + r + d.
Claims: better than a single adapter and than adapter_fusion with few rows, at the size of one.
Use it when: adapters of tasks like yours are there, and your task has few rows.
Not when: the tasks are unlike: the paper merges only what belongs to one family of tasks.
Pitfalls: averaging unmatched neurons destroys them; W_u must follow W_d. The paper also matches by activations on a
probe batch: that is not offered. Its numbers of adapters and rates are not known to us.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from torch import Tensor

from luthier.anatomy import Anatomy, Site
from luthier.core import ConfigError, at_least
from luthier.methods.parts.adopted import agreed, own_sites
from luthier.methods.parts.assignment import assignment
from luthier.methods.parts.behind import Behind, behind_sites, closing_norm, reduced
from luthier.methods.parts.bottleneck import Activation
from luthier.surgery import METHODS, Base, Edit, Method, Source, TunedView, attach_each


@METHODS.register("mera", family="additive", paper="arXiv:2308.15982")
@dataclass(frozen=True, kw_only=True)
class MerA(Method):
    """Settings of MerA. The first three are the sources' own."""

    reduction: Annotated[int | None, "of the adapters; left out, the sources'", at_least(1)] = None
    activation: Annotated[Activation | None, "of the adapters; left out, the sources'"] = None
    sites: Annotated[tuple[str, ...], "where to attach; none: where the sources are"] = ()
    by: Annotated[Literal["mean", "sum"], "how matched adapters become one"] = "mean"

    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 1e-3
    sources: ClassVar[tuple[str, ...]] = ("pfeiffer_adapter",)
    least_sources: ClassVar[int] = 2
    tiny: ClassVar[dict[str, int | str]] = {"reduction": 8, "activation": "gelu"}

    def fitted(self, sources: Sequence[Source]) -> Self:
        return replace(self, **{name: agreed(self, sources, name) for name in ("reduction", "activation", "sites")})

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        if self.reduction is None:
            raise ConfigError(
                "mera: no adapters to merge. Name at least two tunings of pfeiffer_adapter: --source runs/a --source "
                "runs/b, or attach(..., sources=[...])."
            )
        norms = {site.key: closing_norm(anatomy, site, "mera") for site in self._sites(anatomy)}
        yield from attach_each(self._sites(anatomy), lambda site, base: self._adapter(base, norms[site.key]))

    def _adapter(self, base: Base, norm: str) -> Behind:
        return Behind(base, norm, reduced(base.site, self.reduction or 16), self.activation or "relu")

    def n_params(self, anatomy: Anatomy) -> int:
        widths = ((s.d_out, reduced(s, self.reduction or 16)) for s in self._sites(anatomy))
        return sum(2 * d * r + r + d for d, r in widths)

    @torch.no_grad()
    def adopt(self, tuned: TunedView, sources: Sequence[Source]) -> None:
        for key, adapter in own_sites(self, tuned, Behind):
            first, *others = [source.part(key) for source in sources]
            alike = [first, *(aligned(other, first) for other in others)]
            together = {n: torch.stack([one[n] for one in alike]).sum(0) for n in first}
            factor = 1 / len(alike) if self.by == "mean" else 1.0
            adapter.load_state_dict({n: factor * t for n, t in together.items()})

    def _sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        return behind_sites(anatomy, self.sites, "mera")


def matching(adapter: dict[str, Tensor], anchor: dict[str, Tensor]) -> Tensor:
    """Π: (r, r), entry (i, j) one where neuron i of the anchor is matched with neuron j of the adapter."""
    # (r, d + 1): a neuron's weights and its bias
    ours, theirs = (torch.cat([a["down.weight"], a["down.bias"][:, None]], 1).double() for a in (anchor, adapter))
    columns = torch.from_numpy(assignment(torch.cdist(ours, theirs).numpy()))
    return torch.eye(len(columns))[columns]


def aligned(adapter: dict[str, Tensor], anchor: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapter with its neurons in the anchor's order; it computes what it did."""
    order = matching(adapter, anchor)
    return {
        "down.weight": order @ adapter["down.weight"],
        "down.bias": order @ adapter["down.bias"],
        "up.weight": adapter["up.weight"] @ order.T,  # (d, r)
        "up.bias": adapter["up.bias"],
    }
