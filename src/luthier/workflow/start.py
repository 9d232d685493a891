"""`train` and `resume`: a run, or a recipe of several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.core import ConfigError
from luthier.runs.spec import RunSpec
from luthier.training.listener import Listener
from luthier.training.recipe import recipe_names
from luthier.workflow.call import spec_of
from luthier.workflow.finish import Result
from luthier.workflow.preparation import Prepared
from luthier.workflow.progress import listener_of
from luthier.workflow.recipes import is_recipe, last_of
from luthier.workflow.run import resume_run, train_run

__all__ = ["resume", "train"]


def train(
    model: RunSpec | str | Path,
    data: Any = None,
    *,
    progress: bool | None = None,
    listener: Listener | None = None,
    stop_at: int | None = None,
    prepared: Prepared | None = None,
    **given: Any,
) -> Result:
    """Fine-tune a model on rows, or as a spec says, into a new folder.

    >>> result = train("sample:minilm-l6", "reviews.csv", text="review", label="stars", steps=2, rank=4, out="runs/4")
    >>> result.record.spec["settings"]
    {'rank': 4}

    The same with every field in its place:

    >>> from luthier import DataSpec, RunSpec
    >>> rows = DataSpec(source="reviews.csv", text="review", label="stars")
    >>> spec = RunSpec(model="sample:minilm-l6", data=rows, steps=2, out="runs/one")
    >>> result = train(spec)
    >>> result.record.status, sorted(result.scores)
    ('finished', ['accuracy', 'loss', 'macro_f1', 'mcc'])

    Args:
        model: a folder, sample:NAME or a hub name; or a whole RunSpec, and no rows then.
        data: a file, sample:NAME or a hub name; or rows: a DataFrame, a data set of `datasets`, a list of dictionaries.
            Rows of memory are written to a file beside the run's folder, so that it can be resumed.
        progress: show what the run says, and a bar; left out, in a terminal and in a notebook.
        listener: is told what happens, in place of what is shown.
        given: fields of the run as the command line calls them, with `_` for `-`, and settings of the method.
        stop_at: make only so many optimiser steps, and leave the run unfinished; `resume` goes on.

    Raises:
        Any LuthierError: before work starts where it can be known; the folder keeps the last good checkpoint.
    """
    if isinstance(model, RunSpec):
        if data is not None or given:
            more = ", ".join(["data"] * (data is not None) + list(given))
            raise ConfigError(
                f"train: {more} beside a RunSpec. Set it in the spec, or give the model's name in its place."
            )
        spec = model
    else:
        spec = spec_of(model, data, given)
    listener = listener or listener_of(progress)
    if recipe_names(spec.strategy):
        return last_of(spec, stop_at=stop_at, listener=listener)
    return train_run(spec, listener, stop_at=stop_at, prepared=prepared)


def resume(
    path: Path | str,
    *,
    changed: dict[str, Any] | None = None,
    accept_drift: Sequence[str] = (),
    listener: Listener | None = None,
    stop_at: int | None = None,
) -> Result:
    """Go on with an unfinished run, to the bit where nothing has changed.

    >>> from luthier import DataSpec, RunSpec
    >>> rows = DataSpec(source="reviews.csv", text="review", label="stars")
    >>> spec = RunSpec(model="sample:minilm-l6", data=rows, steps=2, out="runs/stopped")
    >>> train(spec, stop_at=1).record.status
    'paused'
    >>> resume("runs/stopped").record.status
    'finished'

    Args:
        changed: dotted spec fields to change, such as {"optim.lr": 1e-4}; each is applied or refused, none ignored.
        accept_drift: of "data", "model", "tokenizer": go on although it has changed since; recorded in the folder.

    Raises:
        ConfigError: the run is finished, or a field may not change.
        IntegrityError: data, model or tokenizer have changed, or no checkpoint verifies.
        Locked: another process is at it.
    """
    listener, path = listener or Listener(), Path(path)
    if is_recipe(path):
        return last_of(path, stop_at=stop_at, listener=listener, changed=bool(changed or accept_drift))
    return resume_run(path, listener, changed=changed, accept_drift=accept_drift, stop_at=stop_at)
