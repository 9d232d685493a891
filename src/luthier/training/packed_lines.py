"""Whether several rows may stand in one line: only where each row's logits are those that it has alone.

Names do not tell: whether a layer looks across the edge of two texts is a matter of the model's code and of the method.
So a tiny packed batch is tried, on the base and with the tuning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.core import ConfigError
from luthier.data.batches import Batches
from luthier.data.examples import Examples
from luthier.data.packing import best_fit, laid_in_lines, positions_in_lines
from luthier.data.tasks import Task
from luthier.surgery import Tuned
from luthier.surgery.context import facts_left_out
from luthier.training.out_of_memory import is_out_of_memory
from luthier.training.strategy import Strategy, fills

__all__ = ["padding_said", "refuse_packing", "why_not_packed"]

_WORTH_IT = 0.1  # share of padding from which on a run says what packing would save

_LENGTHS = np.asarray([7, 2, 5, 3, 4], dtype=np.int64)
_WIDTH = 7  # lines of [7], [5 2], [4 3]
# How far apart the two may lie, as a share of the logits' spread: rounding, and nothing that one text tells another.
_CLOSE, _CLOSE_IN_HALVES = 1e-4, 5e-2
# Moments in which a strategy sees rows of a step, which are no lines of a batch here.
_BY_ROW = ("batches", "gradient", "passes", "loss", "weigh")


def padding_said(batches: Batches) -> str:
    """What packing saves of the tokens of a step, or would save; empty where that is little, and nobody asked."""
    padded, packed = (batches.padding(packed=packed) for packed in (False, True))
    if batches.pack:
        return f"rows share lines (--pack): {packed:.1%} of a step's tokens are padding, not {padded:.1%}"
    if padded < _WORTH_IT or packed > padded / 2 or batches.examples.labels is None:
        return ""
    return f"{padded:.1%} of a step's tokens are padding; with --pack it would be {packed:.1%}"


def refuse_packing(tuned: Tuned, task: Task, examples: Examples, strategies: Sequence[Strategy]) -> None:
    """Raises: ConfigError: rows of this run cannot stand in one line; says what reads them otherwise."""
    if reason := _why_not(task, examples, strategies) or why_not_packed(tuned):
        raise ConfigError(f"batch.pack: {reason}. Leave --pack out: rows are padded then.")


def _why_not(task: Task, examples: Examples, strategies: Sequence[Strategy]) -> str:
    if task.name != "causal_lm":
        return f"it is for language models that read from left to right, and this task is {task.name}"
    if examples.facts:
        return f"each row says which {' and '.join(examples.facts)} it is of, and a line of several rows has one place"
    for one in strategies:
        if seen := [moment for moment in _BY_ROW if fills(one, moment)]:
            return f"strategy {one.name} looks at single rows of a step ({seen[0]})"
    return ""


def why_not_packed(tuned: Tuned) -> str:
    """Why rows of one line would not get the logits that each has alone, in words; empty where they do.

    Tried in evaluation mode on random words. What starts at zero, and so acts on nothing yet, is moved for the trial
    and put back.
    """
    model = tuned.model
    name = type(model).__name__
    if getattr(model.config.get_text_config(), "attention_chunk_size", None):
        return f"{name} attends in chunks that are counted from the start of a line"
    method = "+".join(part.name for part in tuned.tuning().method.parts())
    for who, asleep in ((name, True), (f"{method} on {name}", False)):
        with tuned.base_only() if asleep else nullcontext():
            apart = _apart(tuned)
        if isinstance(apart, str):
            return f"{who} cannot read several rows in one line: {apart}"
        if not apart <= (_CLOSE_IN_HALVES if _halves(tuned) else _CLOSE):
            return (
                f"{who} lets the rows of a line see one another, or counts their positions on (logits off by "
                f"{apart:.2g} of their spread)"
            )
    return ""


def _apart(tuned: Tuned) -> float | str:
    """How far the logits of rows in lines lie from those of the rows alone; or what was raised."""
    model = tuned.model
    table = model.get_input_embeddings().weight
    device = table.device
    ends = np.cumsum(_LENGTHS)
    flat = torch.randint(min(len(table), 1000), (int(ends[-1]),), generator=torch.Generator().manual_seed(0)).numpy()
    starts, lines = ends - _LENGTHS, best_fit(_LENGTHS, _WIDTH)
    ids = torch.from_numpy(laid_in_lines(flat, starts, _LENGTHS, lines, _WIDTH, 0)).to(device)
    positions = torch.from_numpy(positions_in_lines(_LENGTHS, lines, _WIDTH)).to(device)
    modes = [(module, module.training) for module in model.modules()]
    types = {p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() > 1}
    casts = torch.autocast(
        device.type, dtype=next(iter(types & {torch.bfloat16, torch.float16}), None), enabled=len(types) > 1
    )
    cuda = [device] if device.type == "cuda" else []
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(cuda), casts, facts_left_out(), _zeros_moved(tuned):
            packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
            together: list[Tensor] = []
            alone: list[Tensor] = []
            for line, rows in enumerate(lines):
                at = 0
                for row in rows:
                    n, start = int(_LENGTHS[row]), int(starts[row])
                    together.append(packed[line, at : at + n])
                    at += n
                    text = torch.from_numpy(flat[start : start + n])[None].to(device)
                    alone.append(model(input_ids=text, attention_mask=torch.ones_like(text)).logits[0].float())
    except Exception as error:  # whatever a model's code raises, rows that are padded are the way that is left
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}".rstrip(".")
    finally:
        for module, mode in modes:
            module.training = mode
    ours, own = torch.cat(together), torch.cat(alone)
    spread = float((own - own.mean(-1, keepdim=True)).square().mean().sqrt())
    return float((ours - own).square().mean().sqrt()) / max(spread, 1e-30)


def _halves(tuned: Tuned) -> bool:
    return any(p.dtype in (torch.bfloat16, torch.float16) for p in tuned.model.parameters())


@contextmanager
def _zeros_moved(tuned: Tuned) -> Iterator[None]:
    """Within, trained tensors that are zero are not."""
    zeros: list[tuple[Any, Tensor]] = []
    for parameter in tuned.trained().values():
        if parameter.is_floating_point() and not bool(parameter.detach().any()):
            zeros.append((parameter, parameter.detach().clone()))
    draw = torch.Generator().manual_seed(1)
    for parameter, _ in zeros:
        noise = torch.randn(parameter.shape, generator=draw) * 0.05
        parameter.data.copy_(noise)
    try:
        yield
    finally:
        for parameter, before in zeros:
            parameter.data.copy_(before)
