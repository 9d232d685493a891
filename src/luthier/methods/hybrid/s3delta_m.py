"""S3Delta-M: which of many small components a budget is best spent on, found while they train, then trained anew.

    p_i = σ((α_i - b) / β), with the b for which Σ n_i p_i is the budget        n_i: numbers of place i

    z_i = σ(log(u p_i / ((1 - u)(1 - p_i))))        u: drawn for each place and step; a place's output times z_i

Places are LoRA of rank one and biases at the projections, scales and shifts of the norms, adapters of rank one behind
the sublayers. In the first part of the run the weights learn from one half of the rows (the half follows from a row's
text), α from the other, through one step of the weights (`second_order`). Then places are taken by p, each that still
fits, and start again where they started. With `plan` there is no search: the named places train from the beginning.

Hu, Zhang, Ding et al. 2022, "Sparse Structure Search for Parameter-Efficient Tuning", arXiv:2206.07382.

Count: in the search all places, and one number each; then at most `share` of the base's numbers.
Claims: the authors report results near full fine-tuning of T5-large with 1.39 of ten thousand numbers.
Measured: `luthier train sample:minilm-l6 --data sample:trec6 --method s3delta_m --steps 120 --set second_order=false`:
accuracy 0.779 on 1,076 held-out rows, one seed, where head_only reaches 0.572; at a rate of 2e-3 0.295 after 240 steps.
Cost: of the search, four passes a step, two without `second_order`; then less than LoRA's.
Use it when: a tuning must be very small and it is not known where its few numbers belong.
Not when: the run is short: half of it only finds out what to train.
Pitfalls: the budget is a share of the base's numbers, not a per cent; weights of the search are not the result. Whether
a plan that holds no adapter could be folded into the weights is not used: it is served attached.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy
from luthier.core import ConfigError, above, at_least, between
from luthier.methods.parts.by_halves import searched_loss
from luthier.methods.parts.own_tensors import own_modules
from luthier.methods.parts.searched import (
    Components,
    Gates,
    Place,
    PlaceSearch,
    fitting,
    open_places,
    place_edits,
    select,
)
from luthier.surgery import METHODS, Edit, TunedView


@METHODS.register("s3delta_m", family="hybrid", paper="arXiv:2206.07382")
@dataclass(frozen=True, kw_only=True)
class S3DeltaM(PlaceSearch):
    """Settings of sparse structure search."""

    share: Annotated[float, "budget, as a share of the numbers below the head", between(0, 1)] = 1.39e-4
    search: Annotated[float, "share of the run that searches", between(0.01, 0.99)] = 0.5
    beta: Annotated[float, "β, how soft gates are", above(0)] = 1.0
    gate_rate: Annotated[float, "times the learning rate at which α learns", above(0)] = 10.0
    second_order: Annotated[bool, "α learns through one step of the weights, by finite differences"] = True
    rank: Annotated[int, "of a LoRA", at_least(1)] = 1
    plan: Annotated[tuple[str, ...], "places that train, such as lora:attn.q@0, without a search"] = ()

    mergeable: ClassVar[bool] = False
    default_lr: ClassVar[float] = 1e-2
    draws: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = True
    tiny: ClassVar[dict[str, Any]] = {"share": 0.03, "lr": 2e-2}

    def places(self, anatomy: Anatomy) -> tuple[Place, ...]:
        """What may stand on the model, or what `plan` names."""
        found = open_places(anatomy, self.rank, "s3delta_m")
        return fitting(found, self.plan, "s3delta_m") if self.plan else found

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        places = self.places(anatomy)
        if self.plan:
            yield from place_edits(places, None)
            return
        sizes, budget = [p.size for p in places], self.budget(anatomy)
        if not min(sizes) <= budget < sum(sizes):
            few = budget < min(sizes)
            raise ConfigError(
                f"s3delta_m.share: {self.share:g} is {budget} numbers, and "
                f"{f'the smallest place holds {min(sizes)}' if few else f'all places together hold {sum(sizes)}'}. "
                f"Set a {'larger' if few else 'smaller'} share."
            )
        yield from place_edits(places, Logits(sizes, budget, self.beta))

    def n_params(self, anatomy: Anatomy) -> int:
        places = self.places(anatomy)
        return sum(p.size for p in places) + (0 if self.plan else len(places))

    def before_step(self, tuned: TunedView, step: int, total: int) -> None:
        for gates in own_modules(self, tuned, Logits):
            if not gates.done:
                gates.halves = set()
                gates.draw()

    def loss(self, tuned: TunedView, forward: Callable[[], Any]) -> Any:
        found = own_modules(self, tuned, Logits)
        if not found or found[0].done or not found[0].training:
            return forward()
        gates, modules = found[0], own_modules(self, tuned, Components)
        weights = [p for m in modules for p in m.parameters() if p.requires_grad]
        return searched_loss(gates, modules[0], weights, forward, tuned, self.second_order, self.default_lr)

    def plan_of(self, tuned: TunedView) -> tuple[str, ...]:
        """The places that a search has chosen, as `plan` takes them."""
        (gates,) = own_modules(self, tuned, Logits)
        names = [place.name for place in self.places(tuned.anatomy)]
        return tuple(name for name, kept in zip(names, gates.fixed.tolist(), strict=True) if kept > 0)


class Logits(Gates):
    """α of all places, and the shift that holds the budget.

    alpha: (places,)        u: (places,), of the step
    """

    u: Tensor
    sizes: Tensor

    def __init__(self, sizes: Sequence[int], budget: int, beta: float) -> None:
        super().__init__(len(sizes))
        self.budget, self.beta, self.lets_learn = budget, beta, True
        self.alpha = nn.Parameter(torch.zeros(len(sizes)))
        self.register_buffer("sizes", torch.tensor(sizes, dtype=torch.float64), persistent=False)
        self.register_buffer("u", torch.rand(len(sizes)).clamp(1e-6, 1 - 1e-6), persistent=False)

    def draw(self) -> None:
        """Other u, for the passes of a step."""
        self.u.copy_(torch.rand(self.u.shape).clamp(1e-6, 1 - 1e-6))

    def shift(self) -> Tensor:
        """b, by bisection. () in double precision."""
        alpha = self.alpha.detach().double()
        low, high = alpha.min() - 60 * self.beta, alpha.max() + 60 * self.beta
        for _ in range(100):
            middle = (low + high) / 2
            over = (self.sizes * torch.sigmoid((alpha - middle) / self.beta)).sum() > self.budget
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        return (low + high) / 2

    def chances(self) -> Tensor:
        """p of each place, whose sum has no gradient: α moves chance from one place to another. (places,)."""
        alpha = self.alpha if self.lets_learn else self.alpha.detach()
        p = torch.sigmoid((alpha.double() - self.shift()) / self.beta)
        return p / p.sum() * p.sum().detach()

    def z(self) -> Tensor:
        if self.done:
            return self.fixed
        p = self.chances().clamp(1e-6, 1 - 1e-6)
        if not self.training:
            return p.float()
        u = self.u.double()
        return torch.sigmoid(torch.log(u * p / ((1 - u) * (1 - p)))).float()

    @torch.no_grad()
    def choose(self, budget: int) -> None:
        chosen = select(self.chances().tolist(), [int(n) for n in self.sizes.tolist()], budget)
        self.fixed.zero_()
        self.fixed[chosen] = 1.0
