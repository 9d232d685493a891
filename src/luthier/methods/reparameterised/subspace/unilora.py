"""Uni-LoRA: every number of every LoRA matrix is one of a few trained ones, divided by how often it is used.

    y = x W^T + b + B A x      A_ij = t[k] / sqrt(n_k), k = k(A, i, j); B likewise      t: (size,) for the whole model

Which number stands where is drawn once from `draw` and never trained; each of them stands in equally many places,
up to one. So the map from t to all matrices keeps lengths. t starts in +-0.02, so the tuned model starts near the base
model and not at it.

Li et al. 2025, "Uni-LoRA: One Vector is All You Need", arXiv:2506.00799. The form is that of peft 0.21, places too.

Count: size.
Claims: LoRA's quality from one short vector.
Use it when: thousands of tunings are kept.
Not when: several layers must learn unlike things: they share every number.
Pitfalls: which number stands where depends on all the sites chosen; a size above that of all matrices is refused.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.anatomy.selection import is_projection
from luthier.core import ConfigError, at_least, between
from luthier.methods.parts.low_rank import Thin, check_projections
from luthier.methods.parts.peft_layers import shared_form
from luthier.surgery import METHODS, Attach, Base, Edit, Method, PeftForm


@METHODS.register("unilora", family="reparameterised", paper="arXiv:2506.00799")
@dataclass(frozen=True, kw_only=True)
class UniLoRA(Method):
    """Settings of Uni-LoRA."""

    sites: Annotated[tuple[str, ...], "where to attach: attn.q, ffn, attn.q@0-5, *@last4"] = ("attn.q", "attn.v")
    rank: Annotated[int, "width of the two thin matrices", at_least(1)] = 4
    size: Annotated[int, "trained numbers of the whole model", at_least(1)] = 256
    draw: Annotated[int, "which number stands where: any whole number", at_least(0)] = 42
    bound: Annotated[float, "the numbers start between minus this and this", between(0, 1)] = 0.02
    dropout: Annotated[float, "share of the branch's input dropped in training", between(0, 0.99)] = 0.0

    mergeable: ClassVar[bool] = True
    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 5e-2
    default_head_lr: ClassVar[float | None] = 5e-3
    tiny: ClassVar[dict[str, float]] = {"size": 200, "bound": 0.5, "lr": 5e-2}
    peft: ClassVar[PeftForm | None] = shared_form(
        "UNILORA",
        {},
        {"numbers.t": "base_model.unilora_theta_d"},
        settings={"r": "rank", "theta_d_length": "size", "proj_seed": "draw"},
        fixed={"save_indices": False},
        ignored=("unilora_dropout", "init_theta_d_bound", "init_weights"),
        in_order=True,
    )

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        """The sites, in the order of the model."""
        sites = anatomy.sites(*self.sites, asked_by="unilora.sites", fits=is_projection)
        check_projections(anatomy, sites, "unilora", self.dropout)
        most = sum(self.rank * (site.d_in + site.d_out) for site in sites)
        if self.size > most:
            raise ConfigError(
                f"unilora.size: {self.size} numbers are more than the {most} of the matrices that they stand for. "
                f"Set it to {most} or less."
            )
        return sites

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        sites = self.places(anatomy)
        numbers = Numbers(self.size, self.bound)
        where = self._where(sum(self.rank * (s.d_in + s.d_out) for s in sites))
        if where.is_meta:
            scale = torch.empty(self.size)
        else:
            scale = where.bincount(minlength=self.size).float().rsqrt()  # each is used: size is at most all places
        begun = 0
        for site in sites:
            middle, end = begun + self.rank * site.d_in, begun + self.rank * (site.d_in + site.d_out)
            a, b = where[begun:middle].view(self.rank, -1), where[middle:end].view(-1, self.rank)
            begun = end
            yield Attach(site, partial(self._placed, numbers, scale, a, b), {"numbers": numbers})

    def _where(self, places: int) -> Tensor:
        """(places,); without values where nothing is looked at: millions of places take long to shuffle."""
        if torch.get_default_device().type == "meta":
            return torch.empty(places, dtype=torch.int64)
        return torch.from_numpy(places_of(places, self.size, self.draw))

    def n_params(self, anatomy: Anatomy) -> int:
        self.places(anatomy)
        return self.size

    def _placed(self, numbers: "Numbers", scale: Tensor, a: Tensor, b: Tensor, base: Base) -> "OneVector":
        return OneVector(numbers, a, b, scale, self.dropout)


def places_of(places: int, size: int, draw: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Which of `size` numbers stands in each of `places`: each equally often up to one, shuffled as peft does."""
    rng = np.random.default_rng(draw)
    found = np.repeat(np.arange(size), places // size)
    if places % size:
        found = np.concatenate([found, rng.choice(size, size=places % size, replace=False)])
    rng.shuffle(found)
    return found


class Numbers(nn.Module):
    """t: (size,), for the whole model."""

    def __init__(self, size: int, bound: float) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.empty(size).uniform_(-bound, bound))


class OneVector(Thin):
    """Adds `B A x`, whose numbers are those of t at the places a: (rank, d_in) and b: (d_out, rank)."""

    a: Tensor
    b: Tensor
    scales: Tensor

    def __init__(self, numbers: Numbers, a: Tensor, b: Tensor, scales: Tensor, dropout: float) -> None:
        super().__init__(1.0, dropout)
        self.__dict__["numbers"] = numbers  # registered once, on the tuning
        for name, value in (("a", a), ("b", b), ("scales", scales)):
            self.register_buffer(name, value.clone(), persistent=False)  # they follow from `draw` and the sites

    def thin(self) -> tuple[Tensor, Tensor]:
        numbers: Numbers = self.__dict__["numbers"]
        scaled = numbers.t * self.scales.to(numbers.t.dtype)
        return scaled[self.a], scaled[self.b]
