"""What each method would hold on a model, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from luthier.core import ConfigError, LuthierError, UnknownName, near
from luthier.data.tasks import Task
from luthier.forecast import Device, Held, held
from luthier.runs.spec import RunSpec
from luthier.surgery import METHODS, Method, compose
from luthier.training.precision import Precision, choose_device, choose_precision
from luthier.workflow.outline import Outline

__all__ = ["Asked", "Plan", "PlanRow", "plan"]


@dataclass(frozen=True)
class Asked:
    """One method that is asked about: how it is called in the answer, its name, and settings of its own."""

    name: str
    method: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One method's forecast, or why it cannot be put on this model."""

    name: str
    method: str
    held: Held | None = None
    weights_in: str = ""
    fits: Literal["yes", "no", "?"] = "?"
    refused: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The forecasts of all methods that were asked about.

    Attributes:
        numbers: of the model, its head included.
        task: that the counts are for.
    """

    model: str
    kind: str
    numbers: int
    task: Task
    precision: str
    optimiser: str
    device: Device
    rows: tuple[PlanRow, ...]


def plan(outline: Outline, spec: RunSpec, asked: Iterable[Asked], device: Device, task: Task) -> Plan:
    """Count what each method holds on the model that `outline` tells of.

    Args:
        spec: of the runs: precision and optimiser; its settings hold for every method that has them.

    Raises:
        ModelError, AnatomyError: the configuration makes no model that can be read.
        UnknownName: no method that is asked about has a setting that `spec` gives.
    """
    wanted = list(asked)
    _refuse_unknown(spec, wanted)
    precision = _precision(spec, device)
    whole = outline.skeleton(task, torch.float32).anatomy
    rows = tuple(_row(one, outline, spec, device, task, precision) for one in wanted)
    return Plan(
        model=outline.name, kind=whole.model_type, numbers=whole.n_params, task=task, precision=precision.name,
        optimiser=spec.optim.name, device=device, rows=rows,
    )  # fmt: skip


def _precision(spec: RunSpec, device: Device) -> Precision:
    if device.here:
        return choose_precision(spec.precision, choose_device(spec.device if spec.device != "auto" else device.kind))
    if spec.precision != "auto":
        return Precision(spec.precision, "as asked")
    return Precision("bf16" if device.bf16 else "fp32", "as such a device multiplies fast")


def _row(
    one: Asked, outline: Outline, spec: RunSpec, device: Device, task: Task, precision: Precision
) -> PlanRow:  # fmt: skip
    try:
        method = compose.method(one.method, {**_own(one, spec.settings), **one.settings})
        dtype = weights_in(method, outline, task, precision)
        found = held(method, outline.skeleton(task, dtype), spec.optim.name)
    except LuthierError as error:
        return PlanRow(name=one.name, method=one.method, refused=str(error))
    # What is held whatever the batch: weights, trained numbers and moments stand together; gradients come and go.
    fits: Literal["no", "?"] = "no" if found.bytes - found.gradients > device.memory else "?"
    name = str(dtype).removeprefix("torch.")
    return PlanRow(name=one.name, method=one.method, held=found, weights_in=name, fits=fits)


def weights_in(method: Method, outline: Outline, task: Task, precision: Precision) -> torch.dtype:
    """The type that a run holds the base in: fp32 where most of it trains, else that of the forward pass."""
    anatomy = outline.skeleton(task, torch.float32).anatomy
    return torch.float32 if method.n_params(anatomy) > anatomy.n_params // 2 else precision.dtype


def _own(one: Asked, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of the settings for all, those that this method has."""
    if one.method.partition("+")[0] not in METHODS.names():
        return dict(settings)
    known = set(compose.setting_names(one.method))
    owners = {part.strip() for part in one.method.split("+")}
    found = {}
    for name, value in settings.items():
        owner, dot, field = name.rpartition(".")
        if (dot and owner in owners) or (not dot and field in known):
            found[name] = value
    return found


def _refuse_unknown(spec: RunSpec, wanted: list[Asked]) -> None:
    if not wanted:
        raise ConfigError("no method is named. Write --method all, or names with commas between: lora,ia3.")
    used = {name for one in wanted for name in _own(one, spec.settings)}
    unused = sorted(set(spec.settings) - used)
    if unused:
        known = sorted({n for one in wanted for n in compose.setting_names(one.method)})
        raise UnknownName(
            f"no method that is asked about has a setting {unused[0]!r}.{near(unused[0], known)} "
            "`luthier methods NAME` lists a method's settings."
        )
