"""SHiRA: a few entries of each weight train, chosen at random, and stand beside the frozen weight.

    y = x (W + D)^T + b      D: (d_out, d_in), zero but for rank (d_in + d_out) entries

D starts at zero, so the tuned model starts as the base model. Each site has as many entries as a LoRA of this rank has
numbers there; which they are is drawn when it is attached, and stored.

"Sparse High Rank Adapters" 2024, arXiv:2406.13175. The form is that of peft 0.21, which has the random mask of the
paper's masks.

Count: sum over sites of rank (d_in + d_out); as many places are stored.
Claims: an update of high rank, of which several on one model disturb each other less than LoRA's.
Use it when: tunings are switched often: to change few entries of a weight is quick.
Not when: memory counts in training: an update as large as the weight is made in every pass.
Pitfalls: the places are not those of another seed; `random_mask` draws over all weights of the model at once, this one
in each.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from luthier.anatomy import Anatomy, Site
from luthier.core import IntegrityError, at_least
from luthier.methods.parts.projections import AtProjections
from luthier.methods.parts.sparse import SparseUpdate, check_entries
from luthier.surgery import METHODS, Attachment, Base, PeftForm, PeftIn, PeftOut, PeftTaken, PeftWhole

_THERE = {"values": "shira_weight", "index": "shira_indices"}


def _out(going: PeftOut) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Places go out as (2, n): rows and columns."""
    widths = {site.path: site.d_in for site in going.sites.values()}
    tensors = going.by_layer(_THERE)
    for name, flat in tensors.items():
        if name.endswith(f".{_THERE['index']}"):
            width = widths[name.removeprefix("base_model.model.").removesuffix(f".{_THERE['index']}")]
            tensors[name] = torch.stack([flat // width, flat % width])
    return tensors, {"mask_type": "random"}


def _back(coming: PeftIn) -> PeftTaken:
    words, stored = coming.by_layer({theirs: ours for ours, theirs in _THERE.items()})
    widths = {site.key: site.d_in for site in coming.anatomy.all_sites}
    for name, places in stored.items():
        if name.endswith(".index"):
            rows, columns = places.long()
            if bool(((columns < 0) | (columns >= widths[name.removesuffix(".index")])).any()):
                raise IntegrityError(
                    f"{coming.where}: the weights beside it name columns that {name.removesuffix('.index')} does not "
                    "have. Take the right base, or restore them from a copy."
                )
            stored[name] = (rows * widths[name.removesuffix(".index")] + columns).to(torch.int32)
    return PeftTaken({"sites": words}, stored)


@METHODS.register("shira", family="reparameterised", paper="arXiv:2406.13175")
@dataclass(frozen=True, kw_only=True)
class SHiRA(AtProjections):
    """Settings of SHiRA."""

    rank: Annotated[int, "as many entries train as a LoRA of this rank has numbers", at_least(1)] = 8

    default_lr: ClassVar[float] = 1e-3
    tiny: ClassVar[dict[str, float]] = {"rank": 3, "lr": 2e-2}
    peft: ClassVar[PeftForm | None] = PeftWhole(
        "SHIRA",
        out=_out,
        back=_back,
        settings={"r": "rank"},
        fixed={"mask_type": "random"},
        ignored=("random_seed",),
    )

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        sites = super().places(anatomy)
        return check_entries(sites, [self.params_at(site) for site in sites], "shira.rank")

    def params_at(self, site: Site) -> int:
        return self.rank * (site.d_in + site.d_out)

    def n_stored(self, anatomy: Anatomy) -> int:
        return 2 * self.n_params(anatomy)

    def build(self, site: Site, base: Base) -> Attachment:
        places = torch.randperm(site.d_in * site.d_out)[: self.params_at(site)]
        return SparseUpdate(places.sort().values, site.d_in, site.d_out)
