"""The model first goes on with its pre-training on the task's own texts, then learns the task.

    1 texts    masked words (encoder), next words (decoder) or lost spans (T5) of the rows' inputs
    2 task     the task, from the merged model of 1

Inputs alone are read in phase 1, and held-out rows not at all unless `transductive`. A pair's texts stand one after the
other, parted by a blank.

Paper: arXiv:2004.10964 (task-adaptive pre-training). 100 epochs, batches of 256 and a rate of 1e-4 are quoted for it,
for full fine-tuning; the default here is fewer epochs, at the method's own rate, which is our choice.

Cost: a run on the texts before the task's own.
Claims: better where the task's texts are unlike those of pre-training.
Pitfalls: the head of words is dropped after phase 1, and with it what a masked language model of BERT never had: its
pooler is new in phase 2. With few texts and many epochs the model learns them by heart: the perplexity of held-out
texts in phase 1 says so.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from luthier.core import above
from luthier.strategies.recipes._texts import texts_of, texts_phase
from luthier.training.recipe import Desk, Phase, Phases, Plan, Recipe
from luthier.training.strategy import STRATEGIES


@STRATEGIES.register("tapt", family="recipes", paper="arXiv:2004.10964")
@dataclass(frozen=True, kw_only=True)
class TAPT(Recipe):
    """Task-adaptive pre-training."""

    example: ClassVar[str] = "sample:smollm2-135m --data sample:trec6"
    tiny: ClassVar[dict[str, Any]] = {"texts_epochs": 1.0}

    texts_epochs: Annotated[float, "passes over the texts", above(0)] = 10.0
    texts_lr: Annotated[float | None, "peak rate on the texts; left out, the method's own", above(0)] = None
    texts_method: Annotated[str | None, "how the texts are learnt; left out, as the task"] = None
    transductive: Annotated[bool, "also read the texts of the held-out rows, without their labels"] = False

    def phases(self, plan: Plan, desk: Desk) -> Phases:
        task = plan.task()
        desk.check(task)
        source = desk.write("texts", texts_of(desk, held_out_too=self.transductive))
        texts = texts_phase(
            plan, desk, source, (), method=self.texts_method, epochs=self.texts_epochs, lr=self.texts_lr
        )
        learnt = yield Phase(name="texts", spec=texts)
        yield Phase(name="task", spec=replace(task, model=learnt.merged()), made_of=("texts",))
