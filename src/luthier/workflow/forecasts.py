"""What a run says of itself before its first step, and what cannot fit; and what came of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import torch

from luthier.core import IntegrityError, LuthierError, ResourceError, human_bytes
from luthier.forecast import Pair, held
from luthier.runs import Record
from luthier.runs.spec import RunSpec
from luthier.surgery import METHODS, compose, read_tuning
from luthier.training.precision import Precision
from luthier.training.strategy import split_settings
from luthier.workflow.load_model import load_config
from luthier.workflow.outline import Outline, outline_of
from luthier.workflow.plan import activations_of, packed_here, task_of_rows, weights_in
from luthier.workflow.preparation import Prepared

__all__ = ["forecast_of", "pair_of", "pairs_of", "refuse_what_cannot_fit", "widest"]

_PARTS = ("weights", "trained", "gradients", "optimiser", "packed")


def forecast_of(prepared: Prepared) -> dict[str, int]:
    """Bytes by part, counted from the model's structure; empty where a method cannot be counted so.

    `packed` is what this machine makes of it; all other parts are the same on each.
    """
    source = prepared.source
    if prepared.sources or prepared.others:
        return {}  # what a saved tuning or another model adds is no part of the structure
    halves = set(source.folder.dtypes.values()) == {"BF16"}
    outline = Outline(source.name, load_config(source), halves, True, frozenset(source.folder.shapes))
    spec = prepared.spec
    found = held(prepared.method, outline.skeleton(prepared.task, prepared.weights, spec.codes), spec.optim.name)
    return {
        "weights": found.weights, "trained": found.numbers, "gradients": found.gradients, "optimiser": found.moments,
        "packed": packed_here(found, spec) if prepared.device.type == "cpu" else 0,
    }  # fmt: skip


def refuse_what_cannot_fit(forecast: dict[str, int], device: torch.device, force: bool) -> None:
    """Refuse a run whose weights, trained numbers and moments alone are more than the device has.

    Raises:
        ResourceError: with the numbers.
    """
    standing = sum(forecast.get(part, 0) for part in ("weights", "trained", "optimiser"))
    if device.type == "cuda":
        there = int(torch.cuda.get_device_properties(device).total_memory)
    elif device.type == "cpu":
        there = int(psutil.virtual_memory().total)
    else:
        return
    if standing <= there or force:
        return
    raise ResourceError(
        f"this run cannot fit: weights, trained numbers and the optimiser's moments are {human_bytes(standing)} "
        f"together, and the device has {human_bytes(there)}. `luthier plan` says which methods fit; --force starts it "
        "all the same."
    )


def pair_of(folder: Path) -> Pair | str:
    """What was forecast for a finished run, activations included, and what it took; or why that cannot be said.

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
        kept = activations_of(method, outline, spec, task, precision, dtype, told["tokens"])
    except LuthierError as error:
        return str(error)
    if isinstance(kept, str):
        return kept
    return Pair(
        model=spec.model, method=spec.method, family=str(METHODS.card(spec.method.partition("+")[0]).family),
        device=device, rows=told["rows"], tokens=told["tokens"],
        forecast=record.memory.get("program", 0) + sum(told[part] for part in _PARTS) + kept.at(told["rows"]),
        measured=record.peak_bytes,
    )  # fmt: skip


def pairs_of(folders: Iterable[Path]) -> tuple[list[Pair], dict[Path, str]]:
    """The pairs of all finished runs in or below the folders; and why the others are none."""
    pairs: list[Pair] = []
    silent: dict[Path, str] = {}
    for top in folders:
        for record in sorted(top.rglob("record.json")):
            pair = pair_of(record.parent)
            if isinstance(pair, str):
                silent[record.parent] = pair
            else:
                pairs.append(pair)
    return pairs, silent


def widest(loop: Any) -> dict[str, int]:
    """Rows and tokens of the widest micro-batch of a run."""
    rows, tokens = loop.feed.longest().inputs["input_ids"].shape
    return {"rows": int(rows), "tokens": int(tokens)}
