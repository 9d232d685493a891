"""Linear probe: the model stays as it is, only the new task head trains.

    logits = head(features(x))          features are frozen; head trains

The features do not change, so they need no gradient.

Feature-based transfer, a standard baseline beside full fine-tuning (Devlin et al. 2018, arXiv:1810.04805). Also called
a linear probe.

Count: 0 in the model; the head alone, and with `pooler` the pooler below it.
Claims: the floor that a method has to beat to be worth its cost.
Use it when: a first number is wanted in seconds: what the frozen features already tell apart.
Not when: the result matters: in `make demo` every other method is far ahead of it.
Pitfalls: dropout in the frozen trunk would only add noise; a pooler that trains silently is not a probe; a language
model has no new head, so there is nothing to train; small features want a large rate and many passes, so a probe after
two or three epochs understates what the features hold.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

from luthier.anatomy import Anatomy
from luthier.core import AnatomyError
from luthier.methods.parts.frozen_below import no_new_head
from luthier.surgery import METHODS, Edit, Method, Unfreeze


@METHODS.register("head_only", family="partial", paper="arXiv:1810.04805")
@dataclass(frozen=True, kw_only=True)
class HeadOnly(Method):
    """Settings of the probe."""

    pooler: Annotated[bool, "also train the pooler, where the model has one"] = False

    mergeable: ClassVar[bool] = True
    default_lr: ClassVar[float] = 3e-2

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        if not anatomy.head_tensors and not self._pooler(anatomy):
            raise no_new_head(anatomy, self.name, "nothing else trains")
        yield from (Unfreeze(name) for name in self._pooler(anatomy))

    def n_params(self, anatomy: Anatomy) -> int:
        return sum(math.prod(anatomy.tensors[name]) for name in self._pooler(anatomy))

    def _pooler(self, anatomy: Anatomy) -> list[str]:
        found = [n for n in anatomy.tensors if ".pooler." in f".{n}"]
        if self.pooler and not found:
            raise AnatomyError(f"{self.name}: this {anatomy.model_type} model has no pooler; leave `pooler` off.")
        return found if self.pooler else []
