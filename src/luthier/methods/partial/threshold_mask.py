"""Masking: no weight changes; a score for every weight says which weights stay and which are zero.

    W~ = W_0 * 1[S >= tau]          S: shaped as W_0, trains; gradient straight through: dL/dS = dL/dW~ * W_0

Scores start uniform around tau, so that `sparsity` of the weights is left out at once: the tuned model does not start
as the base model, unless that share is 0.

Zhao et al. 2020, "Masking as an Efficient Alternative to Finetuning for Pretrained Language Models",
arXiv:2004.12406, section 3. There the pooler is masked too, and a new classifier, which trains here. How wide scores
start and how fast they learn could not be checked: those numbers are ours. A rate must be small against the width: of
1e-3, twenty steps carry a score across all of it and whatever is noise shuts weights off. A new head learns at 1e-3.

Measured: `python -m experiments.rates threshold_mask --seed 1`, 300 questions of trec6 that the table does not score:
0.92. At 1e-3 for all, the default before, the table's rows gave 0.60 and 0.41.

Count: one score for every weight of the chosen projections; 84,934,656 in BERT-base's blocks. Stored: a bit for each.
Claims: as good as full fine-tuning in the paper, with 1 bit a weight to store and to serve.
Cost: gradients and moments for every masked weight, and a weight computed anew in each pass.
Use it when: many tasks must be stored beside one base, a bit a weight.
Not when: training must be light: it is as heavy as full fine-tuning.
Pitfalls: masking gradients is another method; dividing what is left by its share, as dropout does; a gradient that
reaches W_0; decay, which pulls every score below tau.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, is_projection
from luthier.core import AnatomyError, ConfigError, above, between
from luthier.methods.parts.masks import pack, unpack
from luthier.methods.parts.own_tensors import group_names, own_modules
from luthier.surgery import METHODS, Edit, Group, Method, Reparametrise, TunedView


@METHODS.register("threshold_mask", family="partial", paper="arXiv:2004.12406")
@dataclass(frozen=True, kw_only=True)
class ThresholdMask(Method):
    """Settings of masking."""

    sites: Annotated[tuple[str, ...], "projections whose weights are masked, such as *@2-11"] = ("*",)
    pooler: Annotated[bool, "also the pooler's weight, where the model has one"] = True
    sparsity: Annotated[float, "share of the weights that is left out at the start", between(0, 1)] = 0.05
    threshold: Annotated[float, "scores below it leave their weight out"] = 0.01
    width: Annotated[float, "how far apart the scores start", above(0)] = 0.02

    mergeable: ClassVar[bool] = True
    starts_at_base: ClassVar[bool] = False
    computes_tensors: ClassVar[bool] = True
    default_lr: ClassVar[float] = 1e-4
    default_head_lr: ClassVar[float | None] = 1e-3
    trains_base: ClassVar[bool] = True
    stored_width: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.sparsity >= 1:
            raise ConfigError("threshold_mask.sparsity: 1 leaves no weight. Set it below 1; 0.03 to 0.1 is usual.")

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        for name in self._names(anatomy):
            scores = Masked(anatomy.tensors[name], self.threshold, self.width, self.sparsity)
            yield Reparametrise(name, scores)

    def n_params(self, anatomy: Anatomy) -> int:
        return sum(math.prod(anatomy.tensors[n]) for n in self._names(anatomy))

    def n_stored(self, anatomy: Anatomy) -> int:
        """Bytes of eight bits each."""
        return sum(math.ceil(math.prod(anatomy.tensors[n]) / 8) for n in self._names(anatomy))

    def groups(self, tuned: TunedView) -> list[Group]:
        scores = [m.scores for m in own_modules(self, tuned, Masked) if m.scores is not None]
        return [Group(group_names(tuned, scores), weight_decay=0.0)] if scores else []

    def finish(self, tuned: TunedView) -> None:
        for module in own_modules(self, tuned, Masked):
            module.restore(module.stored())

    def _names(self, anatomy: Anatomy) -> list[str]:
        sites = anatomy.sites(*self.sites, asked_by="threshold_mask.sites", fits=is_projection)
        for site in sites:
            if not is_projection(site):
                raise AnatomyError(f"threshold_mask.sites: {site.key} is no projection of a block. Leave it out.")
        chosen = {anatomy.tied.get(n, n) for n in (f"{s.path}.{s.param}" for s in sites)}
        keys = {s.key for s in sites}
        left = [
            s for s in anatomy.all_sites if s.key not in keys and is_projection(s) and f"{s.path}.{s.param}" in chosen
        ]
        if left:
            raise AnatomyError(
                f"threshold_mask.sites: {left[0].key} lies in one tensor with places that are named. "
                "Name all that one layer computes."
            )
        poolers = [n for n, shape in anatomy.tensors.items() if ".pooler." in f".{n}" and len(shape) == 2]
        return [n for n in anatomy.tensors if n in chosen or (self.pooler and n in poolers)]


class Masked(nn.Module):
    """Scores of one tensor's entries; after training the bits alone."""

    kept: Tensor

    def __init__(self, shape: tuple[int, ...], threshold: float, width: float, sparsity: float) -> None:
        super().__init__()
        self.shape, self.threshold = torch.Size(shape), threshold
        low = threshold - width * sparsity
        self.scores: nn.Parameter | None = nn.Parameter(torch.empty(shape).uniform_(low, low + width))
        self.register_buffer("bits", None)

    def forward(self, frozen: Tensor) -> Tensor:
        return frozen * self.mask().to(frozen.dtype) if self.scores is None else frozen * self.straight()

    def mask(self) -> Tensor:
        """True where a weight stays."""
        if self.scores is None:
            assert self.bits is not None
            return unpack(self.bits, self.shape)
        return self.scores >= self.threshold

    def straight(self) -> Tensor:
        """The mask as numbers, with the gradient of the scores. S - S is 0 exactly, which 1 + S - S is not."""
        assert self.scores is not None
        return self.mask().to(self.scores.dtype) + (self.scores - self.scores.detach())

    def stored(self) -> dict[str, Tensor]:
        """Eight weights to a byte."""
        return {"bits": pack(self.mask().detach())}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        if set(tensors) != {"bits"}:
            raise KeyError(f"a mask stores bits, the file has {', '.join(sorted(tensors))}")
        where = self.scores.device if self.scores is not None else None
        self.bits = tensors["bits"].to(where).clone()
        if len(self.bits) != math.ceil(self.shape.numel() / 8):
            raise KeyError(f"{len(self.bits)} bytes, expected {math.ceil(self.shape.numel() / 8)}")
        self.scores = None
