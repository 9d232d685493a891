"""The embeddings, the head and a few blocks drawn at random learn; after some steps others are drawn.

    every K steps: draw `blocks` of the model's blocks without replacement; they learn, the others rest
    AdamW's moments of blocks that leave are dropped

The draw is named by the seed and the interval, so a resumed run draws the same.

Paper: arXiv:2403.17919; 2 blocks and 20 steps are the defaults of the authors' code.

Neutral: blocks = 1000000, which is all of them.
Cost: gradients and moments of the blocks that learn, and of embeddings and head, alone. In the first step the moments
of all are there for a moment.
Claims: better than LoRA, and near full fine-tuning, in its memory.
Pitfalls: a block learns in `blocks` of all blocks of the steps: short runs end far below plain ones (see below; draw
more blocks, or more often). Made for --method full. On adapters there is little memory to save. Embeddings are large
and learn all the time; without them (a method that leaves them alone) only the drawn blocks and the head do.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from luthier.core import at_least, key
from luthier.surgery.layer_groups import layer_groups
from luthier.training.course import Course
from luthier.training.strategy import STRATEGIES, Strategy


@STRATEGIES.register("lisa", family="pace", paper="arXiv:2403.17919")
@dataclass(frozen=True, kw_only=True)
class LISA(Strategy):
    """Layer-wise importance-sampled AdamW."""

    neutral: ClassVar[dict[str, Any] | None] = {"blocks": 1_000_000}
    forgets: ClassVar[bool] = True
    tiny: ClassVar[dict[str, Any]] = {"blocks": 1, "every": 2}

    blocks: Annotated[int, "blocks that learn at a time", at_least(1)] = 2
    every: Annotated[int, "steps from one draw to the next", at_least(1)] = 20

    def trains(self, course: Course) -> Collection[str] | None:
        top, *middle, bottom = layer_groups(course.tuned, list(course.weights()))
        filled = [group for group in middle if group]
        draw = torch.Generator().manual_seed(key(course.seed, "lisa", (course.step - 1) // self.every))
        drawn = torch.randperm(len(filled), generator=draw)[: self.blocks].tolist()
        return [*top, *bottom, *(name for i in drawn for name in filled[i])]
