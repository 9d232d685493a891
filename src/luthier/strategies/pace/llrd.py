"""Lower layers learn more slowly: each layer's rate is a fixed share of that of the layer above it.

    rate(g) = peak * decay^g        g = 0 for the head, 1 for the last block, ..., counted from the top

Features near the input are general and should survive; those near the output must change. With several stacks the
decoder stands above the encoder. What stands below the first block (embeddings, prompts) is the last group.

Paper: arXiv:1801.06146 (discriminative fine-tuning). It is quoted with a rate divided by 2.6 from group to group
(decay = .385), for a model of few layers; .8 to .95 is usual in transformers, and the default here is our choice.

Neutral: decay = 1.
Claims: better transfer than one rate for all layers, in full fine-tuning.
Pitfalls: with adapters at all layers the lowest hardly learn at a strong decay. A method whose numbers stand at no
layer (an intrinsic vector) is one group, and nothing differs.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from luthier.core import between
from luthier.surgery import Group, Tuned
from luthier.surgery.layer_groups import layer_groups
from luthier.training.strategy import STRATEGIES, Strategy


@STRATEGIES.register("llrd", family="pace", paper="arXiv:1801.06146")
@dataclass(frozen=True, kw_only=True)
class LLRD(Strategy):
    """Layer-wise learning-rate decay."""

    neutral: ClassVar[dict[str, Any] | None] = {"decay": 1.0}

    decay: Annotated[float, "share of the rate above it that each layer learns with", between(0.01, 1)] = 0.9

    def groups(self, tuned: Tuned) -> list[Group]:
        found = layer_groups(tuned, list(tuned.trained()))
        return [Group(tuple(names), lr_factor=self.decay**g) for g, names in enumerate(found) if names]
