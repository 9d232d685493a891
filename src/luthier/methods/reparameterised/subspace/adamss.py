"""AdaMSS: the rows of a weight in groups that lie near each other, each with an update of a few directions of its own.

    [W b] ~ U S V^T            rows of U in K groups, by k-means            group of output j: k_j

    y_j = (W x + b)_j + B_j A_kj V^T [x ; 1]     A_k: (rank, directions)   B: (d_out, rank)   V: (d_in + 1, directions)

V and the groups stay; A and B train. A_k starts at the leading directions of its group's rows of U, B at zero, so the
tuned model starts as the base model. Together it is a LoRA of rank K * rank whose B is zero outside its groups.

AdaMSS, NeurIPS 2025 (openreview:8ZdWmpYxT0). The form is that of peft 0.21. Groups that are smaller than the rank have
fewer directions there and more than they can use here. Its option use_asa, by which some groups stop training on the
way, is not here.

Count: sum over sites of rank * (d_out + K * directions); V and the groups are stored with it.
Claims: the quality of a larger LoRA with far fewer numbers that train.
Use it when: what trains must be small, and what is stored need not be.
Not when: the file must be small: V alone is `directions` rows of the width of the input.
Pitfalls: k-means finds other groups on another machine or from rounded weights, so the groups are numbers of the tuning
here: saved, loaded and resumed as they were. peft's file does not hold them: it finds them again when it reads, and an
update of other groups would land in other rows, so no file goes there or comes from there (docs/peft.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import ConfigError, at_least
from luthier.kernels import StillUpdate
from luthier.methods.parts.low_rank import Thin, fusable
from luthier.methods.parts.principal import check_principal
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base

ROUNDS = 10


@METHODS.register("adamss", family="reparameterised", paper="openreview:8ZdWmpYxT0")
@dataclass(frozen=True, kw_only=True)
class AdaMSS(AtProjections):
    """Settings of AdaMSS."""

    directions: Annotated[int, "of the weight's input that are read", at_least(1)] = 100
    subspaces: Annotated[int, "groups of the weight's rows", at_least(1)] = 5
    rank: Annotated[int, "of each group's update", at_least(1)] = 1

    default_lr: ClassVar[float] = 5e-3
    tiny: ClassVar[dict[str, Any]] = {"directions": 12, "subspaces": 4, "rank": 2, "lr": 2e-2}

    def __post_init__(self) -> None:
        if self.rank > self.directions:
            raise ConfigError(
                f"adamss.rank: {self.rank} of {self.directions} directions. Give a group at most as many as there are."
            )

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        sites = super().places(anatomy)
        check_principal(self.directions, sites, "adamss.directions")
        return check_principal(self.subspaces, sites, "adamss.subspaces")

    def params_at(self, site: Site) -> int:
        return self.rank * (site.d_out + self.subspaces * self.directions)

    def n_stored(self, anatomy: Anatomy) -> int:
        kept = sum(self.directions * (s.d_in + (s.bias is not None)) + s.d_out for s in self.places(anatomy))
        return self.n_params(anatomy) + kept

    def build(self, site: Site, base: Base) -> Attachment:
        return Grouped(base, self.directions, self.subspaces, self.rank)


class Grouped(Thin):
    """Adds to each output what its group makes of the input's directions.

    v: (directions, d_in)    shift: (directions,), of the bias, or None    group: (d_out,)
    a: (K, rank, directions)    b: (d_out, rank)
    """

    v: Tensor
    shift: Tensor | None
    group: Tensor
    reads_base_weight = True

    def __init__(self, base: Base, directions: int, groups: int, rank: int) -> None:
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
            a = torch.stack([leading(u[group == k], rank) for k in range(groups)])
        d_in = weight.shape[1]
        self.register_buffer("v", vt[:, :d_in].contiguous())
        self.register_buffer("shift", None if bias is None else vt[:, d_in].clone())
        self.register_buffer("group", group.int())
        self.a = nn.Parameter(wide.new_empty(groups, rank, directions) if a is None else a.contiguous())
        self.b = nn.Parameter(wide.new_zeros(len(wide), rank))

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


def leading(rows: Tensor, rank: int) -> Tensor:
    """The leading right singular vectors of some rows, whole to `rank` where there are fewer: (rank, directions)."""
    right: Tensor = torch.linalg.svd(rows, full_matrices=True).Vh
    return right[:rank]
