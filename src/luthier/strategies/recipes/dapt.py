"""The model first goes on with its pre-training on texts of the domain, then learns the task.

    1 texts    masked words (encoder), next words (decoder) or lost spans (T5) of the corpus
    2 task     the task, from the merged model of 1

Phase 1 alone is a plain run: `luthier train MODEL --data corpus.txt --task masked_lm`. The rows of the task have no
part in it.

Paper: arXiv:2004.10964 (domain-adaptive pre-training). 12,500 steps of 2048 texts of 512 tokens at a rate of 5e-4 are
quoted for it; one pass at the method's own rate is our default.

Cost: a run on the corpus before the task's own.
Claims: better on tasks of a domain that is far from the texts of pre-training.
Pitfalls: what the model knew of other texts fades, and nothing here measures that: score general texts too (luthier
evaluate OUT/1-texts --data general.txt). Texts are rows of their own, not packed to full length as in the paper.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from luthier.core import ConfigError, above
from luthier.strategies.recipes._texts import texts_phase
from luthier.training.recipe import Desk, Phase, Phases, Plan, Recipe
from luthier.training.strategy import STRATEGIES


@STRATEGIES.register("dapt", family="recipes", paper="arXiv:2004.10964")
@dataclass(frozen=True, kw_only=True)
class DAPT(Recipe):
    """Domain-adaptive pre-training."""

    example: ClassVar[str] = "sample:smollm2-135m --data sample:trec6 --set corpus=TEXTS.txt"
    tiny: ClassVar[dict[str, Any]] = {"texts_epochs": 1.0}

    corpus: Annotated[str | None, "texts of the domain: a file with a column text, or a folder of .txt"] = None
    texts_epochs: Annotated[float, "passes over the texts", above(0)] = 1.0
    texts_lr: Annotated[float | None, "peak rate on the texts; left out, the method's own", above(0)] = None
    texts_method: Annotated[str | None, "how the texts are learnt; left out, as the task"] = None

    def phases(self, plan: Plan, desk: Desk) -> Phases:
        if self.corpus is None:
            raise ConfigError("dapt needs texts of the domain: --set dapt.corpus=FILE. On the task's own: tapt.")
        task = plan.task()
        texts = texts_phase(
            plan, desk, self.corpus, (), method=self.texts_method, epochs=self.texts_epochs, lr=self.texts_lr
        )
        desk.check(texts)
        desk.check(task)
        learnt = yield Phase(name="texts", spec=texts)
        yield Phase(name="task", spec=replace(task, model=learnt.merged()), made_of=("texts",))
