"""Saliency: what is attached is cut down to its most useful entries, and what is left trains anew.

    I_j = sum over steps of |theta_j . dL/dtheta_j|        theta <- start * M,  M: the floor(share n) largest I

A run has two phases: everything that the method beside it attaches, then the kept entries alone, from where they
started. It stands beside another method, `mam+saliency`; alone it stands beside lora, and starts as that does.

Lawton et al. 2023, "Neural Architecture Search for Parameter-Efficient Fine-tuning of Large Pre-trained Language
Models", arXiv:2305.16597, the unstructured form. The number of rounds (one here), the length of the first phase and
what factors that start at zero are scored by could not be checked. Here scores are summed after some training, when no
factor is zero any more, so the start need not be another.

Count: at first that of the method beside it; then floor(share * that) entries move, the others are held at zero.
Claims: a pruned architecture does better than one that is as small from the start.
Use it when: a small file is wanted and it is not known which part of a method matters.
Not when: the run is short: the first phase only finds out what to keep; or a network makes the numbers, as a prefix's
does: switch it off (mlp_width=0), since entries of what it makes are what could be kept.
Pitfalls: a signed sum cancels between steps; momentum would move pruned entries on; `pruned` is the same idea for
tensors of the model itself, by another score.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from luthier.core import between
from luthier.methods.parts.masks import top_k
from luthier.methods.parts.modifier import Modifier, check_open, check_worth, search_and_train
from luthier.methods.parts.own_tensors import attached, own_tunings
from luthier.surgery import METHODS, Method, Phase, TunedView


@METHODS.register("saliency", family="hybrid", paper="arXiv:2305.16597")
@dataclass(frozen=True, kw_only=True)
class Saliency(Modifier):
    """Settings of pruning by saliency."""

    share: Annotated[float, "share of the attached numbers that is kept", between(0, 1)] = 0.25
    search: Annotated[float, "share of the run before pruning", between(0, 1)] = 0.3
    warm: Annotated[float, "share of that in which nothing is scored yet", between(0, 0.99)] = 0.5

    mergeable: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("lora",)
    tiny: ClassVar[dict[str, float]] = {"share": 0.5}

    def __post_init__(self) -> None:
        check_open(self, "share", "search")

    def phases(self, tuned: TunedView) -> Sequence[Phase]:
        return search_and_train(self.search)

    @torch.no_grad()
    def enter(self, tuned: TunedView, phase: int) -> None:
        for tuning in own_tunings(self, tuned):
            named = attached(tuning)
            if phase == 0:
                tuning.notes = {f"start.{n}": p.detach().clone() for n, p in named.items()}
                tuning.notes |= {f"worth.{n}": torch.zeros_like(p) for n, p in named.items()}
                continue
            kept = dict(zip(named, self.kept([tuning.notes[f"worth.{n}"] for n in named]), strict=True))
            for name, parameter in named.items():
                parameter.copy_(tuning.notes[f"start.{name}"] * kept[name])
            tuning.masks, tuning.notes = tuning.masks | kept, {}

    @torch.no_grad()
    def after_backward(self, tuned: TunedView, step: int, total: int) -> None:
        for tuning in own_tunings(self, tuned) if step > self.warm * self.search * total else ():
            for name, parameter in attached(tuning).items():
                worth = tuning.notes.get(f"worth.{name}")
                if worth is not None and parameter.grad is not None:
                    worth += (parameter * parameter.grad).abs()

    def kept(self, worth: list[Tensor]) -> list[Tensor]:
        """The masks of the largest scores, exactly as many as the share says."""
        n = math.floor(self.share * sum(w.numel() for w in worth))
        check_worth(self, worth, n)
        return top_k(worth, n)

    def conflicts(self, other: Method) -> str | None:
        if getattr(other, "mlp_width", 0):
            return f"a network makes its prefix in training, and would be pruned instead. Set {other.name}.mlp_width=0."
        if other.is_a("p_tuning", "hiwi"):
            return f"a network makes the numbers of {other.name}, and would be pruned instead. Use one of them."
        if other.is_a("sparse_adapter", "adamix", "propetl", "adalora", "increlora"):
            return f"{other.name} chooses entries itself. Use one of them."
        return None
