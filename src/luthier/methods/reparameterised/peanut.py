"""PEANuT: the update is what a small network makes of the weight itself, row by row of its transpose.

    y = x (W + s N(W))^T + b      N(W)^T = h B^T, h = f(W^T A^T)      A: (rank, d_out)    B: (d_out, rank)

With `depth`, h goes through as many square layers down and up again, with a bridge from each to its partner. B starts
at zero, so the tuned model starts as the base model.

"PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers" 2024, arXiv:2410.01870. The
form is that of peft 0.21.

Count: sum over sites of 2 rank d_out, and 2 depth rank^2 more.
Claims: more than a low rank can say, from as many numbers as LoRA has.
Use it when: a low rank is what holds LoRA back.
Not when: memory or time is short: an update as large as the weight is made, with its graph, in every pass.
Pitfalls: the update is a function of the base, so another base is another update; a quantised base is refused.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.anatomy import Site
from luthier.core import above, at_least
from luthier.methods.parts.dense import DenseUpdate
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import (
    METHODS,
    Attachment,
    Base,
    PeftForm,
    PeftIn,
    PeftOut,
    PeftTaken,
    PeftWhole,
)

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh, "silu": F.silu}


def _named(depth: int) -> dict[str, str]:
    """Our name at a layer -> peft's."""
    both = (("down", "peanut_encoders"), ("up", "peanut_decoders"))
    square = {f"{ours}.{i}": f"{theirs}.{i}.weight" for ours, theirs in both for i in range(depth)}
    return {"a": "peanut_A.weight", "b": "peanut_B.weight", **square}


def _out(going: PeftOut) -> tuple[dict[str, Tensor], dict[str, object]]:
    return going.by_layer(_named(going.method.depth)), {}


def _back(coming: PeftIn) -> PeftTaken:
    words, stored = coming.by_layer({t: o for o, t in _named(int(coming.facts.get("depth", 0))).items()})
    return PeftTaken({"sites": words}, stored)


@METHODS.register("peanut", family="reparameterised", paper="arXiv:2410.01870")
@dataclass(frozen=True, kw_only=True)
class PEANuT(AtProjections):
    """Settings of PEANuT."""

    rank: Annotated[int, "width of the network", at_least(1)] = 32
    depth: Annotated[int, "square layers down, and as many up", at_least(0)] = 0
    function: Annotated[Literal["relu", "gelu", "tanh", "silu"], "between the layers"] = "relu"
    scale: Annotated[float, "multiplies the update", above(0)] = 1.0

    default_lr: ClassVar[float] = 1e-3
    tiny: ClassVar[dict[str, float]] = {"rank": 6, "scale": 4.0, "lr": 3e-2}
    peft: ClassVar[PeftForm | None] = PeftWhole(
        "PEANUT",
        out=_out,
        back=_back,
        settings={"r": "rank", "depth": "depth", "act_fn": "function", "scaling": "scale"},
        transposed=False,
    )

    def params_at(self, site: Site) -> int:
        return 2 * self.rank * (site.d_out + self.depth * self.rank)

    def build(self, site: Site, base: Base) -> Attachment:
        return Tweaker(base, site.d_out, self.rank, self.depth, self.function, self.scale)


class Tweaker(DenseUpdate):
    """Adds `s N(W) x`. a: (rank, d_out)   b: (d_out, rank)   down, up: (rank, rank) each."""

    reads_base_weight = True

    def __init__(self, base: Base, d_out: int, rank: int, depth: int, function: str, scale: float) -> None:
        super().__init__()
        base.weight()  # refuses a quantised one
        self.base, self.scale, self.function = base, scale, _FUNCTIONS[function]
        self.a = nn.Parameter(torch.empty(rank, d_out))
        self.b = nn.Parameter(torch.zeros(d_out, rank))
        self.down = nn.ParameterList(torch.empty(rank, rank) for _ in range(depth))
        self.up = nn.ParameterList(torch.empty(rank, rank) for _ in range(depth))
        for value in chain([self.a], self.down, self.up):
            nn.init.kaiming_uniform_(value, a=math.sqrt(5))

    def update(self) -> Tensor:
        h = self.function(self.base.weight().T.to(self.a.dtype) @ self.a.T)  # (d_in, rank)
        bridges = []
        for layer in self.down:
            bridges.append(h)
            h = self.function(h @ layer.T)
        for layer, bridge in zip(self.up, reversed(bridges), strict=True):
            h = self.function(h @ layer.T) + bridge
        return self.b @ h.T * self.scale  # (d_out, d_in)
