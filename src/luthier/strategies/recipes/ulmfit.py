"""The model first learns the language of the task's texts, then the task from the top down.

    1 texts    its own kind of pre-training on the rows' inputs, with llrd and stlr
    2 task     the task, from the merged model of 1, with llrd, stlr and gradual_unfreeze

Settings of the three are given as theirs: llrd.decay, stlr.ratio, gradual_unfreeze.every.

Paper: arXiv:1801.06146. A rate divided by 2.6 from group to group is quoted for its model of few layers (llrd.decay =
.385). The head on the last, the largest and the mean state of its LSTM is left out: the model's own head stands.

Cost: a run on the texts before the task's own; the first epochs of the task are cheaper than plain ones.
Claims: the error of text classifiers falls, most where labels are few.
Pitfalls: the task needs an epoch for each group of layers, or gradual_unfreeze.every in steps: a run that ends earlier
leaves the lowest untouched. With adapters there is little to forget, and less to gain. Phase 1 as under tapt.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from luthier.core import above
from luthier.strategies.recipes._texts import texts_of, texts_phase
from luthier.training.recipe import Desk, Phase, Phases, Plan, Recipe
from luthier.training.strategy import STRATEGIES


@STRATEGIES.register("ulmfit", family="recipes", paper="arXiv:1801.06146")
@dataclass(frozen=True, kw_only=True)
class ULMFiT(Recipe):
    """Universal language-model fine-tuning."""

    example: ClassVar[str] = "sample:smollm2-135m --data sample:trec6"
    uses: ClassVar[tuple[str, ...]] = ("llrd", "stlr", "gradual_unfreeze")
    tiny: ClassVar[dict[str, Any]] = {"texts_epochs": 1.0}

    texts_epochs: Annotated[float, "passes over the texts", above(0)] = 3.0
    texts_lr: Annotated[float | None, "peak rate on the texts; left out, the method's own", above(0)] = None
    texts_method: Annotated[str | None, "how the texts are learnt; left out, as the task"] = None

    def phases(self, plan: Plan, desk: Desk) -> Phases:
        task = plan.task(self.uses)
        desk.check(task)
        source = desk.write("texts", texts_of(desk, held_out_too=False))
        texts = texts_phase(
            plan, desk, source, ("llrd", "stlr"), method=self.texts_method, epochs=self.texts_epochs, lr=self.texts_lr
        )
        learnt = yield Phase(name="texts", spec=texts)
        yield Phase(name="task", spec=replace(task, model=learnt.merged()), made_of=("texts",))
