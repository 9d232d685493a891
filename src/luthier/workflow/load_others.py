"""The models beside the one that trains, loaded; where a row has one answer, asked once and let go again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.core import DataError, ModelError
from luthier.data.batches import Batch, Collator, EvalBatches
from luthier.data.encode import encode
from luthier.data.tasks import Task
from luthier.data.tokenizer import choose_length, choose_pad
from luthier.data.windows import mean_by_row
from luthier.training.other_models import OtherModel
from luthier.workflow.find_others import Other
from luthier.workflow.load_model import load_config, load_model, load_tokenizer
from luthier.workflow.prediction import Predictor
from luthier.workflow.preparation import Prepared

__all__ = ["load_others"]


def load_others(prepared: Prepared, say: Callable[[str], None]) -> dict[str, dict[str, OtherModel]]:
    """Strategy -> role -> model.

    Raises:
        ModelError: a model without a trained head.
        DataError: a row that the other model cannot read.
    """
    found: dict[str, dict[str, OtherModel]] = {}
    for other in prepared.others:
        found.setdefault(other.owner, {})[other.role] = _loaded(prepared, other, say)
    return found


def _loaded(prepared: Prepared, other: Other, say: Callable[[str], None]) -> OtherModel:
    predictor = Predictor(other.run) if other.run is not None else None
    if predictor is not None:
        model, tokenizer, long = predictor.tuned.model, predictor.tokenizer, str(predictor.contract["long"])
        length, pad = int(predictor.contract["max_length"]), int(predictor.contract["pad"]["id"])
    else:
        model, fresh = load_model(
            other.source, prepared.task, dtype=prepared.precision.dtype, device=prepared.device, seed=prepared.spec.seed
        )
        if fresh:
            raise ModelError(
                f"{other.setting}: {other.name} has no trained {fresh[0]}: it would answer at random. Name a finished "
                "run, or a model folder with its head."
            )
        tokenizer, long = load_tokenizer(other.source), prepared.spec.long or "cut"
        length = choose_length(prepared.spec.max_length, tokenizer, load_config(other.source), prepared.task, 0)
        pad = choose_pad(tokenizer, int(model.get_input_embeddings().weight.shape[0])).id
        model.config.pad_token_id = pad
    model.requires_grad_(False).eval()
    if other.live:
        return OtherModel(name=other.name, model=model)
    task, collator, ask = prepared.task, Collator(pad_id=pad), lambda batch: model(**batch.inputs).logits
    if predictor is not None and predictor.task.template:  # it answers by words of its own template
        task, collator, objective = predictor.task, predictor.collator(), predictor.objective
        ask = lambda batch: objective(batch).logits  # noqa: E731
    answers = _answers(prepared, other, task, model, tokenizer, length, collator, long, ask)
    say(f"{other.setting}: {other.name} has answered {len(answers)} rows; its weights are let go")
    return OtherModel(name=other.name, answers=answers)


@torch.inference_mode()
def _answers(
    prepared: Prepared, other: Other, task: Task, model: Any, tokenizer: Any, length: int, collator: Collator,
    long: str, ask: Callable[[Batch], Tensor],
) -> Tensor:  # fmt: skip
    """The logits of every training example, in groups that do not depend on the steps: (examples, classes)."""
    rows = prepared.train.rows
    examples = encode(
        prepared.train_table, prepared.columns, task, tokenizer, with_targets=False, check=False,
        n_vocab=int(model.get_input_embeddings().weight.shape[0]), max_length=length, long=long,
    )  # fmt: skip
    unread = np.setdiff1d(rows, examples.rows)
    if len(unread):
        raise DataError(
            f"{other.setting}: {other.name} cannot read {prepared.train_table.places[int(unread[0])]} "
            f"({len(unread)} such rows). Take them out, or name another model."
        )
    parts, seen = [], []
    for batch in EvalBatches(examples, collator, 2 * prepared.spec.batch.tokens):
        batch = batch.to(prepared.device)
        with prepared.precision.autocast(prepared.device):
            parts.append(ask(batch).float().cpu())
        seen.append(batch.rows)
    logits = mean_by_row(torch.cat(parts).numpy()[np.argsort(np.concatenate(seen), kind="stable")], examples)
    place = np.searchsorted(examples.read_rows, rows)
    return torch.from_numpy(logits[place])
