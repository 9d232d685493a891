"""What a run chooses where nobody did: how long to train, when to stop, and how fast.

A set of few rows needs more passes than a large one: what it takes to learn is steps. So a run whose length nobody
gave makes at least FEWEST_STEPS steps, and where rows suffice to spare some, it stops early by them. Whatever is
chosen is written into the spec of the run's folder, where it holds for every resumption.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from luthier.anatomy import Anatomy, is_projection
from luthier.core import human_count, plain
from luthier.data.tasks import Task
from luthier.runs.spec import DEFAULT_EPOCHS, OptimSpec, RunSpec
from luthier.surgery import Method, PerSite, compose
from luthier.training.strategy import split_settings
from luthier.workflow.held import store_of

__all__ = ["Budget", "budget", "choose", "length_of", "reopened", "scaled_rates", "sentence", "sizes", "too_wide"]

FEWEST_STEPS = 400
MOST_EPOCHS = 40.0
"""Of ever fewer rows, more passes teach nothing new."""
ENOUGH_TO_SPARE = 500
"""Training rows from which on some are held out to stop by: a share of fewer rows tells too little."""
EVALUATIONS = 10
PATIENCE = 4
"""Evaluations of the EVALUATIONS of a whole run."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long to train.

    Attributes:
        every: steps between evaluations; 0 where the run does not stop early.
    """

    epochs: float
    every: int


def budget(rows: int, size: int, *, share: float) -> Budget:
    """The length of a run that learns a new head.

    >>> budget(600, 16, share=0.1)
    Budget(epochs=12.0, every=41)
    >>> budget(100, 16, share=0.1), budget(20_000, 16, share=0.1).epochs
    (Budget(epochs=40.0, every=0), 3.0)

    Args:
        rows: all rows to learn from.
        size: rows of a step.
        share: of the rows that may be held out to stop by; 0 for none.
    """
    spares = share > 0 and rows >= ENOUGH_TO_SPARE
    learnt = rows - round(share * rows) if spares else rows
    per_epoch = max(1, -(-learnt // size))
    epochs = min(MOST_EPOCHS, max(DEFAULT_EPOCHS, float(math.ceil(FEWEST_STEPS / per_epoch))))
    return Budget(epochs=epochs, every=max(per_epoch, math.ceil(epochs * per_epoch / EVALUATIONS)) if spares else 0)


def choose(spec: RunSpec, task: Task, method: Method, rows: int) -> RunSpec:
    """The spec with a value in every field that was left open.

    Args:
        rows: all rows to learn from, before some are held out to select by.
    """
    values = plain(spec)
    new_head = task.n_outputs is not None
    found = length_of(spec, new_head, rows)
    if spec.optim.lr is None:
        found["optim.lr"] = method.default_lr
        if spec.optim.head_lr is None and new_head:
            found["optim.head_lr"] = method.default_head_lr or method.default_lr
    if spec.store is None and (wanted := store_of(None, method)) is not None:
        found["store"] = wanted
    for name, value in found.items():
        part, _, last = name.rpartition(".")
        (values[part] if part else values)[last] = value
    # What an earlier run chose, as the spec of its folder says, and what is chosen now.
    values["chosen"] = [*dict.fromkeys([*spec.chosen, *found])]
    return RunSpec.from_plain(values)


def length_of(spec: RunSpec, new_head: bool, rows: int) -> dict[str, Any]:
    """How long a run trains and when it stops, where nobody said: fields of its spec by their dotted names."""
    if spec.epochs is not None or spec.steps is not None:
        return {}
    stops = spec.eval.every is None and not spec.eval.holds_out
    length = budget(rows, spec.batch.size, share=spec.eval.share if stops else 0.0)
    if not new_head:
        return {"epochs": DEFAULT_EPOCHS}
    stopping = {"eval.every": length.every, "eval.best": True, "eval.patience": PATIENCE} if length.every else {}
    return {"epochs": length.epochs, **stopping}


def scaled_rates(spec: RunSpec, factor: float) -> OptimSpec:
    """The rates of a run times `factor`, a new head's too; where the spec has none, the method's own."""
    _, settings = split_settings(spec.strategy, spec.settings, compose.setting_names(spec.method))
    method = compose.method(spec.method, settings)
    lr, head = spec.optim.lr, spec.optim.head_lr
    if lr is None and head is None and spec.data.template is None:
        head = method.default_head_lr or method.default_lr
    scaled = factor * (lr or method.default_lr)
    return replace(spec.optim, lr=scaled, head_lr=None if head is None else factor * head)


def sentence(spec: RunSpec, rows: int) -> str:
    """What was chosen, in one line.

    Args:
        rows: that are learnt from in each epoch.
    """
    per_epoch = -(-rows // spec.batch.size)
    total = spec.total_steps(per_epoch)
    said = []
    if "epochs" in spec.chosen and spec.epochs is not None:
        said.append(f"about {total} steps: {spec.epochs:g} epochs of {rows} rows")
        if "eval.patience" in spec.chosen:
            said.append("stops early")
    if "optim.lr" in spec.chosen and spec.optim.lr is not None:
        rates = f"learning rate {spec.optim.lr:g}"
        if spec.optim.head_lr not in (None, spec.optim.lr):
            rates += f", {spec.optim.head_lr:g} for the head"
        said.append(rates)
    return ", ".join(said)


def sizes(spec: RunSpec, rows: int) -> list[str]:
    """What sizes of a step come to that the rows cannot fill.

    Args:
        rows: that are learnt from in each epoch.
    """
    said = []
    if spec.batch.size > rows:
        said.append(f"batch.size = {spec.batch.size} is more than the {rows} rows: each step takes all of them")
    if spec.batch.accumulate > (step := min(spec.batch.size, rows)):
        said.append(
            f"batch.accumulate = {spec.batch.accumulate} is more than the {step} rows of a step: it is cut into "
            f"{step} micro-batches, of one row each"
        )
    return said


def too_wide(method: Method, anatomy: Anatomy) -> list[str]:
    """Which parts train more at a layer than two factors of its full rank have, such as LoRA of a rank beyond it."""
    said = []
    for part in method.parts():
        if not isinstance(part, PerSite):
            continue
        here = part.on(anatomy)
        sites = [site for site in part.places(anatomy) if is_projection(site)]
        over = [s for s in sites if here.params_at(s) > min(s.d_in, s.d_out) * (s.d_in + s.d_out)]
        if over:
            worst = max(over, key=here.params_at)
            said.append(
                f"{part.name} trains {human_count(here.params_at(worst))} numbers at {worst.key}, whose weight of "
                f"{worst.d_out} x {worst.d_in} has {human_count(worst.d_in * worst.d_out)}: more than any change of it "
                f"needs{f'; so at {len(over)} places of {len(sites)}' if len(over) > 1 else ''}"
            )
    return said


def reopened(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A run's spec, for another run with some fields changed: what was chosen and hangs on them is open again.

    Args:
        values: the plain values of the spec of a run.
        given: dotted field -> its new value.
    """
    found = {name: dict(v) if isinstance(v, Mapping) else v for name, v in values.items()}
    chosen = set(found.get("chosen", ()))
    length = {"epochs", "eval.every", "eval.best", "eval.patience"}
    rates = {"optim.lr", "optim.head_lr"}
    again: set[str] = set()
    if {"epochs", "steps", "batch.size"} & set(given) or any(name.startswith("data.") for name in given):
        again |= length
    if {"method", "optim.lr"} & set(given):
        again |= rates
    if "method" in given:
        again.add("store")
    for name in sorted(again & chosen):
        part, _, last = name.rpartition(".")
        (found[part] if part else found).pop(last, None)
    found["chosen"] = sorted(chosen - again - set(given))
    return found
