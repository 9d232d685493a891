"""Answers that the model writes to held-out rows inside a run, and how near they come to the rows' own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from luthier.data.encode import encode
from luthier.data.examples import Examples
from luthier.data.order import shuffled
from luthier.data.rows import Table
from luthier.data.stop_tokens import stop_ids
from luthier.runs.spec import GENERATED
from luthier.surgery import Tuned
from luthier.training import metrics
from luthier.training.answers import positions_for_rows
from luthier.training.loop import Loop
from luthier.training.precision import Precision
from luthier.workflow.general_text import forgotten
from luthier.workflow.generation import Generator
from luthier.workflow.preparation import Prepared
from luthier.workflow.written_checks import wanted_of

__all__ = ["WrittenScores", "after_training", "written_scores"]

USUAL_ROWS = 32
SAMPLES = 5


@dataclass(eq=False)
class WrittenScores:
    """Scores of written answers. Each row is answered by the likeliest tokens, so nothing is drawn.

    Attributes:
        asked, wanted: of each row that could be read.
        said: what was written the last time.
    """

    prompts: Examples
    asked: Sequence[str]
    wanted: Sequence[str]
    places: Sequence[str]
    tuned: Tuned
    tokenizer: Any
    precision: Precision
    device: torch.device
    pad_id: int
    stop: Sequence[int]
    tokens: int
    new_tokens: int
    said: Sequence[str] = ()

    def write(self) -> list[str]:
        """An answer to each row, by what acts now."""
        # Made anew each time: whether rows may be padded is tried on the weights as they are, also after a resumption.
        generator = Generator(
            self.tuned, self.tokenizer, self.precision, self.device, pad_id=self.pad_id, stop=self.stop,
            limit=positions_for_rows(self.tuned), tokens=self.tokens,
        )  # fmt: skip
        return [written.text for written in generator.write(self.prompts, self.new_tokens)]

    def __call__(self) -> dict[str, float]:
        """The scores by their names."""
        self.said = self.write()
        return metrics.score(GENERATED, self.said, self.wanted)

    def samples(self) -> list[dict[str, str]]:
        """The first rows: what was asked, wanted, and written by the base and by the tuned model."""
        with self.tuned.base_only():
            before = self.write()
        rows = zip(self.places, self.asked, self.wanted, before, self.said, strict=True)
        names = ("place", "prompt", "wanted", "before", "after")
        return [dict(zip(names, row, strict=True)) for row in rows][:SAMPLES]


def written_scores(prepared: Prepared, loop: Loop, table: Table) -> WrittenScores:
    """What writes to the rows of a table and scores it; to some of them, drawn by data.split_seed, where they are many.

    Raises:
        DataError: no row of it has a prompt that can be read.
    """
    spec, task, columns = prepared.spec, prepared.task, prepared.columns
    most = spec.eval.written or USUAL_ROWS
    if len(table) > most:
        table = table.take(np.sort(shuffled(len(table), spec.data.split_seed, "written")[:most]).tolist())
    prompts = encode(
        table, columns, task, prepared.tokenizer, with_targets=False, check=False, max_length=prepared.max_length,
        n_vocab=int(loop.tuned.model.get_input_embeddings().weight.shape[0]),
    )  # fmt: skip
    if not len(prompts):
        prompts.ledger.check(0.0)
    rows = prompts.rows.tolist()
    ids = np.split(prompts.ids, prompts.offsets[1:-1])
    return WrittenScores(
        prompts=prompts, wanted=[wanted_of(table, row, columns) for row in rows],
        asked=[str(prepared.tokenizer.decode(some.tolist(), skip_special_tokens=True)).strip() for some in ids],
        places=[table.places[row] for row in rows],
        tuned=loop.tuned, tokenizer=prepared.tokenizer, precision=prepared.precision, device=prepared.device,
        pad_id=prepared.pad_id, stop=stop_ids(prepared.train, prepared.tokenizer, loop.tuned.model),
        tokens=spec.batch.tokens, new_tokens=spec.eval.new_tokens,
    )  # fmt: skip


def after_training(prepared: Prepared, loop: Loop, writer: Any) -> tuple[dict[str, float], list[dict[str, str]]]:
    """What is forgotten, as a score, and samples of what was written before and after; nothing where nobody asked."""
    scores: dict[str, float] = {}
    if prepared.spec.eval.forgetting:
        scores["forgetting"] = forgotten(loop.tuned, prepared.tokenizer, prepared.precision, prepared.device)
    return scores, writer.samples() if isinstance(writer, WrittenScores) else []
