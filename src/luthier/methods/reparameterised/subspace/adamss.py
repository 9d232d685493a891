"""AdaMSS: the rows of a weight in groups that lie near each other, each with an update of a few directions of its own.

    [W b] ~ U S V^T            rows of U in K groups, by k-means            group of output j: k_j

    y_j = (W x + b)_j + B_j A_kj V^T [x ; 1]     A_k: (rank, directions)   B: (d_out, rank)   V: (d_in + 1, directions)

V and the groups stay; A and B train. A_k starts at the leading directions of its group's rows of U, B at zero, so the
tuned model starts as the base model. Together it is a LoRA of rank K * rank whose B is zero outside its groups.

With `threshold` a group has only the directions whose squared singular value in its rows of U is above that share of
its largest; the other rows of A_k are zero, as B is, and stay so. With `active` only so many groups of the whole model
train on to the end: from `warmup` of the run on their number falls by the cube of what is left until `settled` of it
remains; every `every` steps the most important of those that still train go on, and the others stay where they are. A
group is as important as the mean over A_k of I U plus the mean over its rows of B, where for each number

    U <- beta2 U + (1 - beta2) | |w g| - I |     I <- beta1 I + (1 - beta1) |w g|     both from zero after each choice

AdaMSS, NeurIPS 2025 (openreview:8ZdWmpYxT0). The form is that of peft 0.21, where `active` is use_asa and `threshold`
use_dynamic_rank. Groups that are smaller than the rank have fewer directions there and more than they can use here.
peft keeps one group fewer than its target says, and counts in steps what is shares of the run here.

Count: sum over sites of rank * (d_out + K * directions), with those that `threshold` or `active` leave still; V and the
groups are stored with it.
Claims: the quality of a larger LoRA with far fewer numbers that train.
Use it when: what trains must be small, and what is stored need not be.
Not when: the file must be small: V alone is `directions` rows of the width of the input.
Pitfalls: k-means finds other groups on another machine or from rounded weights, so the groups are numbers of the tuning
here: saved, loaded and resumed as they were. peft's file does not hold them: it finds them again when it reads, and an
update of other groups would land in other rows, so no file goes there or comes from there (docs/peft.md).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import ConfigError, above, at_least, between
from luthier.kernels import StillUpdate
from luthier.methods.parts.low_rank import Thin, fusable
from luthier.methods.parts.masks import top_k
from luthier.methods.parts.own_tensors import own_modules, own_tunings
from luthier.methods.parts.principal import check_principal
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base, TunedView

ROUNDS = 10


@METHODS.register("adamss", family="reparameterised", paper="openreview:8ZdWmpYxT0")
@dataclass(frozen=True, kw_only=True)
class AdaMSS(AtProjections):
    """Settings of AdaMSS."""

    directions: Annotated[int, "of the weight's input that are read", at_least(1)] = 100
    subspaces: Annotated[int, "groups of the weight's rows", at_least(1)] = 5
    rank: Annotated[int, "of each group's update", at_least(1)] = 1
    threshold: Annotated[
        float, "share of a group's largest squared singular value that its directions are above", between(0, 0.999)
    ] = 0.0
    active: Annotated[int, "groups of the whole model that train to the end; 0: all", at_least(0)] = 0
    warmup: Annotated[float, "active: share of the run before the first groups stop", between(0, 1)] = 0.05
    settled: Annotated[float, "active: share of the run after the last ones have", between(0, 1)] = 0.5
    every: Annotated[int, "active: optimiser steps from one choice to the next", at_least(1)] = 10
    exponent: Annotated[float, "active: of what is left; higher, more stop early", above(0)] = 3.0
    beta1: Annotated[float, "active: how slowly the importance follows", between(0, 1)] = 0.85
    beta2: Annotated[float, "active: how slowly its deviation follows", between(0, 1)] = 0.85

    default_lr: ClassVar[float] = 5e-3
    tiny: ClassVar[dict[str, Any]] = {"directions": 12, "subspaces": 4, "rank": 2, "lr": 2e-2}

    def __post_init__(self) -> None:
        if self.rank > self.directions:
            raise ConfigError(
                f"adamss.rank: {self.rank} of {self.directions} directions. Give a group at most as many as there are."
            )
        if self.active and self.warmup + self.settled >= 1:
            raise ConfigError(
                f"adamss: warmup {self.warmup:g} and settled {self.settled:g} leave no part of the run in which groups "
                "could stop; their sum must be below 1."
            )
        object.__setattr__(self, "idle", () if self.active else ("after_backward", "on_step"))

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        sites = super().places(anatomy)
        check_principal(self.directions, sites, "adamss.directions")
        if self.active >= len(sites) * self.subspaces:
            raise ConfigError(
                f"adamss.active: {self.active} of {len(sites) * self.subspaces} groups. Give fewer, or 0 for all."
            )
        return check_principal(self.subspaces, sites, "adamss.subspaces")

    def params_at(self, site: Site) -> int:
        return self.rank * (site.d_out + self.subspaces * self.directions)

    def n_stored(self, anatomy: Anatomy) -> int:
        kept = sum(self.directions * (s.d_in + (s.bias is not None)) + s.d_out for s in self.places(anatomy))
        return self.n_params(anatomy) + kept

    def build(self, site: Site, base: Base) -> Attachment:
        return Grouped(base, self.directions, self.subspaces, self.rank, self.threshold)

    def budget(self, step: int, total: int, groups: int) -> int:
        """Groups of the whole model that train on after `step` of `total` steps."""
        first, last = self.warmup * total, (1 - self.settled) * total
        left = min(1.0, max(0.0, 1 - (step - first) / (last - first)))
        return int(self.active + (groups - self.active) * left**self.exponent)

    def after_backward(self, tuned: TunedView, step: int, total: int) -> None:
        for module in own_modules(self, tuned, Grouped) if self.active else ():
            module.still_groups()

    def on_step(self, tuned: TunedView, step: int, total: int) -> None:
        modules = own_modules(self, tuned, Grouped) if self.active else []
        (tuning,) = own_tunings(self, tuned) if modules else (None,)
        if tuning is None:
            return
        last = math.ceil((1 - self.settled) * total)
        within = self.warmup * total <= step <= last
        for number, module in enumerate(modules):
            module.put_back()
            if within:
                module.follow(tuning.notes, f"{number}.", self.beta1, self.beta2)
        if within and (step % self.every == 0 or step == last):
            awake = [module.awake for module in modules]
            scores = [
                module.importance(tuning.notes, f"{number}.").where(on, -torch.inf)
                for number, (module, on) in enumerate(zip(modules, awake, strict=True))
            ]
            kept = min(self.budget(step, total, sum(len(on) for on in awake)), sum(int(on.sum()) for on in awake))
            for module, on in zip(modules, top_k(scores, kept), strict=True):
                module.awake.copy_(on)
            for name in [n for n in tuning.notes if n.endswith((".mean", ".spread"))]:
                del tuning.notes[name]


class Grouped(Thin):
    """Adds to each output what its group makes of the input's directions.

    v: (directions, d_in)    shift: (directions,), of the bias, or None    group: (d_out,)
    a: (K, rank, directions)    b: (d_out, rank)    awake: (K,), which groups still train
    """

    awake: Tensor
    v: Tensor
    shift: Tensor | None
    group: Tensor
    reads_base_weight = True

    def __init__(self, base: Base, directions: int, groups: int, rank: int, threshold: float = 0.0) -> None:
        super().__init__(1.0)
        weight, bias = base.weight(), base.bias()
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        whole = wide if bias is None else torch.cat([wide, bias.to(wide)[:, None]], 1)
        if whole.is_meta:
            u, vt = whole.new_empty(len(whole), directions), whole.new_empty(directions, whole.shape[1])
            group, a = torch.zeros(len(whole), dtype=torch.int32, device="meta"), None
        else:
            left, _, right = torch.linalg.svd(whole, full_matrices=False)
            u, vt = left[:, :directions], right[:directions]
            group = grouped(u, groups)
            a = torch.stack([leading(u[group == k], rank, threshold) for k in range(groups)])
        d_in = weight.shape[1]
        self.register_buffer("v", vt[:, :d_in].contiguous())
        self.register_buffer("shift", None if bias is None else vt[:, d_in].clone())
        self.register_buffer("group", group.int())
        self.a = nn.Parameter(wide.new_empty(groups, rank, directions) if a is None else a.contiguous())
        self.b = nn.Parameter(wide.new_zeros(len(wide), rank))
        self.register_buffer("awake", torch.ones(groups, dtype=torch.bool, device=wide.device))
        self._held: tuple[Tensor, Tensor] | None = None

    def stored(self) -> dict[str, Tensor]:
        return {name: value for name, value in super().stored().items() if name != "awake"}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        super().restore({**tensors, "awake": self.awake})

    def _still(self) -> tuple[Tensor, Tensor]:
        """Where a and b are numbers of groups that have stopped: (K, 1, 1) and (d_out, 1)."""
        return ~self.awake[:, None, None], ~self.awake[self.group.long()][:, None]

    @torch.no_grad()
    def still_groups(self) -> None:
        """Take the gradient of groups that have stopped, and remember where they are."""
        if bool(self.awake.all()):
            return
        for held, still in zip((self.a, self.b), self._still(), strict=True):
            if held.grad is not None:
                held.grad.masked_fill_(still, 0)
        self._held = self.a.detach().clone(), self.b.detach().clone()

    @torch.no_grad()
    def put_back(self) -> None:
        """What an optimiser's moments or decay have moved of them is put back."""
        for now, before, still in zip((self.a, self.b), self._held or (), self._still(), strict=False):
            now.copy_(torch.where(still, before, now))
        self._held = None

    @torch.no_grad()
    def follow(self, notes: dict[str, Tensor], name: str, beta1: float, beta2: float) -> None:
        """Let |w g| into the running importance of every number and its deviation."""
        for short, held in (("a", self.a), ("b", self.b)):
            if held.grad is None:
                continue
            now = (held * held.grad).abs()
            mean = notes.get(f"{name}{short}.mean", torch.zeros_like(now))
            spread = notes.get(f"{name}{short}.spread", torch.zeros_like(now))
            notes[f"{name}{short}.spread"] = beta2 * spread + (1 - beta2) * (now - mean).abs()
            notes[f"{name}{short}.mean"] = beta1 * mean + (1 - beta1) * now

    @torch.no_grad()
    def importance(self, notes: dict[str, Tensor], name: str) -> Tensor:
        """Of each group: (K,). Means are over the directions that it has."""
        groups, zero = len(self.a), self.a.new_zeros(())
        a, b = (
            notes.get(f"{name}{short}.mean", zero) * notes.get(f"{name}{short}.spread", zero) for short in ("a", "b")
        )
        ranks = self.a.any(2).sum(1).clamp(min=1)  # (K,)
        members = torch.bincount(self.group.long(), minlength=groups)
        of_a = (torch.zeros_like(self.a) + a).sum((1, 2)) / (ranks * self.a.shape[2])
        rows = (torch.zeros_like(self.b) + b).sum(1)
        of_b = torch.zeros_like(of_a).index_add_(0, self.group.long(), rows) / (members * ranks)
        return of_a + of_b

    def thin(self) -> tuple[Tensor, Tensor]:
        groups, rank, directions = self.a.shape
        of_group = nn.functional.one_hot(self.group.long(), groups).to(self.b)  # (d_out, K)
        b = (of_group[:, :, None] * self.b[:, None, :]).flatten(1)  # (d_out, K, rank) -> (d_out, K rank)
        return self.a.view(groups * rank, directions) @ self.v.to(self.a.dtype), b

    def moved(self) -> Tensor | None:
        """What is added to the bias: (d_out,)."""
        if self.shift is None:
            return None
        of_groups = self.a @ self.shift.to(self.a.dtype)  # (K, rank)
        return (of_groups[self.group.long()] * self.b).sum(1)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        out, moved = super().after(x, y), self.moved()
        return out if moved is None else out + moved

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        moved = self.moved()
        both = super().merged(weight, bias)[0], bias
        return both if moved is None or bias is None else (both[0], bias + moved)

    def fused(self, base: Base, x: Tensor) -> Tensor | None:
        out, moved = super().fused(base, x), self.moved()
        return out if out is None or moved is None else out + moved.to(out.dtype)

    def still(self, base: Base) -> Callable[[Tensor], Tensor] | None:
        bias, moved = base.bias(), self.moved()
        if not fusable(base):
            return None
        held = bias if bias is None or moved is None else bias + moved.detach().to(bias.dtype)
        return StillUpdate(base.frozen(), held, self._update())

    @classmethod
    def together(cls, members: Sequence[Attachment], dtype: torch.dtype) -> None:
        """Nothing: each one's bias moves too."""


def grouped(rows: Tensor, groups: int) -> Tensor:
    """The group of each row, (n,): ten rounds of k-means from drawn rows; no group is empty."""
    home = rows.device
    points = rows.detach().cpu().double()  # on the CPU: the same groups on any device
    centres = points[torch.randperm(len(points))[:groups]]
    found = torch.cdist(points, centres).argmin(1)
    for _ in range(ROUNDS):
        for k in range(groups):
            if not bool((found == k).any()):  # the row that lies worst, of a group that can spare it
                apart = (points - centres[found]).square().sum(1)
                apart[torch.bincount(found, minlength=groups)[found] < 2] = -1
                found[apart.argmax()] = k
            centres[k] = points[found == k].mean(0)
        nearest = torch.cdist(points, centres).argmin(1)
        if bool((torch.bincount(nearest, minlength=groups) == 0).any()) or torch.equal(nearest, found):
            break
        found = nearest
    return found.to(home)


def leading(rows: Tensor, rank: int, threshold: float = 0.0) -> Tensor:
    """The leading right singular vectors of some rows, whole to `rank` where there are fewer: (rank, directions).

    Zeros in place of those whose squared singular value is not above `threshold` of the largest; the first one stays.
    """
    _, values, right = torch.linalg.svd(rows, full_matrices=True)
    kept: Tensor = right[:rank].clone()
    if threshold > 0:
        n = int((values.square() > threshold * values[0].square()).sum())
        kept[max(1, n) :] = 0
    return kept
