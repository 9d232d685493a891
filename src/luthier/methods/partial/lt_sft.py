"""Lottery-ticket sparse fine-tuning: train everything, keep the entries that moved most, go back, train those alone.

    theta_1 = full training of theta_0      M: the `share` with the largest |theta_1 - theta_0|
    theta_2 = training of theta_0 where M is true      phi = theta_2 - theta_0, sparse

Both phases start from theta_0, the head too; each has empty moments and a schedule of its own. With several `rounds`
each adds its part of the entries and goes back to where it began, not to theta_0.

Ansell, Ponti, Korhonen, Vulic 2022, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", arXiv:2110.07560,
section 3. As in the authors' scripts norms stay frozen, and 1 % is their library's default. There both phases have one
rate, over many epochs. Here the sparse one has `sparse_rate` times the run's, about that of other sparse masks: on 600
questions of trec6 one rate for both gave 0.51, a hundred times as much 0.90, and `head_only` 0.40.

Count: all numbers below the head, those of norms apart, in the first phase; floor(share * as many) in the second, which
are stored with their places.
Claims: sparse differences of a task and of a language can be added.
Cost: twice a run, with gradients and moments of full fine-tuning in both halves.
Use it when: differences are to be stored, or added up.
Not when: one result is wanted cheaply: half of the run is spent on finding the mask.
Pitfalls: going on from theta_1; ranking by |theta_1|; moments or a spent schedule of the first phase; a difference that
was computed on another base cannot be added.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from luthier.anatomy import Anatomy
from luthier.core import above, at_least, between
from luthier.methods.parts.in_place import MovesEntries
from luthier.methods.parts.masks import top_k
from luthier.methods.parts.own_tensors import own_head, own_unfrozen
from luthier.methods.parts.update_masks import kept, maskable, sizes_of
from luthier.surgery import METHODS, Phase, TunedView


@METHODS.register("lt_sft", family="partial", paper="arXiv:2110.07560")
@dataclass(frozen=True, kw_only=True)
class LTSFT(MovesEntries):
    """Settings of lottery-ticket sparse fine-tuning."""

    share: Annotated[float, "share of the entries that may move in the end", between(0, 1)] = 0.01
    rounds: Annotated[int, "how often entries are chosen and training goes back", at_least(1)] = 1
    norms: Annotated[bool, "norms train and are ranked too"] = False
    sparse_rate: Annotated[float, "learning rate of the sparse phases, as a multiple of the run's", above(0)] = 100.0
    l1: Annotated[float, "weight of mean |theta - theta_0|", at_least(0)] = 0.0

    tiny: ClassVar[Mapping[str, Any]] = {"share": 0.3}

    def n_stored(self, anatomy: Anatomy) -> int:
        """New values and their places."""
        return 2 * kept(sizes_of(anatomy, self.tensors(anatomy)), self.share, "model", self.name)

    def phases(self, tuned: TunedView) -> Sequence[Phase]:
        return [Phase(1.0), Phase(1.0, rate=self.sparse_rate)] * self.rounds

    @torch.no_grad()
    def enter(self, tuned: TunedView, phase: int) -> None:
        done, sparse = divmod(phase, 2)
        mine = own_unfrozen(self, tuned)
        if not sparse:
            for unfrozen in mine if done else ():
                assert unfrozen.mask is not None, "a round ends with a mask"
                unfrozen.notes = {"mask": unfrozen.mask, "start": unfrozen.value.clone()}
                unfrozen.mask = None
            return
        start = [u.notes.get("start", u.original) for u in mine]
        masks = self._masks([(u.value - s).abs() for u, s in zip(mine, start, strict=True)], mine, done + 1)
        for unfrozen, value, mask in zip(mine, start, masks, strict=True):
            unfrozen.value.copy_(value)
            unfrozen.mask, unfrozen.notes = mask, {}
        for unfrozen in own_head(self, tuned) if not done else ():
            unfrozen.value.copy_(unfrozen.original)

    def _masks(self, moved: list[Tensor], mine: Sequence[Any], rounds: int) -> list[Tensor]:
        """Those of the rounds before, and as many more as this round adds."""
        for distance, unfrozen in zip(moved, mine, strict=True):
            if "mask" in unfrozen.notes:
                distance[unfrozen.notes["mask"]] = torch.inf
        return top_k(moved, math.floor(self.share * sum(m.numel() for m in moved)) * rounds // self.rounds)

    def extra_loss(self, tuned: TunedView) -> Tensor | None:
        if self.l1 == 0:
            return None
        mine = [u for u in own_unfrozen(self, tuned) if u.parameter.requires_grad]
        apart = torch.stack([(u.parameter - u.original).abs().sum() for u in mine]).sum()
        return self.l1 * apart / sum(u.parameter.numel() for u in mine)

    def tensors(self, anatomy: Anatomy) -> list[str]:
        norms = () if self.norms else anatomy.norm_tensors()
        names = [n for n in maskable(anatomy, "all") if n not in norms]
        kept(sizes_of(anatomy, names), self.share, "model", self.name)  # refuses a share that keeps nothing, or all
        return names
