"""BEFT: a bias of its own is added at a few layers, the values' projections as a rule, and nothing else trains.

    y = x W^T + b + t          t: (d_out,) trains

t starts at zero, so the tuned model starts as the base model. Layers without a bias get one.

BEFT, arXiv:2509.15974, in the form of peft 0.21: the values' biases and no others. `bitfit sites=attn.v` trains the
model's own biases there instead; `*` stands for every projection of the layers.

Count: sum over sites of d_out.
Claims: what bias-only tuning gains, from the values' biases alone.
Use it when: a tuning must be a few kilobytes and merge.
Not when: the task is far from what the model knows.
Pitfalls: a bias added to the keys changes nothing where softmax sees it alike in every score. Over layers without a
bias, as T5's are, it does not merge: the model's class has no place for it.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Site
from luthier.methods.parts.own_tensors import group_names, own_modules
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base, Group, PeftForm, TunedView


@METHODS.register("beft", family="partial", paper="arXiv:2509.15974")
@dataclass(frozen=True, kw_only=True)
class BEFT(AtProjections):
    """Settings of BEFT."""

    sites: Annotated[tuple[str, ...], "where to attach: attn.v, ffn, attn.v@0-5, *@last4"] = ("attn.v",)

    start_is_drawn: ClassVar[bool] = False
    default_lr: ClassVar[float] = 4e-3
    tiny: ClassVar[dict[str, float]] = {"lr": 5e-2}
    peft: ClassVar[PeftForm | None] = PeftForm("BEFT", {"beft_bias": "bias"}, transposed=False)

    def params_at(self, site: Site) -> int:
        return site.d_out

    def build(self, site: Site, base: Base) -> Attachment:
        return OwnBias(site.d_out)

    def groups(self, tuned: TunedView) -> list[Group]:
        return [Group(group_names(tuned, [m.bias for m in own_modules(self, tuned, OwnBias)]), weight_decay=0.0)]


class OwnBias(Attachment):
    """Adds t: (1, d_out)."""

    kind = "delta"
    needs_input = False

    def __init__(self, d_out: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, d_out))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.bias[0]

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, self.bias[0] if bias is None else bias + self.bias[0]
