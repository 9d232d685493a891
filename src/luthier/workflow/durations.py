"""Seconds of a step: work over measured rates, real steps on this machine, or no more than a floor."""

from __future__ import annotations

import torch

from luthier.core import LuthierError, human_bytes
from luthier.data.tasks import Task
from luthier.forecast import Device, Growth, Held, Rates, Steps, Way, Work, measured_rates, probe
from luthier.forecast.growth import text_of
from luthier.runs.spec import RunSpec
from luthier.surgery import Method
from luthier.training.precision import Precision, choose_device
from luthier.workflow.outline import Outline

__all__ = ["floor_of", "loading_of", "probed", "rates_here", "way_of", "work_of_step"]

UPDATED = 10  # times that an update by AdamW, with the gradient's norm and its clipping, reads or writes each number
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Fitted to the middle runs of benchmarks/plan_grid.py, on models of 22.7 and 134.5 million numbers. Many bytes for each
# number: the rate is of moves within the cache, and what is loaded comes from files into pages that nobody touched yet.
LOADING = 0.18  # seconds: making the model and attaching
READ = 590  # bytes moved for each number of the model
WORD_PASSES = 3  # products of a target with the whole vocabulary: one forward, one for the states, one again in pieces
WORD_BYTES = 12  # bytes moved for a target and a word: its logit, its share and its gradient


def way_of(method: Method, spec: RunSpec) -> Way:
    """How a run of the method computes."""
    drops = any(part.trains_base for part in method.parts())
    return Way(
        fast=spec.fast, checkpointing=spec.gradient_checkpointing is True,
        dropout=spec.trunk_dropout == "on" or (spec.trunk_dropout == "auto" and drops),
    )  # fmt: skip


def work_of_step(
    grown: Growth, found: Held, steps: Steps, task: Task, outline: Outline, times: float = 1.0
) -> Work:  # fmt: skip
    """Of one optimiser step: its passes, the products with the vocabulary, and the update.

    `grown` is of rows as wide as the steps' micro-batches; `times`, how often a strategy makes their passes.
    """
    work = grown.fixed_work * steps.pieces + grown.row_work * (steps.tokens / grown.tokens)
    if task.of_words or task.writes:
        targets = steps.supervised * steps.tokens
        words = text_of(outline.config)
        pairs = targets * float(words.vocab_size)
        work += Work(2.0 * WORD_PASSES * pairs * float(words.hidden_size), WORD_BYTES * pairs, 0.0)
    return work * times + Work(0.0, float(UPDATED * found.numbers), 0.0)


def rates_here(spec: RunSpec, outline: Outline, precision: Precision, steps: Steps, seconds: float) -> Rates:
    """How fast this machine is now, in products as large as the steps'."""
    rows = round(steps.tokens / steps.pieces)
    width = int(text_of(outline.config).hidden_size)
    return measured_rates(choose_device(spec.device), _TYPES[precision.name], rows=rows, width=width, seconds=seconds)


def loading_of(numbers: int, rates: Rates) -> float:
    """Seconds from the model's files to the first step: each number is read, cast and looked at; and a constant."""
    return LOADING + READ * numbers / rates.moved


def floor_of(work: Work, device: Device) -> float | None:
    """The least seconds of a step on a device that was never measured; None where no peak rates are known of it."""
    return None if device.peak is None else work.products / device.peak


def probed(
    method: Method, outline: Outline, spec: RunSpec, task: Task, precision: Precision, dtype: torch.dtype,
    steps: Steps, room: float, wanted: float,
) -> float | str:  # fmt: skip
    """Seconds of a step from real steps; or why none were made.

    Args:
        room, wanted: bytes that are free, and that such a run may take.
    """
    if wanted > room:
        return f"no steps were made: they may take {human_bytes(wanted)}, and {human_bytes(room)} are free"
    try:
        return probe(
            method, outline.config, task, outline.small(task, spec.codes), steps, dtype=dtype, precision=precision,
            device=choose_device(spec.device), way=way_of(method, spec), optim=spec.optim,
        )  # fmt: skip
    except (LuthierError, RuntimeError, MemoryError) as error:
        return f"no steps could be made: {(str(error).splitlines() or [type(error).__name__])[0]}"
