"""Child-Tuning, task-free: at every step a random part of the gradient is kept and made larger; the rest is dropped.

    g <- g * M_t / p      M_t ~ Bernoulli(p), anew for every entry and every optimiser step

Nothing changes before the first step, and every number trains over time.

Xu et al. 2021, "Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning",
arXiv:2109.05687, section 3.2. As in the authors' code the mask is laid on the gradient, inside the optimiser and before
its moments; so momentum and decay move entries that this step's mask leaves out. With `masked_update` they stay, at the
price of a copy of the model. There the mask follows clipping, here it comes before it.

Count: all parameters of the model, tied ones once, a new task head apart.
Claims: a regulariser, better and steadier than full fine-tuning on small data; it saves neither memory nor storage.
Cost: a step of full fine-tuning, and a draw for every number.
Use it when: a large encoder overfits few rows.
Not when: memory is short, or the result must be small.
Pitfalls: forgetting 1 / p; one mask for a tensor or for an epoch; a mask for each micro-batch where a step has several.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from luthier.anatomy import Anatomy
from luthier.core import ConfigError, above
from luthier.methods.parts.in_place import MovesEntries
from luthier.methods.parts.own_tensors import own_unfrozen
from luthier.methods.parts.update_masks import maskable
from luthier.surgery import METHODS, TunedView
from luthier.surgery.unfrozen import Unfrozen


@METHODS.register("child_tuning_f", family="partial", paper="arXiv:2109.05687")
@dataclass(frozen=True, kw_only=True)
class ChildTuningF(MovesEntries):
    """Settings of task-free child tuning."""

    p: Annotated[float, "share of the entries whose gradient is kept in a step", above(0)] = 0.3
    masked_update: Annotated[bool, "entries outside a step's mask stay, whatever momentum and decay say"] = False

    default_lr: ClassVar[float] = 4e-5

    def __post_init__(self) -> None:
        if self.p >= 1:
            raise ConfigError(f"child_tuning_f.p: {self.p:g} keeps the whole gradient, which is full. Set it below 1.")

    def tensors(self, anatomy: Anatomy) -> tuple[str, ...]:
        return maskable(anatomy, "all")

    def before_step(self, tuned: TunedView, step: int, total: int) -> None:
        # Drawn here, where draws are keyed by the step: what a step draws is the same after a stop.
        self.__dict__["drawn"] = (step, int(torch.randint(1 << 62, ())))

    def after_backward(self, tuned: TunedView, step: int, total: int) -> None:
        at, seed = self.__dict__.get("drawn", (0, 0))
        if at != step:
            raise ConfigError("child_tuning_f: no mask was drawn for this step. Call before_step() before it.")
        self.__dict__["before"] = []
        draws: dict[torch.device, torch.Generator] = {}
        for unfrozen in own_unfrozen(self, tuned):
            grad = unfrozen.parameter.grad
            if grad is None:
                continue
            draw = draws.setdefault(grad.device, torch.Generator(grad.device).manual_seed(seed))
            mask = torch.empty_like(grad).bernoulli_(self.p, generator=draw)
            grad.mul_(mask).div_(self.p)
            if self.masked_update:
                self.__dict__["before"].append((unfrozen, mask.bool(), unfrozen.parameter.detach().clone()))

    @torch.no_grad()
    def on_step(self, tuned: TunedView, step: int, total: int) -> None:
        held: list[tuple[Unfrozen, torch.Tensor, torch.Tensor]] = self.__dict__.pop("before", [])
        for unfrozen, mask, value in held:
            unfrozen.parameter.data = torch.where(mask, unfrozen.parameter.data, value)
