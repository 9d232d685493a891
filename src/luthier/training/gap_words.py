"""Scores of labels from the words that would fill the gap of a template: computed there, and for those words alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.anatomy.word_logits import soft_capped, softcap_of
from luthier.core import CompositionError
from luthier.data.batches import Batch
from luthier.data.tasks import Task
from luthier.surgery import Mixing, Tuned
from luthier.surgery.tuning import Tuning
from luthier.training.output_matrix import trunk_states, why_all_logits, word_head_of

__all__ = ["GapStates", "GapWords", "gaps_of"]


def gaps_of(task: Task, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The row and the place of each gap, both (rows,)."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    rows = torch.arange(len(ids), device=ids.device)
    if task.asks == "both":
        return rows, torch.full_like(rows, inputs["decoder_input_ids"].shape[1] - 1)
    if task.asks == "decoder":
        places = torch.arange(ids.shape[1], device=ids.device)
        return rows, (mask * (places + 1)).argmax(-1)  # the last token that is no padding
    return rows, (ids == task.gap).int().argmax(-1)


@dataclass
class GapStates:
    """What the last pass compared: the states of the gaps, and the words' own vectors, with their graph.

    Attributes:
        states: what the output matrix is multiplied with, (rows, d).
        words: its row of each label's word, (labels, d).
    """

    states: Tensor | None = None
    words: Tensor | None = None


class GapWords:
    """Finds the gap of each row and gives the logits of the labels' words."""

    def __init__(self, tuned: Tuned, task: Task) -> None:
        self._tuned, self._task = tuned, task
        self._word_head: nn.Module | None = word_head_of(tuned)[0] if task.asks == "encoder" else None
        self._direct = task.asks == "decoder" and not why_all_logits(tuned)
        self._seen: GapStates | None = None

    @contextmanager
    def watched(self) -> Iterator[GapStates]:
        """Within, the states of the gaps of each pass are held."""
        head: Any = self._tuned.model.get_output_embeddings()
        seen = self._seen = GapStates()

        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.states = args[0]  # (1, rows, d) of an encoder's gaps, else (rows, tokens, d)

        handle = head.register_forward_pre_hook(before)
        try:
            yield seen
        finally:
            handle.remove()
            self._seen = None

    def logits(self, batch: Batch) -> Tensor:
        """(rows, labels), in the order of the task's labels; the mixture, of a method that mixes several passes.

        Raises:
            CompositionError: several tunings that mix act in the same rows.
        """
        edited, rows = self._tuned.edited, self._tuned.forward.serving.rows
        names = (
            [t.tuning_name for t in edited.active()] if rows is None else [n for n in dict.fromkeys(rows.names) if n]
        )
        mixing = [(t, p) for t in map(edited.tuning, names) for p in t.method.parts() if isinstance(p, Mixing)]
        if not mixing:
            return self._of_one_pass(batch)
        if rows is None:
            if len(mixing) > 1:
                several = " and ".join(repr(t.tuning_name) for t, _ in mixing)
                raise CompositionError(
                    f"{several} each mix the answers of several passes, and "
                    "would act in the same rows. Activate one of them, or name one for each row: tuned.rows([...])."
                )
            ((tuning, part),) = mixing
            return part.mixed(tuning, self._of_passes(batch, mixing))
        scores = self._of_passes(batch, mixing)
        found = torch.empty_like(scores[0])
        for tuning, part in mixing:
            own = torch.tensor([name == tuning.tuning_name for name in rows.names], device=found.device)
            found[own] = part.mixed(tuning, scores[: part.passes(tuning), own]).to(found.dtype)
        return found

    def _of_passes(self, batch: Batch, mixing: list[tuple[Tuning, Mixing]]) -> Tensor:
        """As many passes as the largest mixture has: (passes, rows, labels)."""
        scores = []
        try:
            for number in range(max(part.passes(tuning) for tuning, part in mixing)):
                for tuning, part in mixing:
                    part.turn(tuning, min(number, part.passes(tuning) - 1))
                scores.append(self._of_one_pass(batch))
        finally:
            for tuning, part in mixing:
                part.turn(tuning, 0)
        return torch.stack(scores)

    def _of_one_pass(self, batch: Batch) -> Tensor:
        words = torch.tensor(self._task.word_ids, device=batch.inputs["input_ids"].device)
        rows, places = gaps_of(self._task, batch.inputs)
        if self._word_head is not None:
            states = trunk_states(self._tuned, batch.inputs)[rows, places]  # (rows, d)
            found: Tensor = self._word_head(states[None])[0]  # (rows, vocabulary)
            self._hold(words, lambda held: held[0])
            return found[:, words]
        if self._direct:
            model: Any = self._tuned.model
            head = model.get_output_embeddings()
            states = trunk_states(self._tuned, batch.inputs)[rows, places]
            bias = None if head.bias is None else head.bias[words]
            self._hold(words, lambda held: states)
            return soft_capped(F.linear(states.to(head.weight.dtype), head.weight[words], bias), softcap_of(model))
        whole: Tensor = self._tuned.model(**batch.inputs).logits  # (rows, tokens, vocabulary)
        self._hold(words, lambda held: held[rows, places])
        return whole[rows, places][:, words]

    def _hold(self, words: Tensor, of_gaps: Callable[[Any], Tensor]) -> None:
        if self._seen is not None:
            head: Any = self._tuned.model.get_output_embeddings()
            self._seen.states, self._seen.words = of_gaps(self._seen.states), head.weight[words]
