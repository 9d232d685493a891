"""Rows of the task are few and unlike anything labelled: what a model of another task says of more of them helps.

    1 teacher    the source task, on rows with its labels
    2 student    the source task again, and what the teacher says of unlabelled rows of the new task, in two views each
    3 fit        the new task's labels: a head on the merged model of 2

`--also source=FILE` are labelled rows of any other task, `--also unlabelled=FILE` rows of the new one without labels.
Phase 2 is the strategy kd_views, whose settings are given as its own: kd_views.contrast = 0 leaves the second part of
its loss out. The new task's labels are read in phase 3 alone.

Paper: arXiv:2010.07734. Batches of 256 and a decay of 1e-4 are quoted for its code.

Cost: two runs on the source rows, the second with more rows a step, then a head.
Claims: few labels of a far domain go further than on a model of the source task alone.
Pitfalls: meant for a source task that says something of the new rows. Here the student starts from the model itself.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from luthier.core import ConfigError, above
from luthier.data.columns import find_columns, label_name
from luthier.data.rows import load_rows
from luthier.data.sets import named_sources
from luthier.runs.spec import DataSpec, EvalSpec, OptimSpec
from luthier.surgery import compose
from luthier.training.recipe import Desk, Phase, Phases, Plan, Recipe
from luthier.training.strategy import STRATEGIES


@STRATEGIES.register("startup", family="recipes", paper="arXiv:2010.07734")
@dataclass(frozen=True, kw_only=True)
class Startup(Recipe):
    """Self-training across domains."""

    uses: ClassVar[tuple[str, ...]] = ("kd_views",)
    sets: ClassVar[tuple[str, ...]] = ("source", "unlabelled")
    tiny: ClassVar[dict[str, Any]] = {"head_epochs": 2.0}

    head_epochs: Annotated[float, "passes of the head over the new task's rows", above(0)] = 16.0
    head_lr: Annotated[float | None, "peak rate of the head; left out, head_only's own", above(0)] = None

    def phases(self, plan: Plan, desk: Desk) -> Phases:
        spec, (_, _, columns) = plan.spec, desk.rows()
        if columns.shape != "labelled" or columns.text is None:
            raise ConfigError("startup learns labels of texts, and these rows have none. Name rows with a label.")
        if not compose.method(spec.method, dict(plan.of_method)).mergeable:
            raise ConfigError(
                f"startup: {spec.method} does not merge into the weights, and the head learns on the merged model. Use "
                "a method that merges, such as lora (luthier methods --mergeable)."
            )
        source = named_sources(spec.also)["source"]
        table, _ = load_rows(source, **spec.data.stored(source))
        theirs = find_columns(table, DataSpec(source=source), "classification")
        if (theirs.pair is None) != (columns.pair is None):
            raise ConfigError(f"startup: rows of {source} and of the new task must both have one text, or both two.")
        named: dict[str, Any] = spec.data.stored(source) | {
            role: name for role, name in theirs.used().items() if role in ("text", "pair", "label")
        }
        data = DataSpec(source=source, split_seed=spec.data.split_seed, **named)
        first = plan.phase((), data=data, also=None, eval=EvalSpec(), task="classification")
        fit = plan.task((), method="head_only", settings={}, epochs=self.head_epochs, steps=None, also=None)
        fit = replace(fit, optim=OptimSpec(lr=self.head_lr))
        desk.check(first)
        desk.check(fit)
        any_label = label_name(table.rows[0][theirs.label or ""])
        rows = [
            {theirs.text: row[columns.text], theirs.label: any_label}
            | ({theirs.pair: row[columns.pair or ""]} if theirs.pair else {})
            for row in desk.further("unlabelled").rows
        ]
        others = desk.write("unlabelled", [{str(name): value for name, value in row.items()} for row in rows])
        teacher = yield Phase(name="teacher", spec=first)
        student = plan.phase(
            ("kd_views",), data=data, also=(f"unlabelled={others}",), eval=EvalSpec(), task="classification",
            batch=replace(spec.batch, accumulate=1),
        )  # fmt: skip
        student = replace(student, settings=student.settings | {"kd_views.teacher": str(teacher.path)})
        done = yield Phase(name="student", spec=student, made_of=("teacher",))
        yield Phase(name="fit", spec=replace(fit, model=done.merged()), made_of=("student",))
