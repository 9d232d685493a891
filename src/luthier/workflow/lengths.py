"""The steps of a run as its rows make them: how wide, how many, how much of them is padding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from luthier.core import ConfigError, ModelError
from luthier.data.batches import cut
from luthier.data.encode import encode
from luthier.data.load_data import Data
from luthier.data.order import Order
from luthier.data.packing import best_fit, cut_packed, width_of
from luthier.data.tasks import Task
from luthier.data.tokenizer import choose_length
from luthier.forecast import Steps
from luthier.forecast.growth import text_of
from luthier.runs.spec import RunSpec
from luthier.workflow.choices import length_of
from luthier.workflow.load_model import load_tokenizer
from luthier.workflow.outline import Outline

__all__ = ["assumed_steps", "refuse_pack", "steps_of_rows"]

LOOKED_AT = 400  # steps of the first epoch, evenly chosen, where it has more


def assumed_steps(spec: RunSpec, tokens: int) -> Steps:
    """Steps of rows of `tokens` tokens each, where no rows say how long they are."""
    size, tokens = spec.batch.size, _padded(tokens, spec)
    rows = max(1, min(_most(spec), spec.batch.tokens // tokens))
    return Steps(
        rows=size, tokens=size * tokens, width=tokens, pieces=-(-size // rows), supervised=1.0, total=spec.steps,
        widest=(rows, tokens),
    )  # fmt: skip


def steps_of_rows(spec: RunSpec, outline: Outline, data: Data) -> Steps | str:
    """The steps that these rows make; or why that cannot be said.

    The rows are encoded as in a run, and its own order cuts them into micro-batches.

    Raises:
        DataError: rows that no run could use.
    """
    if outline.source is None:
        return "there is no tokenizer beside a bare config.json, so rows are taken to be of one length"
    try:
        tokenizer = load_tokenizer(outline.source)
    except ModelError as error:
        return str(error)
    if data.task.draws or spec.data.template is not None or spec.long == "windows":
        return "rows that are read in versions or windows are taken to be of one length"
    table, task = data.train, data.task
    chosen = length_of(spec, task.n_outputs is not None, len(table))
    holds_out = spec.eval.holds_out or "eval.best" in chosen
    if "epochs" in chosen:
        spec = replace(spec, epochs=chosen["epochs"])
    max_length = choose_length(spec.max_length, tokenizer, outline.config, task, 0)
    options: dict[str, Any] = {"n_vocab": text_of(outline.config).vocab_size, "max_length": max_length}
    examples = encode(
        table, data.columns, task, tokenizer, loss_on=spec.data.loss_on, accept_refused=spec.data.accept_refused,
        **options,
    )  # fmt: skip
    order = Order(examples.lengths, spec.batch.size, spec.seed, spec.batch.group_by_length)
    most = _most(spec)

    def pieces(rows: Any) -> list[Any]:
        into = cut_packed if spec.batch.pack else cut
        return into(rows, examples.lengths, spec.batch.tokens, most, spec.batch.pad_to)

    def shape(piece: Any) -> tuple[int, int]:
        """Lines of a micro-batch and their width; where rows are packed, several stand in a line."""
        lengths = examples.lengths[piece]
        width = int(lengths.max())
        lines = len(best_fit(lengths, width_of(lengths, spec.batch.pad_to))) if spec.batch.pack else len(piece)
        return lines, width

    n = order.steps_per_epoch
    looked = np.unique(np.linspace(0, n - 1, min(n, LOOKED_AT)).round().astype(int)).tolist()
    shapes = [shape(piece) for step in looked for piece in pieces(order.rows(0, step))]
    rows, widths = (np.array(each, dtype=np.float64) for each in zip(*shapes, strict=True))
    tokens = rows * (-(-widths // spec.batch.pad_to) * spec.batch.pad_to)
    longest = np.argsort(-examples.lengths, kind="stable")[: spec.batch.size].astype(np.int64)
    widest = shape(pieces(longest)[0])
    held = round(spec.eval.share * len(examples)) if holds_out else 0
    per_epoch = max(1, -(-(len(examples) - held) // spec.batch.size))
    return Steps(
        rows=float(rows.sum() / len(looked)), tokens=float(tokens.sum() / len(looked)),
        width=float((tokens * widths).sum() / tokens.sum()), pieces=len(rows) / len(looked),
        supervised=min(1.0, float(examples.n_targets.sum() / examples.lengths.sum())),
        total=spec.total_steps(per_epoch), widest=(widest[0], _padded(widest[1], spec)),
    )  # fmt: skip


def refuse_pack(spec: RunSpec, task: Task) -> None:
    """Raises: ConfigError, where rows of a task cannot share a line; a run says the same."""
    if spec.batch.pack and task.name != "causal_lm":
        raise ConfigError(
            f"batch.pack: it is for language models that read from left to right, and this task is {task.name}. Leave "
            "--pack out: rows are padded then."
        )


def _most(spec: RunSpec) -> int:
    """Rows of a micro-batch at most."""
    return -(-spec.batch.size // spec.batch.accumulate)


def _padded(tokens: int, spec: RunSpec) -> int:
    return -(-tokens // spec.batch.pad_to) * spec.batch.pad_to
