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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from luthier.methods.parts.adopted import own_sites
from luthier.methods.parts.assignment import assignment
from luthier.methods.parts.behind import Behind
from luthier.methods.parts.of_adapters import OneOfAdapters
from luthier.surgery import METHODS, Source, TunedView


@METHODS.register("mera", family="additive", paper="arXiv:2308.15982")
@dataclass(frozen=True, kw_only=True)
class MerA(OneOfAdapters):
    """Settings of MerA. All but `by` are the sources' own."""

    by: Annotated[Literal["mean", "sum"], "how matched adapters become one"] = "mean"

    least_sources: ClassVar[int] = 2
    tiny: ClassVar[dict[str, int | str]] = {"reduction": 8, "activation": "gelu"}

    @torch.no_grad()
    def adopt(self, tuned: TunedView, sources: Sequence[Source]) -> None:
        for key, adapter in own_sites(self, tuned, Behind):
            first, *others = [source.part(key) for source in sources]
            alike = [first, *(aligned(other, first) for other in others)]
            together = {n: torch.stack([one[n] for one in alike]).sum(0) for n in first}
            factor = 1 / len(alike) if self.by == "mean" else 1.0
            adapter.load_state_dict({n: factor * t for n, t in together.items()})


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
