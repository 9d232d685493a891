"""Magnitude mask: only the entries whose pretrained value is largest may move; a control for scored masks.

    theta = theta_0 + M * delta      M: the `share` of the entries with the largest |theta_0|, fixed before training

Nothing changes before the first step. No data is looked at.

A baseline of the papers on sparse masks: Sung, Nair, Raffel 2021, "Training Neural Networks with Fixed Sparse Masks",
arXiv:2111.09839, compares its masks with such ones. No method of its own: it shows what a score by data is worth.

Count: floor(share * numbers below the head), of the model as a whole; with scope=tensor, of each tensor by itself.
Claims: none. A scored mask has to beat it at the same share.
Cost: gradients and moments are those of full fine-tuning; only the saved file is small.
Use it when: a mask chosen from data is to be judged.
Not when: the best result at this size is wanted: fish_mask looks at the data.
Pitfalls: over the whole model the scales of norms, all near 1, come first; a mask on the gradient alone lets decay and
momentum through, and here it holds for the update; with score=random the entries follow from the seed of the run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch

from luthier.anatomy import Anatomy
from luthier.core import between
from luthier.methods.parts.in_place import MovesEntries
from luthier.methods.parts.own_tensors import own_unfrozen
from luthier.methods.parts.update_masks import Over, Scope, choose_masks, kept, maskable, sizes_of
from luthier.surgery import METHODS, TunedView


@METHODS.register("magnitude_mask", family="partial", paper="arXiv:2111.09839")
@dataclass(frozen=True, kw_only=True)
class MagnitudeMask(MovesEntries):
    """Settings of masks that look at no data."""

    share: Annotated[float, "share of the entries that may move", between(0, 1)] = 0.005
    score: Annotated[Literal["magnitude", "random"], "what the entries are chosen by"] = "magnitude"
    scope: Annotated[Scope, "best of the whole model, or of each tensor"] = "model"
    over: Annotated[Over, "which tensors: all below the head, those of the blocks, or the blocks' weights"] = "all"

    default_lr: ClassVar[float] = 1e-2
    tiny: ClassVar[Mapping[str, Any]] = {"share": 0.3}

    def tensors(self, anatomy: Anatomy) -> tuple[str, ...]:
        self.n_params(anatomy)  # refuses a share that keeps nothing, or all
        return maskable(anatomy, self.over)

    def n_params(self, anatomy: Anatomy) -> int:
        return kept(sizes_of(anatomy, maskable(anatomy, self.over)), self.share, self.scope, self.name)

    def n_stored(self, anatomy: Anatomy) -> int:
        """New values and their places."""
        return 2 * self.n_params(anatomy)

    def begin(self, tuned: TunedView) -> None:
        fresh = [u for u in own_unfrozen(self, tuned) if u.mask is None]
        if self.score == "random":
            scores = [torch.rand(u.kept.shape).to(u.kept.device) for u in fresh]
        else:
            scores = [u.original.float().abs() for u in fresh]
        choose_masks(fresh, scores, self.share, self.scope)
