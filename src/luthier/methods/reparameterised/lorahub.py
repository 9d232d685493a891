"""LoRAHub: LoRAs of other tasks become one for a new task, by N weights that are searched for, not learnt.

    A = sum w_n A_n      B = sum w_n B_n      y = x W^T + b + s x A^T B^T

    w = argmin   loss of few rows + penalty * mean |w_n|      |w_n| <= bound      at most `trials` values of w are tried

The sources are tunings of lora on the same base, alike in rank, sites and scale, named with --source. w starts at zero,
where the tuned model is the base model, so the search gives nothing that is worse than the base on its rows. Nothing
has a gradient, and nothing trains afterwards but a new head; with train=true the sum is where a LoRA's training starts.

Huang et al. 2023, "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition", arXiv:2307.13269,
section 3. The authors search with an evolution strategy of a library. Here each weight in turn, in a drawn order, goes
up or down by a step of one; the step is halved when no weight wants to move. At w = 0 only upwards is tried: -w gives
the same product. Their code sums means of batches over the number of rows; here steps count alike, each by its mean.

Count: none; with train=true one LoRA, sum over sites of rank * (d_in + d_out). One LoRA is stored.
Claims: with few rows close to in-context learning, at the cost of a plain prompt.
Cost: `trials` passes, without a backward one, over `steps` steps; all sources are in memory until then.
Use it when: LoRAs of tasks like yours are there and your task has a handful of rows.
Not when: there are rows to train with: a LoRA of its own learns more. A new head must learn first: its losses say
nothing about w.
Pitfalls: a head that trains alone wants a large rate, head_only's, which it has here: at a LoRA's 2e-3 it gave 0.29 on
600 questions of trec6. With two sources of other tasks it does not beat `head_only` there but equals it (0.417, and a
loss of 1.4551 for 1.4549: `python -m experiments.methods --only lorahub --seeds 1 --results FILE`): searched with a
head that has not learnt, the model stays nearly the base. With train=true name optim.head_lr, should the head run ahead
of the sum. The sum of B_n A_n is another method: here terms B_m A_n of unlike sources appear. A language model has no
head to train: attach(model, "lorahub", sources=[...]), prepare(tuned, batches) and save(folder) make it without a run.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from luthier.anatomy import Anatomy, Site
from luthier.core import ConfigError, above, at_least
from luthier.methods.parts.adopted import agreed, no_sources, own_sites
from luthier.methods.parts.low_rank import ThinUpdate, check_projections
from luthier.methods.parts.masks import no_trace
from luthier.methods.parts.own_tensors import own_modules
from luthier.surgery import METHODS, Attachment, Base, Batches, PerSite, Source, TunedView

FINEST = 1 / 64
"""A step of the search below this is not tried."""


@METHODS.register("lorahub", family="reparameterised", paper="arXiv:2307.13269")
@dataclass(frozen=True, kw_only=True)
class LoRAHub(PerSite):
    """Settings of LoRAHub. The first four are the sources' own."""

    rank: Annotated[int | None, "of the LoRAs; left out, the sources'", at_least(1)] = None
    alpha: Annotated[float | None, "of the LoRAs; left out, the sources'", above(0)] = None
    scaling: Annotated[Literal["rank", "root"] | None, "of the LoRAs; left out, the sources'"] = None
    sites: Annotated[tuple[str, ...], "where to attach; none: where the sources are"] = ()
    trials: Annotated[int, "values of w that are tried, at most", at_least(1)] = 40
    steps: Annotated[int, "steps of the first epoch that each trial sees, at most", at_least(1)] = 4
    bound: Annotated[float, "largest size of a weight", above(0)] = 1.5
    penalty: Annotated[float, "times the mean size of the weights is added to the loss", at_least(0)] = 0.05
    train: Annotated[bool, "let the sum train on"] = False

    mergeable: ClassVar[bool] = True
    default_lr: ClassVar[float] = 2e-3
    default_head_lr: ClassVar[float | None] = 3e-2
    looks_at_data: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("lora",)
    tiny: ClassVar[dict[str, Any]] = {"rank": 3, "alpha": 6.0, "train": True}

    def fitted(self, sources: Sequence[Source]) -> Self:
        for source in sources:
            if source.settings.get("start", "zero") != "zero" or not isinstance(source.settings.get("rank"), int):
                raise ConfigError(
                    f"lorahub: {source.folder} is a LoRA with a start of its own, or with other ranks at some places. "
                    "Their factors cannot be summed. Train it with start=zero and one rank."
                )
        names = ("rank", "alpha", "scaling", "sites")
        made = replace(self, **{name: agreed(self, sources, name) for name in names})
        return self if made == self else made  # fitted twice it is one method, which finds its own modules

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        places = anatomy.sites(*(self.sites or ("attn.q", "attn.v")), asked_by="lorahub.sites", fits=self.fits)
        return check_projections(anatomy, places, "lorahub", 0.0)

    def params_at(self, site: Site) -> int:
        return (self.rank or 8) * (site.d_in + site.d_out)

    def n_params(self, anatomy: Anatomy) -> int:
        return self.n_stored(anatomy) * self.train

    def n_stored(self, anatomy: Anatomy) -> int:
        return sum(self.params_at(site) for site in self.places(anatomy))

    def build(self, site: Site, base: Base) -> Attachment:
        if self.rank is None:
            raise no_sources(self, "LoRAs to sum")
        scale = (self.alpha or 16.0) / (math.sqrt(self.rank) if self.scaling == "root" else self.rank)
        return SummedUpdate(site.d_in, site.d_out, self.rank, scale).requires_grad_(self.train)

    def adopt(self, tuned: TunedView, sources: Sequence[Source]) -> None:
        for key, module in own_sites(self, tuned, SummedUpdate):
            parts = [source.part(key) for source in sources]
            module.hold(torch.stack([p["a"] for p in parts]), torch.stack([p["b"] for p in parts]))

    @torch.no_grad()
    def prepare(self, tuned: TunedView, batches: Batches) -> None:
        modules = [m for m in own_modules(self, tuned, SummedUpdate) if m.each_a is not None]
        if not modules:  # no sources: its numbers were drawn
            return
        looked = batches[: self.steps]
        if len(looked) == 0:
            raise ConfigError("lorahub: no row to search with. Give prepare() at least one batch.")

        def cost(w: Tensor) -> float:
            for module in modules:
                module.weigh(w)
            loss = sum(float(batch()) for batch in looked) / len(looked)
            return loss + self.penalty * float(w.abs().mean())

        with no_trace(tuned, training=False):
            w = compass(cost, modules[0].n_sources(), self.bound, self.trials)
        for module in modules:
            module.weigh(w)
            module.searched.fill_(value=True)
            module.let_go()

    def after_backward(self, tuned: TunedView, step: int, total: int) -> None:
        for module in own_modules(self, tuned, SummedUpdate):
            if module.each_a is not None and not bool(module.searched):
                raise ConfigError(
                    "lorahub: its weights were never searched. Call prepare(tuned, batches) before training."
                )
            module.let_go()  # a resumed run has read its sources again


def compass(cost: Callable[[Tensor], float], n: int, bound: float, trials: int) -> Tensor:
    """The best of at most `trials` points of the box |w| <= bound, from w = 0 along one axis at a time. (n,)

    Args:
        cost: what is to be small; a point where it is no number is never taken.
    """
    best, least, spent, step = torch.zeros(n), cost(torch.zeros(n)), 1, min(1.0, bound)
    while step >= FINEST and spent < trials:
        moved = False
        for axis in torch.randperm(n).tolist():
            for way in (1, -1) if bool(best.any()) else (1,):
                point = best.clone()
                point[axis] = (point[axis] + way * step).clamp(-bound, bound)
                if spent == trials or torch.equal(point, best):
                    continue
                found, spent = cost(point), spent + 1
                if found < least or math.isnan(least):
                    best, least, moved = point, found, True
                    break
        step = step if moved else step / 2
    return best


class SummedUpdate(ThinUpdate):
    """Adds `scale * B A x`; until w is found, the factors it is summed from lie beside it.

    each_a: (N, rank, d_in)    each_b: (N, d_out, rank)    None where there are none, or none any more.
    searched: () bool, for a run that is resumed.
    """

    each_a: Tensor | None
    each_b: Tensor | None
    searched: Tensor

    def __init__(self, d_in: int, d_out: int, rank: int, scale: float) -> None:
        super().__init__(d_in, d_out, rank, scale)
        self.register_buffer("searched", torch.zeros((), dtype=torch.bool))
        self.let_go()

    def hold(self, a: Tensor, b: Tensor) -> None:
        """Keep what is summed, and start at w = 0: A as it was drawn and B of zeros, from where it can learn too."""
        self.register_buffer("each_a", a.to(self.a), persistent=False)
        self.register_buffer("each_b", b.to(self.b), persistent=False)

    def let_go(self) -> None:
        """Keep them no longer."""
        for name in ("each_a", "each_b"):
            self.register_buffer(name, None, persistent=False)

    def n_sources(self) -> int:
        """How many are summed."""
        return 0 if self.each_a is None else len(self.each_a)

    def weigh(self, w: Tensor) -> None:
        """A and B become the sums with the weights w: (N,)."""
        if self.each_a is None or self.each_b is None:
            return
        if not bool(w.any()):  # a product of two zeros could never learn
            self.b.zero_()
            return
        self.a.copy_(torch.tensordot(w.to(self.a), self.each_a, 1))  # (N,) x (N, rank, d_in)
        self.b.copy_(torch.tensordot(w.to(self.b), self.each_b, 1))  # (N,) x (N, d_out, rank)

    def stored(self) -> dict[str, Tensor]:
        return {"a": self.a.detach(), "b": self.b.detach()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.load_state_dict({**tensors, "searched": self.searched}, strict=True)
