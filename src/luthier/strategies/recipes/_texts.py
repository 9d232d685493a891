"""A phase that goes on with a model's own kind of pre-training, on texts alone."""

from collections.abc import Sequence
from typing import Any

from luthier.core import ConfigError
from luthier.runs.spec import DataSpec, EvalSpec, OptimSpec, RunSpec
from luthier.surgery import compose
from luthier.training.recipe import Desk, Plan

__all__ = ["texts_of", "texts_phase"]

TASKS = {"encoder": "masked_lm", "decoder": "causal_lm", "both": "span_corruption"}
HELD_OUT = 0.05
"""Share of the texts that perplexity is measured on."""


def texts_of(desk: Desk, *, held_out_too: bool) -> list[dict[str, str]]:
    """The inputs of the task's rows to learn from as texts; of a pair, both, one after the other.

    Raises:
        ConfigError: rows that are no texts with labels.
    """
    learnt, held, columns = desk.rows()
    if columns.shape != "labelled" or columns.text is None:
        raise ConfigError(
            "the recipe reads the texts of rows that have a text and a label, and these have none. Learn a language "
            "task on them as it is (--task causal_lm, or seq2seq)."
        )
    names = [name for name in (columns.text, columns.pair) if name is not None]
    rows = [*learnt.rows, *(held.rows if held_out_too and held is not None else [])]
    texts = [" ".join(str(row[name]) for name in names if row.get(name)) for row in rows]
    return [{"text": text} for text in texts if text.strip()]


def texts_phase(
    plan: Plan, desk: Desk, source: str, words: Sequence[str], *, method: str | None, epochs: float, lr: float | None,
    **changes: Any,
) -> RunSpec:  # fmt: skip
    """The run on texts, whose result can be merged.

    Args:
        method: how it learns; None, as the task itself.

    Raises:
        ConfigError: a method whose numbers cannot be put into the weights.
    """
    name = method or plan.spec.method
    made = compose.method(name, dict(plan.of_method) if name == plan.spec.method else {})
    if not made.mergeable:
        raise ConfigError(
            f"{plan.recipe.name}: {name} does not merge into the weights, and the next phase starts from the merged "
            "model of this one. Let the texts be learnt otherwise: texts_method=lora, or texts_method=full."
        )
    given = {
        "method": name, "task": TASKS[desk.kind], "epochs": epochs, "steps": None, "also": None, "sources": None,
        "data": DataSpec(
            source=source, text="text", test_share=HELD_OUT, split_seed=plan.spec.data.split_seed,
            **plan.spec.data.stored(source),
        ),
        "optim": OptimSpec(lr=lr), "eval": EvalSpec(), **changes,
    }  # fmt: skip
    return plan.phase(words, **given)
