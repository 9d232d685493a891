"""Second-order approximation: before training, find the entries by which a quadratic model of the loss falls most.

    G = sum_t g_t      M: in each tensor the `share` of its entries with the largest |G|, or G^2 / h with a curvature h

The gradients are signed and summed while the model stays as it is. Nothing changes before the first step.

Fu et al. 2023, "On the Effectiveness of Parameter-Efficient Fine-Tuning", arXiv:2211.15583, which calls it SAM; it has
nothing to do with sharpness-aware minimisation, which the strategies know by that name. As in the authors' code the
scores are taken in training mode, the best of each tensor of the blocks are kept, and the curvature is taken as
constant; with curvature=fisher it is the mean of g^2. The authors' third choice, finite differences, is not offered.
They look at 500 batches or 600; here at most at one epoch.

Count: sum over the tensors of the blocks of floor(share * numbers).
Claims: with equal curvature everywhere, the largest gradients are the best mask there is for the quadratic model.
Cost: up to `steps` steps forward and backward before the first one moves anything; then a step of full fine-tuning.
Use it when: a sparse difference is to be stored, and the task's gradients point one way.
Not when: memory is short: gradients and moments are those of the whole blocks.
Pitfalls: squaring before summing is another method (fish_mask); a tensor so small that floor(share * numbers) is 0, as
many biases are, gets nothing; moments of the search must not enter training.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from luthier.anatomy import Anatomy
from luthier.core import at_least, between
from luthier.methods.parts.in_place import ScoredEntries
from luthier.methods.parts.masks import no_trace
from luthier.methods.parts.own_tensors import own_unfrozen
from luthier.methods.parts.update_masks import add_squares, choose_masks, kept, maskable, sizes_of
from luthier.surgery import METHODS, Batches, TunedView, gradients


@METHODS.register("sam_sparse", family="partial", paper="arXiv:2211.15583")
@dataclass(frozen=True, kw_only=True)
class SAMSparse(ScoredEntries):
    """Settings of the second-order approximation."""

    share: Annotated[float, "share of each tensor's entries that may move", between(0, 1)] = 0.005
    steps: Annotated[int, "steps of the first epoch that are looked at, at most", at_least(1)] = 500
    curvature: Annotated[Literal["constant", "fisher"], "what the squared gradient is divided by"] = "constant"

    default_lr: ClassVar[float] = 5e-3
    tiny: ClassVar[Mapping[str, Any]] = {"share": 0.1}

    def tensors(self, anatomy: Anatomy) -> tuple[str, ...]:
        self.n_params(anatomy)  # refuses a share that keeps nothing, or all
        return maskable(anatomy, "blocks")

    def n_params(self, anatomy: Anatomy) -> int:
        return kept(sizes_of(anatomy, maskable(anatomy, "blocks")), self.share, "tensor", self.name)

    def prepare(self, tuned: TunedView, batches: Batches) -> None:
        looked = batches[: self.steps]
        mine = own_unfrozen(self, tuned)
        parameters = [u.parameter for u in mine]
        signed = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        squared = [torch.zeros_like(s) for s in signed] if self.curvature == "fisher" else None
        with no_trace(tuned, training=True):
            for batch in looked:
                grads = gradients(batch, parameters)
                for total, grad in zip(signed, grads, strict=True):
                    if grad is not None:
                        total += grad
                if squared is not None:
                    add_squares(squared, grads, 1 / len(looked))
        self.check_scores(signed, len(looked))
        for i, s in enumerate(signed):  # one at a time: together they would be a model of their own
            signed[i] = gain(s, None if squared is None else squared[i])
        choose_masks(mine, signed, self.share, "tensor")


def gain(gradient: Tensor, curvature: Tensor | None) -> Tensor:
    """How far a step along one entry alone lowers the quadratic model, to a constant factor: |g| or g^2 / h."""
    if curvature is None:
        return gradient.abs()
    # An entry that no gradient reached is 0 / 0 without it.
    return gradient.square() / (curvature + (curvature.mean() * 1e-6).clamp(min=1e-30))
