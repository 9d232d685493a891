"""Child-Tuning, task-driven: before training, find the entries that matter to the task; only those move.

    g <- g * M      M: the `share` of the blocks' entries with the largest Fisher information, mean g^2 over the data

Nothing changes before the first step. What lies outside the blocks (embeddings, pooler, head) trains whole.

Xu et al. 2021, "Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning",
arXiv:2109.05687, section 3.3. As in the authors' code the scores are taken in training mode, per mini-batch, with each
tensor's gradient clipped to norm 1, and there is no rescaling. A mini-batch is a whole optimiser step of the first
epoch, however memory cuts it into pieces; all of them are looked at, or the first `data` of them. Two differences: the
mask has exactly its number of entries, ties going to the earlier one; and it also holds for weight decay, which in the
authors' code moves the entries outside it (`masked_decay=False`).

Count: floor(share * numbers in the blocks) + all numbers outside the blocks.
Claims: a regulariser, better and steadier than full fine-tuning on small data; memory is not saved, nor much storage.
Cost: one pass over the data, forward and backward, before the first step; then a step of full fine-tuning, and a mask
over every gradient and every new value.
Use it when: a large encoder overfits few rows, and the result may be as large as the model.
Not when: memory is short: gradients and moments are those of full fine-tuning.
Pitfalls: a mask on the gradient alone lets momentum and decay through; masking after clipping; scoring with gradients
of another mode or another subset gives another mask; dropout draws anew where memory cuts a step otherwise, so with it
the few entries at the edge may differ.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from luthier.anatomy import Anatomy
from luthier.core import above, between
from luthier.methods.parts.in_place import ScoredEntries
from luthier.methods.parts.masks import first_share, no_trace
from luthier.methods.parts.update_masks import add_squares, choose_masks, kept, maskable, sizes_of
from luthier.surgery import METHODS, Batches, Edit, TunedView, Unfreeze, gradients
from luthier.surgery.unfrozen import Unfrozen


@METHODS.register("child_tuning_d", family="partial", paper="arXiv:2109.05687")
@dataclass(frozen=True, kw_only=True)
class ChildTuningD(ScoredEntries):
    """Settings of task-driven child tuning."""

    share: Annotated[float, "share of the blocks' entries that move", between(0, 1)] = 0.3
    masked_decay: Annotated[bool, "decay, too, moves only the entries of the mask"] = True
    data: Annotated[float, "share of the first epoch that is looked at", between(0.001, 1)] = 1.0
    clip: Annotated[float, "largest gradient norm of one tensor while scoring", above(0)] = 1.0

    default_lr: ClassVar[float] = 4e-5

    def tensors(self, anatomy: Anatomy) -> tuple[str, ...]:
        return maskable(anatomy, "all")

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        self.n_params(anatomy)  # refuses a share that keeps nothing, or all
        yield from (Unfreeze(n, holds=self.masked_decay) for n in self.tensors(anatomy))

    def n_params(self, anatomy: Anatomy) -> int:
        return self._held(anatomy, 1)

    def n_stored(self, anatomy: Anatomy) -> int:
        """New values and, for the masked tensors, their places; everything where decay moves everything."""
        return self._held(anatomy, 2) if self.masked_decay else super().n_params(anatomy)

    def _held(self, anatomy: Anatomy, each: int) -> int:
        """All numbers outside of the blocks, and so many for each entry of the mask."""
        inside = sizes_of(anatomy, maskable(anatomy, "blocks"))
        return super().n_params(anatomy) - sum(inside) + each * kept(inside, self.share, "model", self.name)

    def prepare(self, tuned: TunedView, batches: Batches) -> None:
        child = self.masked(tuned)
        scores = fisher(tuned, [u.parameter for u in child], first_share(batches, self.data), self.clip)
        choose_masks(child, scores, self.share, "model")

    def masked(self, tuned: TunedView) -> list[Unfrozen]:
        """The tensors of the blocks, in the order of the model."""
        inside = set(maskable(tuned.anatomy, "blocks"))
        return [u for u in super().masked(tuned) if u.name in inside]


def fisher(tuned: TunedView, parameters: list[torch.nn.Parameter], batches: Batches, clip: float) -> list[Tensor]:
    """Mean over the batches of each squared gradient, in training mode; each tensor's gradient clipped to `clip`."""
    scores = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    with no_trace(tuned, training=True):
        for batch in batches:
            add_squares(scores, gradients(batch, parameters), 1 / len(batches), clip=clip)
    ChildTuningD.check_scores(scores, len(batches))
    return scores
