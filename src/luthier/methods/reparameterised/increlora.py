"""IncreLoRA: AdaLoRA's updates from the other end: few triplets at first, and more where they matter.

    y = x W^T + b + s x Q^T diag(l) P^T       P: (d_out, most)    l: (most,)    Q: (most, d_in)
                                              s = alpha / target_rank

l starts at zero, so the tuned model starts as the base model. A site with its update D = s P diag(l) Q scores

    S = sum |D * dL/dD| / sqrt(d_out d_in)      smoothed, times its smoothed deviation

and between warmup and settled, at even intervals, the `top` sites that score most get `by` triplets more each, until
the model has target_rank per site. The next `by` triplets of a site wait: in training their l is held at 1e-5, so that
P and Q learn where to point before they count. The rest, up to `most`, has no part in anything.

Zhang F. et al. 2023, "IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning",
arXiv:2308.12043, section 3. The authors' code divides by a site's present rank, so that growing rescales what was
learnt; here s stays. Its penalty holds each new triplet to length one; here to a right angle with the older ones too.
It can miss its budget, or pass it in ties; here the last growth takes what is left, and ties go to the earlier site.
Growth is told in shares of the run, not in steps. The paper sets no `most`; here all tensors have their size from the
start, and what has just come has no warm-up: Adam's first steps on it are up to three times as long as at the start.

Count: sum over sites of most * (d_in + d_out + 1) in training; about target_rank of it is stored.
Claims: better than LoRA and AdaLoRA at small budgets.
Cost: while it grows, what each site reads and its gradient there are kept until the step is over.
Use it when: the budget is one or two ranks per site, and nobody knows which layers need more.
Not when: the run has a few dozen steps only: a score needs steps before it says anything.
Pitfalls: a score grows with what a site has learnt, so who leads early may take all. The site of which the rows tell
gets most where no other can make up for it (tests/methods/test_increlora.py), and seldom else. A rate whose epsilon
hides gradients of 1e-5 size keeps those that wait where they were drawn. Nothing of it decays, since decay would eat
what waits.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from luthier.anatomy import Anatomy, Site
from luthier.core import ConfigError, above, at_least, between
from luthier.methods.parts.own_tensors import group_names, own_modules
from luthier.methods.parts.projections import AtProjections
from luthier.methods.parts.triplets import TripletUpdate
from luthier.methods.parts.watched import Watched
from luthier.surgery import METHODS, Attachment, Base, Group, TunedView

WAITING = 1e-5
"""The l of a triplet that waits."""


@METHODS.register("increlora", family="reparameterised", paper="arXiv:2308.12043")
@dataclass(frozen=True, kw_only=True)
class IncreLoRA(AtProjections):
    """Settings of IncreLoRA."""

    rank: Annotated[int, "triplets per site at the start", at_least(1)] = 1
    target_rank: Annotated[int, "triplets per site at the end, on average", at_least(1)] = 2
    most: Annotated[int, "triplets that one site can grow to", at_least(1)] = 8
    alpha: Annotated[float, "the update is scaled by alpha / target_rank", above(0)] = 16.0
    top: Annotated[int, "sites that grow at a time", at_least(1)] = 2
    by: Annotated[int, "triplets that a site grows by", at_least(1)] = 1
    beta1: Annotated[float, "how slowly the score follows", between(0, 1)] = 0.85
    beta2: Annotated[float, "how slowly its deviation follows", between(0, 1)] = 0.85
    orthogonality: Annotated[float, "weight of the penalty that keeps P and Q orthogonal", at_least(0)] = 0.1
    warmup: Annotated[float, "share of the run before the first growth", between(0, 1)] = 0.1
    settled: Annotated[float, "share of the run after the last growth", between(0, 1)] = 0.4

    default_lr: ClassVar[float] = 2e-3
    tiny: ClassVar[dict[str, float]] = {"most": 3, "lr": 1e-2}

    def __post_init__(self) -> None:
        if not self.rank <= self.target_rank <= self.most:
            raise ConfigError(
                f"increlora: rank {self.rank}, target_rank {self.target_rank} and most {self.most} must not fall."
            )
        if self.warmup + self.settled >= 1:
            raise ConfigError(
                f"increlora: warmup {self.warmup:g} and settled {self.settled:g} leave no part of the run to grow in; "
                "their sum must be below 1."
            )

    def params_at(self, site: Site) -> int:
        return self.most * (site.d_in + site.d_out + 1)

    def n_stored(self, anatomy: Anatomy) -> int:
        """After a whole run, if every site grows alike; exact where all sites have one shape."""
        return sum(self.target_rank * (site.d_in + site.d_out + 1) for site in self.places(anatomy))

    def build(self, site: Site, base: Base) -> Attachment:
        return GrownTriplets(site.d_in, site.d_out, self.rank, self.most, self.by, self.alpha / self.target_rank)

    def groups(self, tuned: TunedView) -> list[Group]:
        mine = (p for m in own_modules(self, tuned, GrownTriplets) for p in m.parameters())
        return [Group(group_names(tuned, mine), weight_decay=0.0)]

    def budget(self, step: int, total: int, start: int, end: int) -> int:
        """Triplets of the whole model after `step` of `total` steps: rounds of `top * by`, evenly spread."""
        first, last = self.warmup * total, (1 - self.settled) * total
        if step >= last or end <= start:
            return max(start, end)
        rounds = math.ceil((end - start) / (self.top * self.by))
        done = math.floor(rounds * max(0.0, step - first) / (last - first) + 1e-9)
        return min(end, start + done * self.top * self.by)

    def extra_loss(self, tuned: TunedView) -> Tensor | None:
        held = [m for m in own_modules(self, tuned, GrownTriplets) if m.l.numel()]
        if not held or self.orthogonality == 0:
            return None
        return self.orthogonality * torch.stack([torch.linalg.vector_norm(g) for m in held for g in m.gaps()]).mean()

    def before_step(self, tuned: TunedView, step: int, total: int) -> None:
        modules = own_modules(self, tuned, GrownTriplets)
        grows = step <= math.ceil((1 - self.settled) * total) and any(bool(m.waits.any()) for m in modules)
        for module in modules:
            module.seen.clear()
            module.watching = grows

    def after_backward(self, tuned: TunedView, step: int, total: int) -> None:
        for module in own_modules(self, tuned, GrownTriplets):
            module.sense()

    def on_step(self, tuned: TunedView, step: int, total: int) -> None:
        modules = own_modules(self, tuned, GrownTriplets)
        if not any(bool(m.waits.any()) for m in modules):
            return
        for module in modules:
            module.remember(self.beta1, self.beta2)
        start, end = self.rank * len(modules), self.target_rank * len(modules)
        has = sum(int(m.alive.sum()) for m in modules)
        self._grow(modules, self.budget(step, total, start, end) - has)
        if step >= (1 - self.settled) * total:
            for module in modules:
                module.waits.fill_(value=False)

    def _grow(self, modules: list["GrownTriplets"], due: int) -> None:
        """Give out `due` triplets, `by` at a time, from the best site down; then from the best again."""
        if due <= 0:  # as in most steps: no score is read from the device
            return
        order = sorted(modules, key=lambda m: -m.importance())
        while due > 0 and (free := [m for m in order if m.room()]):
            for module in free[: self.top]:
                n = min(self.by, due, module.room())
                module.grow(n, self.by)
                due -= n

    def finish(self, tuned: TunedView) -> None:
        for module in own_modules(self, tuned, GrownTriplets):
            module.restore(module.stored())


class GrownTriplets(TripletUpdate):
    """Triplets join the update in their order.

    alive: (most,) bool, the triplets that count. waits: (most,) bool, those that learn to be next. mean, spread: the
    site's smoothed score and its smoothed deviation.
    """

    alive: Tensor
    waits: Tensor
    mean: Tensor
    spread: Tensor

    def __init__(self, d_in: int, d_out: int, rank: int, most: int, by: int, scale: float) -> None:
        super().__init__(d_in, d_out, most, scale)
        self.watching = False
        self.seen: list[tuple[Tensor, Tensor | None]] = []
        self._sensed: Tensor | None = None
        self._place(rank, by)

    def _place(self, rank: int, by: int) -> None:
        index = torch.arange(len(self.l), device=self.l.device)
        self.register_buffer("alive", index < rank)
        self.register_buffer("waits", (index >= rank) & (index < rank + by))
        for name in ("mean", "spread"):
            self.register_buffer(name, torch.zeros((), device=self.l.device))

    def forget(self) -> None:
        """No score yet, and none waits."""
        self._place(len(self.l), 0)

    def acts(self) -> Tensor:
        return self.alive

    def learns(self) -> Tensor:
        return self.alive | self.waits

    def middle(self) -> Tensor:
        """What stands between P and Q: s l of what counts, s 1e-5 of what waits, in training. (most,)"""
        l = self.l * self.alive
        return (l + self.waits * WAITING if self.training else l) * self.scale

    def branch(self, x: Tensor) -> Tensor:
        return self._watched(super().branch(x), x)

    def update(self) -> Tensor:
        return self._watched(super().update(), None)

    def _watched(self, update: Tensor, x: Tensor | None) -> Tensor:
        watches = self.watching and self.training and torch.is_grad_enabled()
        return Watched.apply(update, x, self.seen) if watches else update  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def sense(self, rows: int = 1024) -> None:
        """Take the score of the step from what was seen in it, `rows` rows of the weight at a time.

        What was seen may be scaled, or seen twice; l has the gradient that counts and says by how much.
        """
        score, raw = torch.zeros((), device=self.l.device), torch.zeros_like(self.l)
        p, q, middle = self.p.float(), self.q.float(), self.middle().float()
        pairs = self._flat()
        for begin in range(0, len(p), rows) if pairs else ():
            here = slice(begin, begin + rows)
            grads = (d.T[here] if x is None else d[:, here].T @ x for d, x in pairs)  # (rows, d_in)
            grad = torch.stack(list(grads)).sum(0)
            score += (((p[here] * middle) @ q) * grad).abs().sum()
            raw += ((p[here].T @ grad) * q).sum(1) * self.scale
        self.seen.clear()
        counts = self.l.grad
        if counts is not None:
            raw = raw * self.alive
            score *= (raw @ counts.to(raw.dtype)).abs() / raw.square().sum().clamp_min(torch.finfo(raw.dtype).tiny)
        self._sensed = score / math.sqrt(p.shape[0] * q.shape[1])

    def _flat(self) -> list[tuple[Tensor, Tensor | None]]:
        """Gradients of the update, (tokens, d_out), with its inputs, (tokens, d_in); or of the weight, turned."""
        pairs, half = self.seen, len(self.seen) // 2
        # A step computed twice must not differ by a rounding. What l's gradient says makes up for two like halves.
        if half * 2 == len(pairs) and all(_same(*both) for both in zip(pairs[:half], pairs[half:], strict=True)):
            pairs = pairs[:half]
        return [
            (d.float().T, None) if x is None else (d.flatten(0, -2).float(), x.flatten(0, -2).float()) for d, x in pairs
        ]

    @torch.no_grad()
    def remember(self, beta1: float, beta2: float) -> None:
        """Let the sensed score into the two moving averages."""
        if self._sensed is not None:
            self.mean.lerp_(self._sensed, 1 - beta1)
            self.spread.lerp_((self._sensed - self.mean).abs(), 1 - beta2)
            self._sensed = None

    def importance(self) -> float:
        """The smoothed score times its smoothed deviation."""
        return float(self.mean * self.spread)

    def room(self) -> int:
        """Triplets that may still come."""
        return len(self.l) - int(self.alive.sum())

    @torch.no_grad()
    def grow(self, n: int, by: int) -> None:
        """Let the next `n` triplets count, from where they waited, and the `by` after them wait."""
        had = int(self.alive.sum())
        self.l[had : had + n] = WAITING
        self.alive[had : had + n] = True
        self.waits.fill_(value=False)[had + n : had + n + by] = True


def _same(one: tuple[Tensor, Tensor | None], other: tuple[Tensor, Tensor | None]) -> bool:
    """Whether both were seen with the same bits."""
    return all(
        a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(one, other, strict=True)
    )
