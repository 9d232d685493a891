"""Cross-validation: k ordinary runs, each scored on the fold that it has not seen, then one on all rows.

OUT/cv.json       the spec and the number of folds; in the end the scores too
OUT/fold-1 ...    the runs of the folds
OUT/final         the run on all rows, which is the one to use; it has learnt them all, so it has no score of its own
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from luthier.core import ConfigError, Interrupted, build, plain
from luthier.data.load_data import load_data
from luthier.data.tasks import Task
from luthier.runs import durable
from luthier.runs.spec import MOST_FOLDS, RunSpec
from luthier.surgery import read_tuning
from luthier.training.listener import Listener
from luthier.training.recipe import refuse_recipe
from luthier.workflow.load_model import find_model, load_config
from luthier.workflow.run import default_out, run_to_end

__all__ = ["FILE", "CrossValidation", "cross_validate", "interval", "is_cross_validation"]

FILE = "cv.json"
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093,
)  # fmt: skip
"""Student's t at 97.5 %, for 1 degree of freedom and more."""


@dataclass(frozen=True, kw_only=True)
class CrossValidation:
    """What k folds and the run on all rows gave."""

    path: Path
    folds: tuple[dict[str, float], ...]
    """the scores of each fold"""
    mean: dict[str, float]
    """of each score over the folds; the task's own first"""
    intervals: dict[str, tuple[float, float]]
    """95 % interval of each mean, by Student's t over the folds"""
    classes: tuple[dict[str, Any], ...] = ()
    """class by class over all folds: name, rows, found, precision"""

    @property
    def final(self) -> Path:
        """The run on all rows."""
        return self.path / "final"


def is_cross_validation(path: Path | str) -> bool:
    """Whether a folder is that of a cross-validation."""
    return (Path(path) / FILE).is_file()


def cross_validate(
    spec: RunSpec | Path | str, folds: int | None = None, *, listener_of: Callable[[str], Listener] | None = None
) -> CrossValidation:
    """Train and score each fold, then train on all rows. Called again, it goes on where it was stopped.

    Folds that are finished are not run again.

    Args:
        spec: of each run; or the folder of a cross-validation to go on with.
        folds: how many, 2 to 20.
        listener_of: makes, from a name such as "fold 2/5", what is told of that run.

    Raises:
        ConfigError: the folder holds something else, or rows that are to be scored are named beside the folds.
        Any LuthierError: of a run.
    """
    if isinstance(spec, RunSpec):
        path, folds = _begin(spec, folds or 5)
    else:
        path = Path(spec)
        kept = json.loads((path / FILE).read_text(encoding="utf-8"))
        spec, folds = RunSpec.from_plain(kept["spec"], where=f"{path}/{FILE}"), int(kept["folds"])
    runs = [(f"fold {i}/{folds}", _fold(spec, path, i, folds)) for i in range(1, folds + 1)]
    whole = replace(spec, data=replace(spec.data, fold=None, test_share=0.0), out=str(path / "final"))
    for name, each in [*runs, ("all rows", whole)]:
        listener = Listener() if listener_of is None else listener_of(name)
        try:
            _run(each, listener, name)
        except Interrupted as stopped:
            raise Interrupted(
                f"stopped in {name}; nothing is lost. Go on with `luthier resume {path}`.", stopped.exit_code - 128
            ) from None
    found = _summary(path, folds)
    durable.write_json(
        path / FILE,
        {"spec": plain(spec), "folds": folds, "scores": [*found.folds], "mean": found.mean, "final": "final"},
    )
    return found


def _begin(spec: RunSpec, folds: int) -> tuple[Path, int]:
    refuse_recipe(spec, "each fold")
    if not 2 <= folds <= MOST_FOLDS:
        raise ConfigError(f"cv: {folds} folds; there can be 2 to {MOST_FOLDS}.")
    if spec.data.test is not None or spec.data.fold is not None:
        named = "test" if spec.data.test is not None else "fold"
        raise ConfigError(f"cv: each fold is scored on rows of the source; leave data.{named} out.")
    path = Path(spec.out) if spec.out is not None else default_out(spec)
    if is_cross_validation(path):
        kept = json.loads((path / FILE).read_text(encoding="utf-8"))
        old = RunSpec.from_plain(kept["spec"], where=f"{path}/{FILE}")
        if replace(old, out=None) != replace(spec, out=None) or int(kept["folds"]) != folds:
            raise ConfigError(
                f"{path}: holds a cross-validation with other settings. Go on with it as it was (luthier resume {path})"
                ", or name another folder with --out."
            )
        return path, folds
    if path.exists():
        raise ConfigError(f"{path}: is there already. Name a folder that does not exist with --out.")
    config = load_config(find_model(spec.model))
    for i in range(1, folds + 1):  # what cannot be is refused before the first fold has trained
        load_data(_fold(spec, path, i, folds).data, spec.task, config)
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.make_folder(path)
    durable.write_json(path / FILE, {"spec": plain(spec), "folds": folds})
    return path, folds


def _fold(spec: RunSpec, path: Path, i: int, folds: int) -> RunSpec:
    return replace(spec, data=replace(spec.data, fold=f"{i}/{folds}"), out=str(path / f"fold-{i}"))


def _run(spec: RunSpec, listener: Listener, name: str) -> None:
    if run_to_end(spec, listener) is None:
        listener.say(f"{name}: is finished in {spec.out}, and not run again")


def _summary(path: Path, folds: int) -> CrossValidation:
    homes = [path / f"fold-{i}" for i in range(1, folds + 1)]
    scores = [json.loads((home / "scores.json").read_text(encoding="utf-8")) for home in homes]
    each = tuple({name: float(value) for name, value in found.items()} for found in scores)
    task = dict(read_tuning(homes[0] / "tuning")["task"])
    task.pop("columns")
    names = [name for name in build(Task, task, f"{homes[0]}/tuning").metrics if all(name in found for found in each)]
    values = {name: [found[name] for found in each] for name in names}
    return CrossValidation(
        path=path,
        folds=each,
        mean={name: float(np.mean(values[name])) for name in names},
        intervals={name: interval(values[name]) for name in names},
        classes=_classes([home / "quality.json" for home in homes]),
    )


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of a few values, by Student's t.

    >>> [round(v, 3) for v in interval([0.8, 0.82, 0.86, 0.9, 0.82])]
    [0.79, 0.89]
    """
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))
    half = STUDENT[len(values) - 2] * spread / math.sqrt(len(values))
    return mean - half, mean + half


def _classes(files: Sequence[Path]) -> tuple[dict[str, Any], ...]:
    """Class by class over all folds: each row was scored once."""
    if not all(file.exists() for file in files):
        return ()
    total: dict[str, dict[str, float]] = {}
    for file in files:
        for one in json.loads(file.read_text(encoding="utf-8")).get("classes", []):
            at = total.setdefault(one["name"], {"rows": 0, "answered": 0, "hit": 0})
            at["rows"] += one["rows"]
            at["answered"] += one["answered"]
            at["hit"] += one["recall"] * one["rows"]
    return tuple(
        {
            "name": name,
            "rows": int(at["rows"]),
            "found": at["hit"] / at["rows"] if at["rows"] else 0.0,
            "precision": at["hit"] / at["answered"] if at["answered"] else 0.0,
        }
        for name, at in sorted(total.items(), key=lambda item: -item[1]["rows"])
    )
