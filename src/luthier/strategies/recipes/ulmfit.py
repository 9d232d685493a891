"""The model first learns the language of the task's texts, then the task from the top down.

    1 general  its own kind of pre-training on general texts: only with --also general=FILE
    2 texts    the same on the rows' inputs, from the merged model of 1, with llrd and stlr
    3 task     the task, from the merged model of 2, with llrd, stlr and gradual_unfreeze

The first of the paper's three phases is how its model came to be. A pre-trained model has it behind itself, so without
general texts there are two. Settings of the three strategies are given as theirs: llrd.decay, stlr.ratio,
gradual_unfreeze.every.

Paper: arXiv:1801.06146. A rate divided by 2.6 from group to group is quoted for its model of few layers (llrd.decay =
.385). The head on the last, the largest and the mean state of its LSTM is left out: the model's own head stands.

Cost: a run on the texts before the task's own, and one on general texts; the first epochs of the task are cheaper than
plain ones.
Claims: the error of text classifiers falls, most where labels are few.
Pitfalls: the task needs an epoch for each group of layers, or gradual_unfreeze.every in steps: a run that ends earlier
leaves the lowest untouched. With adapters there is little to forget, and less to gain. Texts are learnt as under tapt.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from luthier.core import above
from luthier.data.sets import named_sources
from luthier.strategies.recipes._texts import texts_of, texts_phase
from luthier.training.recipe import Desk, Phase, Phases, Plan, Recipe
from luthier.training.strategy import STRATEGIES

GENERAL = "general"
"""The further set of general texts, and its phase."""


@STRATEGIES.register("ulmfit", family="recipes", paper="arXiv:1801.06146")
@dataclass(frozen=True, kw_only=True)
class ULMFiT(Recipe):
    """Universal language-model fine-tuning."""

    example: ClassVar[str] = "sample:smollm2-135m --data sample:trec6"
    uses: ClassVar[tuple[str, ...]] = ("llrd", "stlr", "gradual_unfreeze")
    tiny: ClassVar[dict[str, Any]] = {"texts_epochs": 1.0}

    texts_epochs: Annotated[float, "passes over the texts", above(0)] = 3.0
    texts_lr: Annotated[float | None, "peak rate on all texts; left out, the method's own", above(0)] = None
    texts_method: Annotated[str | None, "how all texts are learnt; left out, as the task"] = None
    general_epochs: Annotated[float, "passes over the general texts, where there are any", above(0)] = 1.0

    def phases(self, plan: Plan, desk: Desk) -> Phases:
        further = named_sources(plan.spec.also)
        general = further.pop(GENERAL, None)
        task = plan.task(self.uses, also=tuple(f"{name}={source}" for name, source in further.items()) or None)
        desk.check(task)
        how: dict[str, Any] = {"method": self.texts_method, "lr": self.texts_lr}
        source = desk.write("texts", texts_of(desk, held_out_too=False))
        texts = texts_phase(plan, desk, source, ("llrd", "stlr"), epochs=self.texts_epochs, **how)
        made_of: tuple[str, ...] = ()
        if general is not None:
            first = texts_phase(plan, desk, general, (), epochs=self.general_epochs, **how)
            desk.check(first)
            begun = yield Phase(name=GENERAL, spec=first)
            texts, made_of = replace(texts, model=begun.merged()), (GENERAL,)
        learnt = yield Phase(name="texts", spec=texts, made_of=made_of)
        yield Phase(name="task", spec=replace(task, model=learnt.merged()), made_of=("texts",))
