"""Gradual unfreezing: the head learns first, then one block after another joins from the top, in the end everything.

    phase e: head and the top e groups train          groups: each block, then the embeddings

Nothing changes before the first step. One schedule goes through the run, and the moments of a group begin with its
first step.

Howard, Ruder 2018, "Universal Language Model Fine-tuning for Text Classification", arXiv:1801.06146, section 3.3. There
a group joins with each epoch; here groups join at equal distances until `until`, whatever the number of epochs. Two
companions of the paper stand apart: `ratio` here gives each group a rate that many times smaller than the group above,
2.6 in the paper, and the strategy stlr is its triangular schedule. The strategy gradual_unfreeze is the same idea for
any method: what that attaches rests, and joins group by group.

Count: all parameters of the model, tied ones once, a new task head apart.
Claims: less is forgotten than when all layers learn at once.
Cost: steps are cheaper at first: the backward pass ends at the lowest group that trains.
Use it when: rows are few, and full fine-tuning forgets or is unsteady.
Not when: the run is short: every group needs some steps.
Pitfalls: a group that joins late has a short life, and where the schedule falls small rates as well; decay has to leave
alone what does not train yet, as it does here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from luthier.anatomy import Anatomy
from luthier.core import ConfigError, at_least, between
from luthier.methods.parts.in_place import TrainsInPlace
from luthier.methods.parts.update_masks import maskable
from luthier.surgery import METHODS, Group, Phase, TunedView
from luthier.surgery.layer_groups import layer_groups


@METHODS.register("gradual_unfreezing", family="partial", paper="arXiv:1801.06146")
@dataclass(frozen=True, kw_only=True)
class GradualUnfreezing(TrainsInPlace):
    """Settings of gradual unfreezing."""

    until: Annotated[float, "share of the run after which everything trains", between(0, 1)] = 0.75
    ratio: Annotated[float, "each group's rate is that of the group above divided by this", at_least(1)] = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.until < 1:
            raise ConfigError(
                f"gradual_unfreezing.until: {self.until:g} leaves no part of the run "
                f"{'to unfreeze in: use full' if self.until == 0 else 'for the last group'}. Set it between 0 and 1."
            )

    def tensors(self, anatomy: Anatomy) -> tuple[str, ...]:
        return maskable(anatomy, "all")

    def phases(self, tuned: TunedView) -> Sequence[Phase]:
        groups, awake, found = self._groups(tuned), frozenset[str](), []
        for i, group in enumerate(groups):
            awake = awake | frozenset(group)
            share = self.until / (len(groups) - 1) if i + 1 < len(groups) else 1 - self.until
            found.append(Phase(share, trains=awake.__contains__, fresh=False))
        return found

    def groups(self, tuned: TunedView) -> list[Group]:
        if self.ratio == 1:
            return []
        return [Group(tuple(g), lr_factor=self.ratio**-i) for i, g in enumerate(self._groups(tuned))]

    def _groups(self, tuned: TunedView) -> list[list[str]]:
        """Names of what trains, from the top down; the top holds a block too where nothing stands above it."""
        return [group for group in layer_groups(tuned, list(tuned.trained())) if group]
