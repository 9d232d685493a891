"""RoAd: turn and scale what a layer gives, two numbers at a time.

    (y_p, y_q) <- a (cos t  -sin t; sin t  cos t) (y_p, y_q)      y = x W^T + b      a, t: one number for each pair

p and q lie half a group apart. t starts at zero and a at one, so the tuned model starts as the base model.
variant=road_2 has an a and a t for each row of the 2 x 2 matrix, road_4 for each entry.

Liao, Monz 2024, "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability",
arXiv:2409.00119. The form is that of peft 0.21. The bias is turned too.

Count: sum over sites of d_out; twice that with road_2, four times with road_4.
Claims: as good as LoRA with a tenth of its numbers; entry by entry, so rows of a batch may each have their own at once.
Use it when: many tunings are served in one batch, or kept.
Not when: the change must reach beyond pairs of outputs.
Pitfalls: which outputs form a pair depends on `group`; groups must divide the outputs.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import ConfigError, at_least
from luthier.methods.parts.kronecker import check_divides
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base, PeftForm


@METHODS.register("road", family="reparameterised", paper="arXiv:2409.00119")
@dataclass(frozen=True, kw_only=True)
class RoAd(AtProjections):
    """Settings of RoAd."""

    variant: Annotated[Literal["road_1", "road_2", "road_4"], "numbers for a pair, a row or an entry"] = "road_1"
    group: Annotated[int, "outputs of a group: even, a divisor of d_out", at_least(2)] = 64

    default_lr: ClassVar[float] = 3e-3
    tiny: ClassVar[dict[str, float]] = {"group": 8, "lr": 2e-2}
    peft: ClassVar[PeftForm | None] = PeftForm(
        "ROAD",
        {"road_theta": "theta", "road_alpha": "alpha"},
        {"variant": "variant", "group_size": "group"},
        transposed=False,
    )

    def __post_init__(self) -> None:
        if self.group % 2:
            raise ConfigError(f"road.group: {self.group} is odd, and a group is made of pairs. Use {self.group + 1}.")

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        sites = super().places(anatomy)
        for site in sites:
            check_divides(self.group, "road.group", site, "d_out")
        return sites

    def params_at(self, site: Site) -> int:
        return site.d_out * int(self.variant[-1])

    def build(self, site: Site, base: Base) -> Attachment:
        return Pairs(site.d_out, self.group, int(self.variant[-1]))


class Pairs(Attachment):
    """Turns and scales pairs of outputs. theta, alpha: (numbers,) each, in the order of peft."""

    kind = "scale"

    def __init__(self, d_out: int, group: int, per_pair: int) -> None:
        super().__init__()
        self.group, self.per_pair = group, per_pair
        self.theta = nn.Parameter(torch.zeros(d_out * per_pair // 2))
        self.alpha = nn.Parameter(torch.ones(d_out * per_pair // 2))

    def columns(self) -> tuple[Tensor, Tensor]:
        """What an output is multiplied by, and what the other of its pair is; (d_out,) each."""
        if self.per_pair == 4:
            theta, alpha = (n.view(-1, 2, self.group) for n in (self.theta, self.alpha))
            return (alpha[:, 0] * theta[:, 0].cos()).flatten(), (alpha[:, 1] * theta[:, 1].sin()).flatten()
        theta, alpha = self.theta, self.alpha
        if self.per_pair == 1:  # both of a pair have the same: (groups, half) twice
            theta, alpha = (n.view(-1, 1, self.group // 2).expand(-1, 2, -1).flatten() for n in (theta, alpha))
        return alpha * theta.cos(), alpha * theta.sin()

    def turn(self, y: Tensor) -> Tensor:
        """y: (..., d_out)."""
        own, other = self.columns()
        first, second = y.unflatten(-1, (-1, 2, self.group // 2)).unbind(-2)  # type: ignore[no-untyped-call]
        return y * own + torch.stack([-second, first], -2).reshape(y.shape) * other

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return self.turn(y)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.turn(weight.T).T, None if bias is None else self.turn(bias)
