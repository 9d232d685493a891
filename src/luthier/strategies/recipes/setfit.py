"""Few labels: pairs of rows part the states by label, then a linear head learns on states that stay.

    1 pairs    strategy contrastive, by the run's method; the head rests
    2 head     method head_only, on the merged model of 1

Paper: arXiv:2209.11055. Sixteen epochs of the head and a body rate of 2e-5 (full fine-tuning) are quoted for its
library, whose pairs are drawn from all rows; here they are those inside a step (docs of contrastive).

Cost: two runs; the second is quick, since the trunk's features are kept.
Claims: with 8 rows a label near to what full fine-tuning reaches with many more.
Pitfalls: meant for encoders that compare sentences already (minilm, mpnet). The paper's pooled state is the mean; ours
is what the model's own head reads. Phase 1 learns all training rows and is not scored.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from luthier.core import ConfigError, above
from luthier.runs.spec import EvalSpec, OptimSpec
from luthier.surgery import compose
from luthier.training.recipe import Desk, Phase, Phases, Plan, Recipe
from luthier.training.strategy import STRATEGIES


@STRATEGIES.register("setfit", family="recipes", paper="arXiv:2209.11055")
@dataclass(frozen=True, kw_only=True)
class SetFit(Recipe):
    """Sentence-encoder fine-tuning on pairs, then a head."""

    tiny: ClassVar[dict[str, Any]] = {"head_epochs": 2.0, "pairs_epochs": 2.0}

    pairs_epochs: Annotated[float | None, "passes of phase 1; left out, as the spec says", above(0)] = None
    head_epochs: Annotated[float, "passes of the head", above(0)] = 16.0
    head_lr: Annotated[float | None, "peak rate of the head; left out, head_only's own", above(0)] = None

    def phases(self, plan: Plan, desk: Desk) -> Phases:
        spec, (learnt, _, columns) = plan.spec, desk.rows()
        if not compose.method(spec.method, dict(plan.of_method)).mergeable:
            raise ConfigError(
                f"setfit: {spec.method} does not merge into the weights, and the head learns on the merged model. Use "
                "a method that merges, such as lora (luthier methods --mergeable)."
            )
        pairs = plan.phase(
            ("contrastive",), also=None, eval=EvalSpec(),
            **({} if self.pairs_epochs is None else {"epochs": self.pairs_epochs, "steps": None}),
        )  # fmt: skip
        head = plan.task(
            (), method="head_only", settings={}, epochs=self.head_epochs, steps=None, optim=OptimSpec(lr=self.head_lr)
        )
        desk.check(pairs)
        desk.check(head)
        names: dict[str, Any] = columns.used()
        rows = [{name: row.get(name) for name in names.values()} for row in learnt.rows]
        data = plan.data(desk.write("pairs", rows), None, **names)
        done = yield Phase(name="pairs", spec=replace(pairs, data=data, batch=replace(pairs.batch, accumulate=1)))
        yield Phase(name="head", spec=replace(head, model=done.merged()), made_of=("pairs",))
