"""No labels: what stands in the gap of each row is drawn to the labels' words, and all rows together to all of them.

    s_ic = cos(v_i, w_c)                        v_i: state of row i's gap, before the output matrix; w_c: row c of that
    L_T = mean_i sum_c (1 - s_ic) softmax_c(t s_ic) + mean_c sum_i (1 - s_ic) softmax_i(t s_ic)
    L_M = mean_i H(p_i) - H(mean_i p_i)         p_i: chances of the labels' words
    L = transport L_T + information L_M + labelled CE

L_M is least, -log C, where every row is sure and all C labels are as frequent; at 0 all rows have one answer. Labels
of the rows are not read, unless `labelled` is above 0.

Paper: arXiv:2305.00350. transport 1, information .6 for texts, t = 10, a rate of 1e-5 for all numbers and batches of 2
are quoted for its code.

Neutral: transport = 0, information = 0, labelled = 1.
Claims: better than the same prompt without training, from unlabelled rows alone.
Pitfalls: it sharpens what the prompt says already: where that is at chance, it may as well learn the wrong way round.
Look at what the model says first (lm_bff does). Labels that are not equally frequent are drawn towards it. Rows see one
another, so a step is one micro-batch; where the last step of an epoch would have a single row, it has a second one. The
rows have a column of labels all the same, from which the words are known: any will do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from luthier.core import ConfigError, above, at_least
from luthier.data.order import ChosenOrder, Order
from luthier.data.sets import Sets
from luthier.data.tasks import Task
from luthier.runs.spec import RunSpec
from luthier.surgery import Method
from luthier.training.course import Course, Piece
from luthier.training.strategy import STRATEGIES, Strategy, fills


@STRATEGIES.register("pouf", family="loss", paper="arXiv:2305.00350")
@dataclass(frozen=True, kw_only=True)
class POUF(Strategy):
    """Prompt-oriented unsupervised fine-tuning."""

    example: ClassVar[str] = (
        "sample:smollm2-135m --data sample:trec6 --template '{text} Kind: {mask}' "
        "--words 'ABBR=short,DESC=why,ENTY=thing,HUM=person,LOC=place,NUM=number'"
    )
    neutral: ClassVar[dict[str, Any] | None] = {"transport": 0.0, "information": 0.0, "labelled": 1.0}
    reads: ClassVar[tuple[str, ...]] = ("logits",)
    whole_step: ClassVar[bool] = True
    tiny_kind: ClassVar[str] = "bert-gap"

    transport: Annotated[float, "what drawing gaps and words to each other counts", at_least(0)] = 1.0
    information: Annotated[float, "what sure and balanced answers count", at_least(0)] = 0.6
    sharpness: Annotated[float, "t, how much of its way goes to the nearest", above(0)] = 10.0
    labelled: Annotated[float, "what the rows' labels count; 0, none is read", at_least(0)] = 0.0

    def conflicts(self, other: Strategy | Method) -> str | None:
        if isinstance(other, Strategy) and any(fills(other, moment) for moment in ("loss", "weigh", "order")):
            return f"{other.name} learns from labels or chooses rows, and here no label is read. Use one of the two."
        return None

    def check(self, spec: RunSpec) -> None:
        if spec.data.template is None:
            raise ConfigError(
                "pouf cannot compare with words without a gap: give --template '{text} It was {mask}.' and --words."
            )
        if spec.batch.size < 2:
            raise ConfigError("batch.size is 1, and pouf compares the rows of a step with one another. Take 2 or more.")

    def suits(self, task: Task) -> str | None:
        return None if task.name == "classification" and not task.multi_label else "it wants rows with one label each."

    def order(self, usual: Order, sets: Sets, spec: RunSpec) -> Order:
        if len(usual.lengths) < 2:
            raise ConfigError("pouf compares the rows of a step with one another, and there is one row. Name more.")
        if len(usual.lengths) % usual.size != 1 or not (self.transport or self.information):
            return usual

        def choose(epoch: int, step: int) -> NDArray[np.int64]:
            rows = usual.rows(epoch, step)
            if len(rows) > 1:
                return rows
            others = usual.rows(epoch, (step + 1) % usual.steps_per_epoch)
            return np.concatenate([rows, others[:1]])

        return ChosenOrder(usual, choose)

    def loss(self, course: Course, piece: Piece, forward: Callable[[], Any]) -> Any:
        with course.gap_states() as seen:
            result = forward()
        if not (self.transport or self.information):
            result.loss = self.labelled * result.loss
            return result
        assert seen.states is not None and seen.words is not None and result.logits is not None
        moved = self.moved(F.normalize(seen.states.float(), dim=-1) @ F.normalize(seen.words.float(), dim=-1).T)
        unsure = balance(result.logits.float().softmax(-1))
        course.note("transport", float(moved.detach()))
        course.note("information", float(unsure.detach()))
        own = self.labelled * result.loss if self.labelled else 0.0
        result.loss = own + len(result.logits) * (self.transport * moved + self.information * unsure)
        return result

    def moved(self, s: Tensor) -> Tensor:
        """L_T of cosines (rows, labels)."""
        ways = [(self.sharpness * s).softmax(dim) for dim in (1, 0)]
        return ((1 - s) * ways[0]).sum(1).mean() + ((1 - s) * ways[1]).sum(0).mean()


def balance(p: Tensor) -> Tensor:
    """L_M of chances (rows, labels): the mean entropy of the rows, less the entropy of their mean."""
    own: Tensor = torch.special.entr(p).sum(-1).mean() - torch.special.entr(p.mean(0)).sum()
    return own
