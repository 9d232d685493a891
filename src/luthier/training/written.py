"""Answers that the model that trains writes to a step's prompts: each token is drawn by a name of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from luthier.data.batches import Batch
from luthier.data.examples import IGNORED
from luthier.data.stop_tokens import stop_ids
from luthier.training.answers import positions_for_rows
from luthier.training.course import Course
from luthier.training.sampling import Drawn

__all__ = ["answered_anew"]


def answered_anew(course: Course, batch: Batch, *, most: int, temperature: float) -> Batch:
    """The prompts of a batch with answers that the model writes now, without gradient; the rows' own are not read.

    Args:
        batch: of a decoder, its prompts before the first token that carries loss.
        most: tokens of an answer, at most; fewer where the model has no more positions.
    """
    assert batch.labels is not None
    ids, told = batch.inputs["input_ids"], batch.labels != IGNORED
    begins = told.int().argmax(-1).tolist()  # of each row's answer
    model: Any = course.tuned.model
    limit, ends = positions_for_rows(course.tuned), stop_ids(course.examples(), course.tokenizer, model)
    facts = {name: value for name, value in batch.inputs.items() if name.startswith("row_")}
    found: list[list[int]] = [[] for _ in begins]
    with torch.no_grad(), course.still():
        for begin in sorted(set(begins)):  # prompts of one length, so that nothing is padded
            here = [k for k, b in enumerate(begins) if b == begin]
            seeds = [course.seed_of("write", row) for row in batch.rows[here].tolist()]
            room = most if limit is None else min(most, limit - begin)
            out = model.generate(
                input_ids=ids[here, :begin], attention_mask=torch.ones_like(ids[here, :begin]), do_sample=False,
                max_new_tokens=max(1, room), pad_token_id=model.config.pad_token_id, eos_token_id=ends or None,
                logits_processor=[Drawn(seeds, temperature)],
                **{name: value[here] for name, value in facts.items()},
            )  # fmt: skip
            for k, answer in zip(here, out[:, begin:].tolist(), strict=True):
                end = next((i + 1 for i, token in enumerate(answer) if token in ends), len(answer))
                found[k] = answer[:end]
    return _laid(batch, begins, found, int(model.config.pad_token_id))


def _laid(batch: Batch, begins: list[int], answers: list[list[int]], pad_id: int) -> Batch:
    """Prompts and answers side by side, padded on the right; answers alone carry loss."""
    ids = batch.inputs["input_ids"]
    width = max(begin + len(answer) for begin, answer in zip(begins, answers, strict=True))
    laid, mask = ids.new_full((len(begins), width), pad_id), ids.new_zeros((len(begins), width))
    labels = ids.new_full((len(begins), width), IGNORED)
    for k, (begin, answer) in enumerate(zip(begins, answers, strict=True)):
        laid[k, :begin] = ids[k, :begin]
        laid[k, begin : begin + len(answer)] = labels[k, begin : begin + len(answer)] = torch.tensor(answer)
        mask[k, : begin + len(answer)] = 1
    inputs = {**batch.inputs, "input_ids": laid, "attention_mask": mask}
    sizes = np.asarray([len(answer) for answer in answers])
    return replace(
        batch, inputs=inputs, labels=labels, n_targets=int(sizes.sum()), n_tokens=int(sizes.sum()) + sum(begins)
    )
