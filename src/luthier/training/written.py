"""Answers that the model that trains writes to a step's prompts: each token is drawn by a name of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from luthier.core import ResourceError
from luthier.data.batches import Batch
from luthier.data.examples import IGNORED
from luthier.data.stop_tokens import stop_ids
from luthier.surgery import Tuned
from luthier.training.answers import positions_for_rows, standing_still
from luthier.training.course import Course
from luthier.training.out_of_memory import is_out_of_memory, make_room
from luthier.training.sampling import Drawn

__all__ = ["answered_anew", "write_ids"]

_LINES = 64  # that are written side by side


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
    found = write_ids(
        course.tuned,
        [line[:begin] for line, begin in zip(ids.tolist(), begins, strict=True)],
        seeds=[course.seed_of("write", row) for row in batch.rows.tolist()], most=most, temperature=temperature,
        stop=stop_ids(course.examples(), course.tokenizer, model), limit=positions_for_rows(course.tuned),
        facts={name: value for name, value in batch.inputs.items() if name.startswith("row_")},
    )  # fmt: skip
    return _laid(batch, begins, found, int(model.config.pad_token_id))


def write_ids(
    tuned: Tuned, prompts: Sequence[Sequence[int]], *, seeds: Sequence[int] | None, most: int, temperature: float,
    stop: Sequence[int], limit: int | None, facts: Mapping[str, Tensor] | None = None, lines: int = _LINES,
    processors: Callable[[list[int]], list[Any]] | None = None,
) -> list[list[int]]:  # fmt: skip
    """What the model writes after prompts, in evaluation mode and without gradient: ids, up to and with a stop token.

    Prompts of one length are written side by side, so that nothing is padded. Where memory runs out, fewer are.

    Args:
        seeds: one for each prompt, by which each token is drawn; None takes the likeliest.
        most: tokens of an answer, at most; fewer where the model has no more positions.
        limit: positions for prompt and answer.
        facts: what is said of each row besides its ids.
        processors: makes what changes the logits before they are drawn from, for some of the prompts.

    Raises:
        ResourceError: one prompt alone does not fit in memory.
    """
    model: Any = tuned.model
    device = model.get_input_embeddings().weight.device
    found: list[list[int]] = [[] for _ in prompts]
    waiting = _alike([len(prompt) for prompt in prompts], lines)
    with torch.no_grad(), standing_still(model), _own_chances(model):
        while waiting:
            here, *waiting = waiting
            begin = len(prompts[here[0]])
            room = most if limit is None else min(most, limit - begin)
            ids = torch.tensor([list(prompts[k]) for k in here], device=device)
            drawn = [] if seeds is None else [Drawn([seeds[k] for k in here], temperature)]
            try:
                out = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1,
                    max_new_tokens=max(1, room), eos_token_id=list(stop) or None,
                    pad_token_id=model.config.pad_token_id,
                    logits_processor=[*(processors(here) if processors is not None else []), *drawn],
                    **{name: value[torch.tensor(here)].to(device) for name, value in (facts or {}).items()},
                )  # fmt: skip
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(here) == 1:
                    raise ResourceError(
                        f"one answer of {most} tokens to a prompt of {begin} does not fit in memory ({error}). Lower "
                        "new_tokens or max_length, or take a smaller model."
                    ) from error
                make_room()
                waiting = [here[: len(here) // 2], here[len(here) // 2 :], *waiting]
                continue
            for k, answer in zip(here, out[:, begin:].tolist(), strict=True):
                end = next((i + 1 for i, token in enumerate(answer) if token in stop), len(answer))
                found[k] = answer[:end]
    return found


@contextmanager
def _own_chances(model: Any) -> Iterator[None]:
    """Within, nothing that the model's files say of writing changes its logits.

    A penalty of repetitions there, or words that are held back, would draw answers of another distribution than the one
    whose chances are learnt.
    """
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def _alike(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Numbers of prompts of one length, `most` at a time."""
    by_length: dict[int, list[int]] = {}
    for k, n in enumerate(lengths):
        by_length.setdefault(n, []).append(k)
    return [some[i : i + most] for _, some in sorted(by_length.items()) for i in range(0, len(some), most)]


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
