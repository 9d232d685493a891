"""AdapterDrop: the bottom layers do without what is attached there, always or in training by lot.

    layers 0 .. n-1: the base's own          layers n .. L-1: as they are with the method beside it

training=robust draws n from 0 .. L-1 for every step, so that one tuning bears any n in answers: `without` says which, 0
for the whole. training=specialised makes nothing in the bottom `without` layers, in training and in answers. What
trains elsewhere, such as norms, is left alone. It stands beside another method, `lora+adapterdrop`; alone it stands
beside pfeiffer_adapter. In a model of two stacks the bottom layers of both are meant.

Rücklé et al. 2021, "AdapterDrop: On the Efficiency of Adapters in Transformers", arXiv:2010.11918, sections 3 and 4.
Its pruning of fused adapters and its sharing across layers are not offered here.

Count: robust, that of the method beside it; specialised, that of what is left.
Claims: 39 % faster answers in eight tasks at once with n = 5, at little loss.
Measured: `luthier train sample:minilm-l6 --data sample:trec6 --method adapterdrop`: accuracy 0.931 on 1,076 held-out
rows, one seed, where head_only reaches 0.572 and pfeiffer_adapter alone 0.941.
Cost: less than the method beside it: no gradient enters the layers below the lowest one that acts.
Use it when: answers must be fast, or are wanted at several speeds from one tuning.
Not when: the model has few layers: each that does without is missed.
Pitfalls: an n for each row or each layer is another method; dropping the top layers instead of the bottom ones hurts; a
tensor that rests must not decay, and does not here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch

from luthier.anatomy import Anatomy, layer_in
from luthier.core import CompositionError, ConfigError, at_least
from luthier.methods.parts.modifier import Modifier
from luthier.surgery import METHODS, Attachment, Edit, Method, TunedView, layer_of, numbers


@METHODS.register("adapterdrop", family="additive", paper="arXiv:2010.11918")
@dataclass(frozen=True, kw_only=True)
class AdapterDrop(Modifier):
    """Settings of AdapterDrop."""

    training: Annotated[Literal["robust", "specialised"], "n is drawn for each step, or is always `without`"] = "robust"
    without: Annotated[int, "how many layers at the bottom do without, in answers", at_least(0)] = 0

    mergeable: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("pfeiffer_adapter",)

    def __post_init__(self) -> None:
        if self.training == "specialised" and self.without == 0:
            raise ConfigError("adapterdrop: training=specialised leaves no layer out with without=0. Set it above 0.")

    def leaves_out(self, edit: Edit, anatomy: Anatomy) -> bool:
        self._check(anatomy, self.without)
        return self.training == "specialised" and layer_of(edit) in range(self.without)

    def n_removed(self, others: Sequence[Method], anatomy: Anatomy) -> int:
        layered = [o for o in others if any(layer_of(edit) is not None for edit in o.edits(anatomy))]
        if not layered:
            raise CompositionError(
                f"adapterdrop: {' and '.join(o.name for o in others)} attach nothing to a layer, so no layer can do "
                "without it. Put it beside an adapter or lora."
            )
        return sum(numbers(other, anatomy, lambda edit: self.leaves_out(edit, anatomy)) for other in layered)

    def begin(self, tuned: TunedView) -> None:
        self.leave_out(tuned, self.without)

    def before_step(self, tuned: TunedView, step: int, total: int) -> None:
        if self.training == "robust":
            self.leave_out(tuned, int(torch.randint(min(tuned.anatomy.depths.values()), ())))

    def on_step(self, tuned: TunedView, step: int, total: int) -> None:
        if self.training == "robust":
            self.leave_out(tuned, self.without)

    def conflicts(self, other: Method) -> str | None:
        if other.modifies and self.training == "specialised":
            return "what is left out cannot be counted by another modifier. Use training=robust, or one of them."
        return None

    def leave_out(self, tuned: TunedView, n: int) -> None:
        """Let what stands in the bottom `n` layers sit out until told otherwise."""
        self._check(tuned.anatomy, n)
        for tuning in (t for t in tuned.tunings.values() if t.made_by(self)):
            below = (m for key, m in tuning.modules_by_key().items() if layer_in(key) in range(n))
            tuned.let_rest(tuning.tuning_name, [m for m in below if isinstance(m, Attachment)])

    def _check(self, anatomy: Anatomy, n: int) -> None:
        if n >= (depth := min(anatomy.depths.values())):
            raise ConfigError(f"adapterdrop.without: {n} of {depth} layers leave none. Set it below {depth}.")
