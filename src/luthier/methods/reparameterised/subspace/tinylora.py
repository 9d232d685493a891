"""TinyLoRA: LoRA-XS whose square matrix is a sum of frozen random ones; a site trains a few numbers, or shares them.

    y = x W^T + b + B (v_1 P_1 + ... + v_u P_u) A x      A = S_r^1/2 V_r^T    B = U_r S_r^1/2      P_k: (rank, rank)

v starts at zero, so the tuned model starts as the base model. A, B and P are frozen; P is drawn from `draw` and the
place of the site among all, with a variance of 1 / rank.

"Learning to Reason in 13 Parameters" 2026, arXiv:2602.04118. The form is that of peft 0.21, which also chose how P is
drawn, as the paper does not say.

Count: size for each group of sites; tying=0: each site is one; tying=1: all are one.
Claims: a large model trained with reinforcement learning needs hardly any numbers.
Use it when: a tuning must fit into bytes.
Not when: facts are to be learnt: a dozen numbers hold none.
Pitfalls: which P a site has depends on all the sites chosen; rates far above LoRA's.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.anatomy.selection import is_projection
from luthier.core import IntegrityError, at_least, between
from luthier.methods.parts.low_rank import check_projections
from luthier.methods.parts.peft_layers import check_order
from luthier.methods.parts.principal import FrozenFrame, check_principal, frame_params
from luthier.surgery import (
    METHODS,
    PEFT_LAYERS,
    Attach,
    Base,
    Edit,
    Method,
    PeftForm,
    PeftIn,
    PeftOut,
    PeftTaken,
    PeftWhole,
)

_FRAME = {"a": "tinylora_A", "b": "tinylora_B"}
_DRAWN = "tinylora_P"
_VALUES = "base_model.tinylora_v."


def _out(going: PeftOut) -> tuple[dict[str, Tensor], dict[str, object]]:
    check_order(going.anatomy, (site.path for site in going.sites.values()), "tinylora")
    groups = {n.removeprefix("values").removesuffix(".v"): t for n, t in going.stored.items() if n.startswith("values")}
    return {**going.by_layer(_FRAME), **{f"{_VALUES}{k}": v for k, v in groups.items()}}, {}


def _back(coming: PeftIn) -> PeftTaken:
    words, stored = coming.by_layer({theirs: ours for ours, theirs in _FRAME.items()})
    given = [coming.tensors.get(f"{PEFT_LAYERS}{path}.{_DRAWN}") for path in coming.paths(_FRAME["a"])]
    for i, p in enumerate(given):
        if p is not None and not torch.allclose(p, drawn(int(coming.facts["projection_seed"]) + i, *p.shape[:2])):
            raise IntegrityError(f"{coming.where}: the random matrices of layer {i} are not those of projection_seed.")
    values = {n.removeprefix(_VALUES): t for n, t in coming.tensors.items() if n.startswith(_VALUES)}
    return PeftTaken({"sites": words}, {**stored, **{f"values{k}.v": t for k, t in values.items()}})


def drawn(draw: int, size: int, rank: int) -> Tensor:
    """P: (size, rank, rank), on the CPU and in this order, as peft draws it: one number is one P."""
    made = torch.Generator().manual_seed(draw)
    return torch.empty(size, rank, rank, device="cpu").normal_(0, rank**-0.5, generator=made)


@METHODS.register("tinylora", family="reparameterised", paper="arXiv:2602.04118")
@dataclass(frozen=True, kw_only=True)
class TinyLoRA(Method):
    """Settings of TinyLoRA."""

    sites: Annotated[tuple[str, ...], "where to attach: attn.q, ffn, attn.q@0-5, *@last4"] = ("attn.q", "attn.v")
    rank: Annotated[int, "directions of the weight", at_least(1)] = 2
    size: Annotated[int, "trained numbers of a group of sites", at_least(1)] = 64
    tying: Annotated[float, "0: each site has its own numbers; 1: all share them", between(0, 1)] = 0.0
    draw: Annotated[int, "which random matrices: any whole number", at_least(0)] = 42
    dropout: Annotated[float, "share of the branch's input dropped in training", between(0, 0.99)] = 0.0

    mergeable: ClassVar[bool] = True
    start_is_drawn: ClassVar[bool] = False  # what is drawn follows from `draw`
    default_lr: ClassVar[float] = 1e-2
    tiny: ClassVar[dict[str, float]] = {"rank": 4, "size": 16, "lr": 5e-2}
    peft: ClassVar[PeftForm | None] = PeftWhole(
        "TINYLORA",
        out=_out,
        back=_back,
        settings={"r": "rank", "u": "size", "weight_tying": "tying", "projection_seed": "draw"},
        write=lambda method: {"save_projection": False},
        also=("save_projection",),
        ignored=("init_v_bound", "tinylora_dropout", "init_weights"),
    )

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        """The sites, in the order of the model."""
        sites = anatomy.sites(*self.sites, asked_by="tinylora.sites", fits=is_projection)
        return check_principal(self.rank, check_projections(anatomy, sites, "tinylora", self.dropout), "tinylora.rank")

    def n_groups(self, sites: tuple[Site, ...]) -> int:
        """How many groups of neighbouring sites have numbers of their own."""
        return max(1, round(len(sites) * (1 - self.tying)))

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        sites = self.places(anatomy)
        n = self.n_groups(sites)
        group = max(1, len(sites) // n)
        values = [Values(self.size) for _ in range(n)]
        for i, site in enumerate(sites):
            k = min(i // group, n - 1)
            made = partial(self._mixed, values[k], self.draw + i)
            yield Attach(site, made, {f"values{k}": values[k]})

    def n_params(self, anatomy: Anatomy) -> int:
        return self.size * self.n_groups(self.places(anatomy))

    def n_stored(self, anatomy: Anatomy) -> int:
        return self.n_params(anatomy) + frame_params(self.rank, self.places(anatomy))

    def _mixed(self, values: "Values", draw: int, base: Base) -> "MixedBetween":
        return MixedBetween(values, base, self.rank, draw, self.dropout)


class Values(nn.Module):
    """v: (size,) of one group."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.zeros(size))


class MixedBetween(FrozenFrame):
    """R is the mixture of P: (size, rank, rank) that v says."""

    p: Tensor

    def __init__(self, values: Values, base: Base, rank: int, draw: int, dropout: float) -> None:
        super().__init__(base, rank, dropout)
        self.__dict__["values"] = values  # registered once, on the tuning
        self.register_buffer("p", drawn(draw, len(values.v), rank), persistent=False)

    def middle(self) -> Tensor:
        values: Values = self.__dict__["values"]
        return torch.einsum("u,uij->ij", values.v, self.p.to(values.v.dtype))
