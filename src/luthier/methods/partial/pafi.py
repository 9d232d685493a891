"""PaFi: only the entries whose pretrained value is smallest may move; one mask for all tasks.

    theta = theta_0 + M * delta      M: the `share` of the entries with the smallest |theta_0|, fixed before training

Nothing changes before the first step. No data is looked at, so the entries follow from the base model alone and a
saved tuning holds values without places: for each tensor one number tells whether the places are those that were meant.

Liao, Meng, Monz 2023, "Parameter-Efficient Fine-Tuning without Introducing New Latency", arXiv:2305.16742, section 3.
Whether entries are ranked in each tensor or over the model, and whether norms and biases are ranked too, could not be
checked; the default ranks the weights of the blocks, each by itself. Values are compared as bf16 holds them, so that a
base has the same entries in bf16 and in fp32.

Count: sum over the ranked tensors of floor(share * numbers); with scope=model and over=all, floor(share * all below the
head).
Claims: one set of places for every task, without a pass over data.
Cost: gradients and moments are those of full fine-tuning; the saved file is small.
Use it when: many tasks share one base and files must be small.
Not when: memory is short while training.
Pitfalls: the largest instead of the smallest; a padding row is exactly zero and would take the whole budget, so rows of
an embedding that are all zero are ranked last.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from luthier.anatomy import Anatomy
from luthier.core import between
from luthier.methods.parts.in_place import MovesEntries
from luthier.methods.parts.own_tensors import own_unfrozen
from luthier.methods.parts.update_masks import Over, Scope, choose_masks, kept, maskable, sizes_of
from luthier.surgery import METHODS, TunedView


@METHODS.register("pafi", family="partial", paper="arXiv:2305.16742")
@dataclass(frozen=True, kw_only=True)
class PaFi(MovesEntries):
    """Settings of PaFi."""

    share: Annotated[float, "share of the entries that may move", between(0, 1)] = 0.005
    scope: Annotated[Scope, "smallest of each tensor, or of the whole model"] = "tensor"
    over: Annotated[Over, "which tensors: all below the head, those of the blocks, or the blocks' weights"] = "matrices"

    default_lr: ClassVar[float] = 1e-2
    tiny: ClassVar[Mapping[str, Any]] = {"share": 0.1}

    def tensors(self, anatomy: Anatomy) -> tuple[str, ...]:
        self.n_params(anatomy)  # refuses a share that keeps nothing, or all
        return maskable(anatomy, self.over)

    def n_params(self, anatomy: Anatomy) -> int:
        return kept(sizes_of(anatomy, maskable(anatomy, self.over)), self.share, self.scope, self.name)

    def n_stored(self, anatomy: Anatomy) -> int:
        """New values, and a number for each tensor."""
        return self.n_params(anatomy) + len(maskable(anatomy, self.over))

    def begin(self, tuned: TunedView) -> None:
        fresh = [u for u in own_unfrozen(self, tuned) if u.mask is None]
        embeds = {f"{s.path}.{s.param}" for s in tuned.anatomy.all_sites if s.kind == "embed"}
        choose_masks(fresh, [_smallness(u.original, u.name in embeds) for u in fresh], self.share, self.scope)
        for unfrozen in fresh:
            unfrozen.derived = True


def _smallness(value: Tensor, embedding: bool) -> Tensor:
    """The smaller a number, the larger its score; padding rows of an embedding last."""
    score = -value.to(torch.bfloat16).float().abs()
    if embedding:
        score[~score.any(dim=1)] = -torch.inf
    return score
