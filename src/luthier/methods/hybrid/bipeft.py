"""BIPEFT: which components stand, and of what rank, searched in turn, and pruned to a budget while they are searched.

    on or off:  z_i = hard one of softmax((log-odds + Gumbel) / τ)        rank: hard one of so many, of shared numbers

A LoRA of rank r is the first r ranks of the widest one, so that all ranks learn in one set of numbers. The search part
of the run is cut into `rounds` pairs: places first, then ranks. The weights learn from one half of the rows, the
choices from the other, to first order. Where the choices' gradients on both halves agree (their cosine reaches
`stable`), the places or ranks that the loss feels least, by |θ g| summed over their numbers, go, in at most `prunes`
cuts. What is left within the budget starts again where it started and trains alone. With `plan` there is no search.

Chang et al. 2024, "BIPEFT: Budget-Guided Iterative Search for Parameter Efficient Fine-Tuning of Large Pretrained
Language Models", arXiv:2410.09079.

Count: in the search all places at the widest rank, and the choices' numbers; then at most `share` of the base's.
Claims: the authors report better results than a search of places and ranks at once, in less time.
Cost: of the search, three passes a step; then less than LoRA's.
Use it when: a tuning must be very small, and neither its places nor its ranks are known.
Not when: the run is short; s3delta_m, where ranks do not matter.
Pitfalls: weights of the search are not the result. A search whose choices never agree is cut to the budget at its end.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy
from luthier.core import ConfigError, above, at_least, between
from luthier.methods.parts.by_halves import choice_gradient, searched_loss
from luthier.methods.parts.own_tensors import own_modules
from luthier.methods.parts.searched import (
    Components,
    Gates,
    Place,
    PlaceSearch,
    fitting,
    of_rank,
    open_places,
    place_edits,
    select,
)  # fmt: skip
from luthier.surgery import METHODS, Edit, TunedView

ALL_ON = 3
"""First steps that teach the weights, in which every place acts, so that each has had a gradient before one is shut."""


@METHODS.register("bipeft", family="hybrid", paper="arXiv:2410.09079")
@dataclass(frozen=True, kw_only=True)
class BIPEFT(PlaceSearch):
    """Settings of the iterative search."""

    share: Annotated[float, "budget, as a share of the numbers below the head", between(0, 1)] = 1.39e-4
    ranks: Annotated[tuple[int, ...], "of a LoRA, to choose from; one rank: no search of ranks", at_least(1)] = (
        1,
        2,
        4,
        8,
    )
    search: Annotated[float, "share of the run that searches", between(0.01, 0.99)] = 0.5
    rounds: Annotated[int, "how often places and ranks are searched in turn", at_least(1)] = 2
    prunes: Annotated[int, "cuts at most on the way to the budget", at_least(1)] = 100
    stable: Annotated[float, "cosine of the choices' gradients on both halves at which is cut", between(-1, 1)] = 0.85
    temperature: Annotated[float, "τ of the choices", above(0)] = 1.0
    gate_rate: Annotated[float, "times the learning rate at which choices learn", above(0)] = 1.0
    plan: Annotated[tuple[str, ...], "places that train, such as lora:attn.q@0=4, without a search"] = ()

    mergeable: ClassVar[bool] = False
    default_lr: ClassVar[float] = 1e-2
    draws: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = True
    tiny: ClassVar[dict[str, Any]] = {"share": 0.05, "ranks": (1, 2), "lr": 2e-2}

    def __post_init__(self) -> None:
        if not self.ranks or list(self.ranks) != sorted(set(self.ranks)):
            raise ConfigError(f"bipeft.ranks: got {list(self.ranks)}. Name each rank once, the smallest first.")

    def places(self, anatomy: Anatomy) -> tuple[Place, ...]:
        """What may stand on the model at its widest, or what `plan` names."""
        found = open_places(anatomy, self.ranks[-1], "bipeft")
        if not self.plan:
            return found
        pairs = dict(word.partition("=")[::2] for word in self.plan)
        wrong = [word for word, rank in pairs.items() if rank and (not rank.isdecimal() or int(rank) < 1)]
        if wrong:
            raise ConfigError(f"bipeft.plan: the rank of {wrong[0]!r} is {pairs[wrong[0]]!r}. Write lora:attn.q@0=4.")
        named = fitting(found, list(pairs), "bipeft")
        return tuple(of_rank(place, int(pairs[place.name] or self.ranks[-1])) for place in named)

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        places = self.places(anatomy)
        if self.plan:
            yield from place_edits(places, None)
            return
        table = [[of_rank(p, r).size for r in self.ranks] for p in places]
        least, budget = min(row[0] for row in table), self.budget(anatomy)
        if budget < least:
            raise ConfigError(
                f"bipeft.share: {self.share:g} is {budget} numbers, and the smallest place holds {least}. Set a larger "
                "share."
            )
        yield from place_edits(places, Choices(table, [p.kind == "lora" for p in places], self))

    def n_params(self, anatomy: Anatomy) -> int:
        places = self.places(anatomy)
        return sum(p.size for p in places) + (0 if self.plan else len(places) * (2 + len(self.ranks)))

    def before_step(self, tuned: TunedView, step: int, total: int) -> None:
        for gates in own_modules(self, tuned, Choices):
            if gates.done:
                continue
            at = (step - 1) / max(1, round(self.search * total))
            gates.all_on, gates.halves = int(gates.taught) < ALL_ON, set()
            gates.draw(ranks=len(self.ranks) > 1 and int(at * 2 * self.rounds) % 2 == 1)

    def loss(self, tuned: TunedView, forward: Callable[[], Any]) -> Any:
        found = own_modules(self, tuned, Choices)
        if not found or found[0].done or not found[0].training:
            return forward()
        gates, heard = found[0], own_modules(self, tuned, Components)[0]
        if gates.alpha.grad is None:  # of a step the first micro-batch, also where it is begun again
            gates.of_training = None
        here = choice_gradient(gates, heard, forward, tuned, half=0)
        gates.of_training = here if gates.of_training is None else gates.of_training + here
        return searched_loss(gates, heard, [], forward, tuned, False, 0.0)

    def after_backward(self, tuned: TunedView, step: int, total: int) -> None:
        for gates in own_modules(self, tuned, Choices):
            if gates.done or gates.alpha.grad is None:
                continue
            for module in own_modules(self, tuned, Components):
                gates.feel(module)
            gates.agree()

    def on_step(self, tuned: TunedView, step: int, total: int) -> None:
        for gates in own_modules(self, tuned, Choices):
            if gates.done:
                continue
            gates.put_back()
            gates.taught += 0 in gates.halves
            if float(gates.agreement) >= self.stable:
                gates.prune(self.budget(tuned.anatomy), self.prunes)

    def plan_of(self, tuned: TunedView) -> tuple[str, ...]:
        """What a search has chosen, as `plan` takes it."""
        (gates,) = own_modules(self, tuned, Choices)
        places = enumerate(self.places(tuned.anatomy))
        kept = [(i, p) for i, p in places if float(gates.fixed[i]) > 0]
        return tuple(f"{p.name}={gates.rank_of(i)}" if p.kind == "lora" else p.name for i, p in kept)


class Choices(Gates):
    """Log-odds of on and off and of each rank; what has been cut already; how much the loss feels each place.

    alpha: (places, 2 + ranks)    active: (places,) 0 or 1    widest: (places,) the number of the widest rank that is
    left    felt: (places, widest rank) sums of |θ g|    taught: steps that had rows to teach the weights
    """

    active: Tensor
    widest: Tensor
    felt: Tensor
    agreement: Tensor
    taught: Tensor
    start: Tensor
    sizes: Tensor
    noise: Tensor

    def __init__(self, sizes: Sequence[Sequence[int]], lora: Sequence[bool], settings: BIPEFT) -> None:
        super().__init__(len(sizes))
        n, self.ranks, self.lora = len(sizes), settings.ranks, list(lora)
        self.temperature, self.lets_learn, self.searches_ranks = settings.temperature, True, False
        self.of_training: Tensor | None = None
        self.all_on = False
        self.alpha = nn.Parameter(torch.zeros(n, 2 + len(self.ranks)))
        self.held = self._resting().detach().clone()
        self.register_buffer("active", torch.ones(n))
        self.register_buffer("widest", torch.full((n,), len(self.ranks) - 1))
        self.register_buffer("felt", torch.zeros(n, self.ranks[-1]))
        self.register_buffer("agreement", torch.zeros(()))
        self.register_buffer("taught", torch.zeros((), dtype=torch.long))
        self.register_buffer("sizes", torch.tensor(sizes), persistent=False)
        self.register_buffer("noise", _gumbel(n, 2 + len(self.ranks)), persistent=False)

    def draw(self, *, ranks: bool) -> None:
        """Other noise, for the passes of a step, and what is searched in it."""
        self.searches_ranks = ranks
        self.held = self._resting().detach().clone()
        self.noise.copy_(_gumbel(*self.noise.shape))

    @torch.no_grad()
    def put_back(self) -> None:
        """What is not searched in this step lies where it lay: without a gradient, an optimiser's momentum moves it."""
        self._resting().copy_(self.held)

    def _resting(self) -> Tensor:
        return self.alpha[:, :2] if self.searches_ranks else self.alpha[:, 2:]

    def numbers(self) -> int:
        """Numbers of what is left."""
        each = self.sizes[torch.arange(len(self.sizes)), self.widest]
        return int((each * (self.active > 0)).sum())

    def rank_of(self, place: int) -> int:
        """The rank that is left of a place."""
        return self.ranks[int(self.widest[place])]

    def z(self) -> Tensor:
        """(places, widest rank) of this pass."""
        shapes = torch.tensor(
            [[float(i < r) for i in range(self.ranks[-1])] for r in self.ranks],
            dtype=self.felt.dtype,
            device=self.felt.device,
        )
        if self.done:
            return self.fixed[:, None] * shapes[self.widest]
        alpha = self.alpha if self.lets_learn else self.alpha.detach()
        places, ranks = alpha[:, :2], alpha[:, 2:]
        places, ranks = (places.detach(), ranks) if self.searches_ranks else (places, ranks.detach())
        outside = torch.arange(len(self.ranks), device=self.widest.device)[None] > self.widest[:, None]
        on = self._hard(places, self.noise[:, :2])[:, 0]
        on = on + (1 - on.detach()) if self.all_on and self.training else on
        chosen = self._hard(ranks.masked_fill(outside, -1e9), self.noise[:, 2:])
        widths = torch.where(
            torch.tensor(self.lora, device=on.device)[:, None], chosen @ shapes, torch.ones_like(self.felt)
        )
        return (on * self.active)[:, None] * widths

    def _hard(self, logits: Tensor, noise: Tensor) -> Tensor:
        """One of each row, with the gradient of the soft choice."""
        soft = torch.softmax((logits + (noise if self.training else 0.0)) / self.temperature, -1)
        hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
        return hard + (soft - soft.detach())

    @torch.no_grad()
    def feel(self, module: Components) -> None:
        """Add |θ g| of what stands at one site."""
        for kind, place in module.numbers.items():
            for name, parameter in module.of(kind).items():
                if parameter.grad is None:
                    continue
                worth = (parameter * parameter.grad).abs()
                if kind == "lora":
                    self.felt[place] += worth.sum(1 if name == "lora_a" else 0)
                else:
                    self.felt[place, 0] += worth.sum()

    @torch.no_grad()
    def agree(self) -> None:
        """How alike the choices' gradients are on the two halves."""
        grad = self.alpha.grad
        if grad is not None and self.of_training is not None:
            self.agreement.copy_(torch.cosine_similarity(grad.flatten(), self.of_training.flatten(), dim=0))

    @torch.no_grad()
    def prune(self, budget: int, prunes: int) -> None:
        """Cut what is felt least, so that `prunes` cuts reach the budget; below it none, and nothing comes back."""
        whole = int(self.sizes[:, -1].sum())
        goal = max(budget, self.numbers() - -(-(whole - budget) // prunes))
        felt, sizes = self.felt.double().cumsum(-1).tolist(), self.sizes.tolist()
        while self.numbers() > goal:
            self._cut_least(felt, sizes)

    @torch.no_grad()
    def _cut_least(self, felt: list[list[float]], sizes: list[list[int]]) -> None:
        """felt: of each place, what its first so many ranks are felt."""
        best, at, narrower = float("inf"), -1, False
        levels = self.widest.tolist()
        for i in (self.active > 0).nonzero().flatten().tolist():
            level, less = levels[i], False
            worth, size = felt[i][self.ranks[level] - 1], sizes[i][level]
            if self.lora[i] and level > 0 and self.searches_ranks:  # its outermost ranks alone
                worth, size, less = worth - felt[i][self.ranks[level - 1] - 1], size - sizes[i][level - 1], True
            if worth / size < best:
                best, at, narrower = worth / size, i, less
        if narrower:
            self.widest[at] -= 1
        else:
            self.active[at] = 0.0

    @torch.no_grad()
    def choose(self, budget: int) -> None:
        soft = torch.where(self.active > 0, self.alpha[:, 2:].argmax(-1), self.widest)
        if len(self.ranks) > 1:
            self.widest.copy_(torch.minimum(self.widest, soft))
        levels, felt = self.widest.tolist(), self.felt.double().cumsum(-1).tolist()
        sizes = [row[level] for row, level in zip(self.sizes.tolist(), levels, strict=True)]
        left = (self.active > 0).nonzero().flatten().tolist()
        worth = [felt[i][self.ranks[levels[i]] - 1] / sizes[i] for i in left]
        chosen = select(worth, [sizes[i] for i in left], budget)
        self.fixed.zero_()
        self.fixed[[left[i] for i in chosen]] = 1.0

    def kept(self, place: int, short: str, parameter: Tensor) -> Tensor:
        mask = super().kept(place, short, parameter)
        if short == "lora_a":
            mask[self.rank_of(place) :] = False
        elif short == "lora_b":
            mask[:, self.rank_of(place) :] = False
        return mask

    def narrow(self, module: Components) -> None:
        if "lora" in module.numbers:
            module.narrow(self.rank_of(module.numbers["lora"]))

    def stored(self) -> dict[str, Tensor]:
        return {**super().stored(), "widest": self.widest.to(torch.uint8)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        super().restore(tensors)
        self.widest.copy_(tensors["widest"].long())


def _gumbel(*shape: int) -> Tensor:
    return -torch.log(-torch.log(torch.rand(shape).clamp(1e-9, 1 - 1e-9)))
