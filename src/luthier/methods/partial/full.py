"""Full fine-tuning: every number of the model trains.

    theta = theta_0 + delta          delta: as large as the model

Nothing changes before the first step.

The baseline of every survey; Devlin et al. 2018, arXiv:1810.04805, section 3.2, is the usual reference for encoders.

Count: all parameters of the model, tied ones once, a new task head apart.
Claims: the quality that the others are measured against.
Cost: a step multiplies by half as much again as one through a frozen model, and its optimiser reads and writes every
number: one and a half to two steps of LoRA (docs/benchmarks.md).
Use it when: memory is there, rows are many, or the model must learn a domain or a language anew.
Not when: many tunings are kept, or rows are few: each is as large as the model and forgets more.
Pitfalls: needs gradients and two optimiser moments for every number; a learning rate that suits LoRA destroys it;
decay pulls towards zero, not towards the pretrained value. Where decay is set it leaves norms and biases alone, as the
field does.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from luthier.anatomy import Anatomy
from luthier.surgery import METHODS, Edit, Method, Unfreeze


@METHODS.register("full", family="partial", paper="arXiv:1810.04805")
@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Full fine-tuning has no settings."""

    mergeable: ClassVar[bool] = True
    starts_at_base: ClassVar[bool] = True
    default_lr: ClassVar[float] = 5e-5
    trains_base: ClassVar[bool] = True

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        heads = set(anatomy.head_tensors)
        yield from (Unfreeze(name) for name in anatomy.tensors if name not in heads)

    def n_params(self, anatomy: Anatomy) -> int:
        heads = set(anatomy.head_tensors)
        return sum(math.prod(shape) for name, shape in anatomy.tensors.items() if name not in heads)

    def conflicts(self, other: Method) -> str | None:
        return "full already trains every number of the model, so nothing is left for the other. Use one of them."
