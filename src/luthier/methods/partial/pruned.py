"""Pruned: what trains of the model itself is cut down, by what each change is worth, and what is left trains anew.

    b = b_0 + v * delta      v in {0, 1}: kept where sum_t -delta . dL/ddelta is largest, over the last steps of phase 1

A run has two phases: everything that the method beside it trains, then the kept part alone, from b_0 again. It stands
beside another method, `bitfit+pruned`; alone it stands beside bitfit, and starts as that does.

Lawton et al. 2023, "Neural Architecture Search for Parameter-Efficient Fine-tuning of Large Pre-trained Language
Models", arXiv:2305.16597. The number of rounds (one here), the budget, the length of the first phase and where values
start again could not be checked: they are ours. What is pruned are tensors of the model that train in place; the
paper's pruning of adapters and prefixes is not offered.

Count: at first that of the method beside it; floor(share * that) entries are kept, or whole vectors up to as many.
Claims: small parts of BitFit do about as well as all of it.
Use it when: the smallest file is wanted.
Not when: the run is short: the first phase only finds out what to keep.
Pitfalls: at the start every score is zero, so nothing can be ranked before it has trained; taking sizes before summing
is another score: two changes of opposite worth cancel in a vector; long vectors are favoured unless `normalise` is set.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from luthier.anatomy import Anatomy
from luthier.core import CompositionError, between
from luthier.methods.parts.masks import top_k
from luthier.methods.parts.modifier import Modifier, check_open, check_worth, search_and_train
from luthier.methods.parts.own_tensors import own_tunings
from luthier.surgery import METHODS, Method, Phase, TunedView, Unfreeze
from luthier.surgery.unfrozen import Unfrozen


@METHODS.register("pruned", family="partial", paper="arXiv:2305.16597")
@dataclass(frozen=True, kw_only=True)
class Pruned(Modifier):
    """Settings of pruning."""

    share: Annotated[float, "share of the entries that is kept", between(0, 1)] = 0.1
    unit: Annotated[Literal["entry", "vector"], "what is kept or dropped: entries, or whole tensors"] = "entry"
    search: Annotated[float, "share of the run before pruning", between(0, 1)] = 0.3
    warm: Annotated[float, "share of that in which nothing is scored yet", between(0, 0.99)] = 0.5
    normalise: Annotated[bool, "vectors are ranked by their mean worth, not their sum"] = False

    mergeable: ClassVar[bool] = True
    default_lr: ClassVar[float] = 4e-3
    needs: ClassVar[tuple[str, ...]] = ("bitfit",)
    tiny: ClassVar[dict[str, float]] = {"share": 0.5}

    def __post_init__(self) -> None:
        check_open(self, "share", "search")

    def n_removed(self, others: Sequence[Method], anatomy: Anatomy) -> int:
        if not any(isinstance(edit, Unfreeze) for other in others for edit in other.edits(anatomy)):
            raise CompositionError(
                f"pruned: {' and '.join(o.name for o in others)} train no tensor of the model in place. "
                "Put it beside bitfit or layernorm_tuning; sparse_adapter prunes what is attached."
            )
        return 0

    def phases(self, tuned: TunedView) -> Sequence[Phase]:
        return search_and_train(self.search)

    def enter(self, tuned: TunedView, phase: int) -> None:
        mine = self._mine(tuned)
        if phase == 0:
            for unfrozen in mine:
                unfrozen.notes = {"worth": torch.zeros_like(unfrozen.value)}
            return
        masks = self._masks([u.notes["worth"] for u in mine], [u.mask for u in mine])
        with torch.no_grad():
            for unfrozen, mask in zip(mine, masks, strict=True):
                unfrozen.mask, unfrozen.notes = mask, {}
                unfrozen.value.copy_(unfrozen.original)

    def after_backward(self, tuned: TunedView, step: int, total: int) -> None:
        if step > self.warm * self.search * total:
            for unfrozen in self._mine(tuned):
                grad = unfrozen.parameter.grad
                if grad is not None and "worth" in unfrozen.notes:
                    unfrozen.notes["worth"] -= (unfrozen.value - unfrozen.original) * grad

    def conflicts(self, other: Method) -> str | None:
        if other.is_a("full", "child_tuning_d", "fish_mask", "lt_sft", "magnitude_mask", "pafi", "sam_sparse"):
            return f"{other.name} says itself what of the model trains. Use pruned beside bitfit."
        return None

    def _mine(self, tuned: TunedView) -> list[Unfrozen]:
        """The model's own tensors that the methods beside it train, heads left out."""
        return [u for t in own_tunings(self, tuned) for k, u in t.unfrozen.items() if not k.startswith("head/")]

    def _masks(self, worth: list[Tensor], before: Sequence[Tensor | None]) -> list[Tensor]:
        """What is kept, of what could move before."""
        sizes = [w.numel() if m is None else int(m.sum()) for w, m in zip(worth, before, strict=True)]
        budget = math.floor(self.share * sum(sizes))
        check_worth(self, worth, budget)
        if self.unit == "entry":
            open_ = [w if m is None else w.masked_fill(~m, -torch.inf) for w, m in zip(worth, before, strict=True)]
            return top_k(open_, budget)
        ranked = [float(w.sum()) / (n if self.normalise else 1) for w, n in zip(worth, sizes, strict=True)]
        kept: set[int] = set()
        for i in sorted(range(len(sizes)), key=lambda i: -ranked[i]):
            if sizes[i] <= budget:  # one that does not fit is passed over, a smaller one may
                kept.add(i)
                budget -= sizes[i]
        return [
            (torch.ones_like(w, dtype=torch.bool) if m is None else m)
            if i in kept
            else torch.zeros_like(w, dtype=torch.bool)
            for i, (w, m) in enumerate(zip(worth, before, strict=True))
        ]
