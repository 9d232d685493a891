"""What several runs have learnt of one base, added up: a task's difference beside a language's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.core import CannotMerge, ConfigError
from luthier.surgery import answerers, merging
from luthier.workflow.prediction import Predictor

__all__ = ["add_runs", "learnt"]


@torch.no_grad()
def learnt(predictor: Predictor) -> dict[str, Tensor]:
    """What a run's tuning changes of its base's weights, by name, in float32. A new head is left out.

    Raises:
        CannotMerge: its method makes no weights, or makes other answers of the model's outputs.
    """
    path, tuned = predictor.path, predictor.tuned
    edited = tuned.edited
    try:
        merging.check(edited)
    except CannotMerge as error:
        raise CannotMerge(f"{path} ({predictor.spec.method}): {error}") from None
    if others := [part.name for part in answerers(tuned)]:
        raise CannotMerge(
            f"{path}: what {' and '.join(others)} makes of the model's outputs cannot be added to weights."
        )
    heads = set(tuned.anatomy.head_tensors)
    moved = {id(u.parameter): u for tuning in edited.active() for u in tuning.unfrozen.values()}
    found = {at: u.parameter.detach().float() - u.original.float() for at, u in moved.items()}
    for tensor, value in merging.merged_tensors(edited):
        # Of a tensor that trains in place the merged value holds that change already.
        start = moved[id(tensor)].original if id(tensor) in moved else tensor.detach()
        found[id(tensor)] = value.detach() - start.float()
    plain = tuned.detach()  # tensors have the names of the model again
    return {name: found[id(p)] for name, p in plain.named_parameters() if id(p) in found and name not in heads}


@torch.no_grad()
def add_runs(model: Any, first: Predictor, others: Sequence[Path]) -> tuple[str, ...]:
    """Add to the merged model of a run, in float32, what each of `others` has learnt.

    Returns:
        what is to be said of it: parts that another run has changed and this model does not have, such as the head of
        words beside a classifier. They are left out.

    Raises:
        ConfigError: a run of another base or store, the same run twice.
        CannotMerge: see `learnt`.
    """
    parameters = dict(model.named_parameters())
    known = {first.path.resolve()}
    said = []
    for other in others:
        if other.resolve() in known:
            raise ConfigError(f"{other}: is named twice. Name each run once.")
        known.add(other.resolve())
        predictor = Predictor(other, dtype=torch.float32, decode=True)
        if (predictor.source.digest, predictor.spec.codes) != (first.source.digest, first.spec.codes):
            raise ConfigError(
                f"{other}: is a tuning of {predictor.spec.model}, not of the base of {first.path}, {first.spec.model}. "
                "Only differences from one base add up."
            )
        found = learnt(predictor)
        lacking = [name for name in found if name not in parameters]
        if len(lacking) == len(found):
            raise CannotMerge(f"{other}: nothing of what it has learnt is in the model of {first.path}. Leave it out.")
        if lacking:
            more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
            said.append(f"of {other.name} left out, since this model has none: {', '.join(lacking[:3])}{more}")
        for name, difference in found.items():
            if name in parameters:
                parameters[name].add_(difference)
    return tuple(said)
