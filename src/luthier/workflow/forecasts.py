"""What a run says of itself before its first step, and what cannot fit; and what came of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from luthier.core import IntegrityError, LuthierError, ResourceError, human_bytes
from luthier.forecast import Device, Pair, Rates, Steps, TimePair, held, measured_rates
from luthier.forecast.growth import text_of
from luthier.forecast.times import How
from luthier.runs import Record
from luthier.runs.spec import RunSpec
from luthier.surgery import METHODS, compose, read_tuning
from luthier.training.precision import Precision
from luthier.training.strategy import split_settings
from luthier.workflow.durations import loading_of, probed, work_of_step
from luthier.workflow.lengths import assumed_steps
from luthier.workflow.load_model import load_config
from luthier.workflow.outline import Outline, outline_of
from luthier.workflow.plan import Remedy, activations_of, packed_here, remedies_here, task_of_rows, weights_in
from luthier.workflow.preparation import Prepared

__all__ = ["Told", "forecast_of", "pairs_of", "refuse_what_cannot_fit", "remedies_of", "timing_of", "told_of", "widest"]

WORTH_PROBING = 1.0  # seconds that steps took together: of shorter runs the rates are not measured
QUICK = 0.05  # of the time of the steps, for that probe; two seconds at most
_RATES = {"products": "rate_products", "moved": "rate_moved", "calls": "rate_calls"}
_PARTS = ("weights", "trained", "gradients", "optimiser", "packed")


def forecast_of(prepared: Prepared) -> dict[str, int]:
    """Bytes by part, counted from the model's structure; empty where a method cannot be counted so.

    `packed` is what this machine makes of it; all other parts are the same on each.
    """
    if prepared.sources or prepared.others:
        return {}  # what a saved tuning or another model adds is no part of the structure
    outline, spec = _outline(prepared), prepared.spec
    found = held(prepared.method, outline.skeleton(prepared.task, prepared.weights, spec.codes), spec.optim.name)
    return {
        "weights": found.weights, "trained": found.numbers, "gradients": found.gradients, "optimiser": found.moments,
        "packed": packed_here(found, spec) if prepared.device.type == "cpu" else 0,
    }  # fmt: skip


def _outline(prepared: Prepared) -> Outline:
    source = prepared.source
    halves = set(source.folder.dtypes.values()) == {"BF16"}
    return Outline(source.name, load_config(source), halves, True, frozenset(source.folder.shapes))


def timing_of(prepared: Prepared, loop: Any) -> dict[str, float]:
    """What the steps of a run took, and how fast the machine was right after them.

    Empty where outputs of frozen layers were kept from one epoch to the next: such steps are no measure of others.
    """
    told: dict[str, float] = loop.clock.told() if loop.objective.features is None else {}
    if not told or told["seconds"] * told["steps"] < WORTH_PROBING:
        return told
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[prepared.precision.name]
    rows, width = round(told["tokens"] / told["pieces"]), int(text_of(loop.tuned.model.config).hidden_size)
    rates = measured_rates(
        prepared.device, dtype, rows=rows, width=width, seconds=min(2.0, QUICK * told["seconds"] * told["steps"])
    )
    return told | {name: getattr(rates, field) for field, name in _RATES.items()}


def refuse_what_cannot_fit(prepared: Prepared) -> None:
    """Refuse a run whose weights, trained numbers and moments alone are more than the device has.

    Raises:
        ResourceError: with the numbers, and with what would fit, as `plan` says it.
    """
    forecast, device = forecast_of(prepared), prepared.device
    standing = sum(forecast.get(part, 0) for part in ("weights", "trained", "optimiser"))
    if device.type == "cuda":
        there = int(torch.cuda.get_device_properties(device).total_memory)
    elif device.type == "cpu":
        there = int(psutil.virtual_memory().total)
    else:
        return
    if standing <= there or prepared.spec.force:
        return
    would = "; ".join(map(str, remedies_of(prepared, there)))
    raise ResourceError(
        f"this run cannot fit: weights, trained numbers and the optimiser's moments are {human_bytes(standing)} "
        f"together, and the device has {human_bytes(there)}. "
        + (f"What would fit, with its peak: {would}. " if would else "No smaller batch, base in codes or other method "
           "whose peak can be forecast fits: take a smaller model. ")
        + "`luthier plan` says which methods fit; --force starts it all the same."
    )  # fmt: skip


def remedies_of(prepared: Prepared, memory: int) -> tuple[Remedy, ...]:
    """What would fit into so many bytes in place of a run; nothing where that cannot be forecast."""
    kind = prepared.device.type
    device = Device(name="this", kind=kind, memory=memory, here=False, bf16=False, said="this machine")
    steps = assumed_steps(prepared.spec, int(prepared.train.lengths.max()))
    try:
        return remedies_here(
            _outline(prepared), prepared.spec, prepared.task, prepared.precision, device, steps
        )  # fmt: skip
    except LuthierError:
        return ()


@dataclass(frozen=True)
class Told:
    """What a finished run says of forecasts: of its memory, and of its seconds where it was long enough."""

    memory: Pair
    times: tuple[TimePair, ...] = ()


def told_of(folder: Path, *, real_steps: bool = False) -> Told | str:
    """What was forecast for a finished run, activations included, and what it took; or why that cannot be said.

    Args:
        real_steps: make three steps of it now, as `plan --probe` does.

    Raises:
        IntegrityError: the folder holds no record that can be read.
    """
    path = folder / "record.json"
    try:
        record = Record.from_json(path.read_bytes())
    except OSError as error:
        raise IntegrityError(f"{folder}: holds no record.json ({error.strerror}). Name finished runs.") from error
    told, device = record.forecast, str(record.environment.get("device", "cpu")).partition(":")[0]
    if not {*_PARTS, "rows", "tokens"} <= set(told) or not record.peak_bytes:
        return "its record holds no forecast, or no peak"
    try:
        spec = RunSpec.from_plain(record.spec)
        if spec.data.template is not None:
            return "its labels were asked for by a template, and activations of those are not forecast"
        outline = outline_of(spec.model)
        _, settings = split_settings(spec.strategy, spec.settings, compose.setting_names(spec.method))
        method = compose.method(spec.method, settings)
        task = task_of_rows(spec, outline)
        precision = Precision(read_tuning(folder / "tuning")["precision"], "as in the run")
        dtype = weights_in(method, outline, spec, task, precision)
        kept = activations_of(method, outline, spec, task, precision, dtype, told["rows"], told["tokens"])
    except LuthierError as error:
        return str(error)
    if isinstance(kept, str):
        return kept
    family = str(METHODS.card(spec.method.partition("+")[0]).family)
    memory = Pair(
        model=spec.model, method=spec.method, family=family, device=device, rows=told["rows"], tokens=told["tokens"],
        forecast=record.memory.get("program", 0) + sum(told[part] for part in _PARTS) + kept.at(told["rows"]),
        measured=record.peak_bytes,
    )  # fmt: skip
    steps, rates = _steps_in(record.timing, told), _rates_in(record.timing)
    if steps is None or rates is None or spec.strategy is not None:
        return Told(memory)
    width, rows = max(1, round(steps.width)), max(1, round(steps.rows / steps.pieces))
    again = activations_of(method, outline, spec, task, precision, dtype, rows, width)
    if isinstance(again, str):
        return Told(memory)
    structure = outline.skeleton(task, dtype, spec.codes)
    work = work_of_step(again, held(method, structure, spec.optim.name), steps, task, outline)
    forecasts: dict[How, tuple[float, float]] = {
        "counted": (rates.seconds(work), record.timing["seconds"]),
        "loading": (loading_of(structure.anatomy.n_params, rates), record.timing["loading"]),
    }
    if real_steps:
        made = probed(method, outline, spec, task, precision, dtype, steps, 1.0, 0.0)
        if isinstance(made, float):
            forecasts["probed"] = (made, record.timing["seconds"])
    of = {"model": spec.model, "method": spec.method, "family": family, "device": device}
    whole = {how: both for how, both in forecasts.items() if both[1] > 0}
    return Told(memory, tuple(TimePair(**of, how=how, forecast=f, measured=m) for how, (f, m) in whole.items()))


def _steps_in(timing: dict[str, float], widest: dict[str, int]) -> Steps | None:
    if not {"rows", "tokens", "width", "pieces", "targets", "seconds", "loading"} <= set(timing):
        return None
    return Steps(
        rows=timing["rows"], tokens=timing["tokens"], width=timing["width"], pieces=timing["pieces"],
        supervised=min(1.0, timing["targets"] / timing["tokens"]), total=None,
        widest=(widest["rows"], widest["tokens"]),
    )  # fmt: skip


def _rates_in(timing: dict[str, float]) -> Rates | None:
    if not set(_RATES.values()) <= set(timing):
        return None
    return Rates(**{field: timing[name] for field, name in _RATES.items()})


def pairs_of(
    folders: Iterable[Path], *, real_steps: bool = False
) -> tuple[list[Pair], list[TimePair], dict[Path, str]]:  # fmt: skip
    """The pairs of all finished runs in or below the folders, of memory and of time; and why the others are none."""
    pairs: list[Pair] = []
    times: list[TimePair] = []
    silent: dict[Path, str] = {}
    for top in folders:
        for record in sorted(top.rglob("record.json")):
            told = told_of(record.parent, real_steps=real_steps)
            if isinstance(told, str):
                silent[record.parent] = told
            else:
                pairs.append(told.memory)
                times.extend(told.times)
    return pairs, times, silent


def widest(loop: Any) -> dict[str, int]:
    """Rows and tokens of the widest micro-batch of a run."""
    rows, tokens = loop.feed.longest().inputs["input_ids"].shape
    return {"rows": int(rows), "tokens": int(tokens)}
