"""What a strategy sees of a run: the step, the tuned model, the optimiser, and a memory that lasts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from luthier.core import key
from luthier.data.batches import Batch
from luthier.data.columns import Columns
from luthier.data.examples import Examples
from luthier.data.sets import TRAIN, Sets
from luthier.data.tasks import Task
from luthier.runs.journal import Journal
from luthier.surgery import Tuned, is_head
from luthier.surgery.embedded import changed_embeddings
from luthier.training.answers import standing_still
from luthier.training.feed import Feed
from luthier.training.gap_words import GapStates
from luthier.training.objective import Objective, Result
from luthier.training.optimiser import Optimiser
from luthier.training.other_models import OtherModel
from luthier.training.pass_seed import seed_pass
from luthier.training.precision import Precision
from luthier.training.states import States, watched_states

__all__ = ["Course", "Memory", "Piece", "Progress"]


@dataclass
class Progress:
    """Where a run stands; all strategies of a run share it."""

    step: int = 0  # of the step being made, from 1
    total: int = 0
    epoch: int = 0
    share: float = 0.0  # of the peak rate, in this step's update
    trying: bool = False  # whether this pass is the trial before step 1, which may move nothing, not by rounding
    numbers: dict[str, float] = field(default_factory=dict)  # noted for the log, by "strategy.name"


@dataclass
class Memory:
    """What lasts from step to step. Every checkpoint holds it."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One micro-batch of a step.

    Attributes:
        batch: on the device.
        index: of the micro-batch, from 0.
        n_targets: numbers in the loss of the whole step, by which the loop divides.
    """

    batch: Batch
    index: int
    n_targets: int


@dataclass(frozen=True, kw_only=True)
class Course:
    """One strategy's view of the run. It may not be kept.

    Attributes:
        memory: what lasts from step to step.
        aside: what was worked out for the micro-batches of this step; nothing of it lasts.
    """

    name: str
    tuned: Tuned
    task: Task
    optimiser: Optimiser
    device: torch.device
    seed: int
    progress: Progress
    memory: Memory = field(default_factory=Memory)
    aside: dict[Any, Any] = field(default_factory=dict)
    objective: Objective | None = None
    sets: Mapping[str, Examples] = field(default_factory=dict)
    rows: Sets = field(default_factory=lambda: Sets((TRAIN,), (0, 0)))
    cut_rows: Callable[[NDArray[np.int64], tuple[int, ...]], list[Batch]] | None = None
    precision: Precision | None = None
    models: Mapping[str, OtherModel] = field(default_factory=dict)
    numbers: dict[str, nn.Parameter] = field(default_factory=dict)
    tokenizer: Any = None
    say: Callable[[str], None] = lambda line: None
    feed: Feed | None = None
    texts: Journal | None = None
    columns: Columns | None = None

    @property
    def step(self) -> int:
        """The step being made, from 1."""
        return self.progress.step

    @property
    def trying(self) -> bool:
        """Whether this is the trial before step 1, which may move nothing, not even by rounding."""
        return self.progress.trying

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.progress.total

    @property
    def epoch(self) -> int:
        """The epoch of this step, from 0."""
        return self.progress.epoch

    def generator(self, *stream: int | str) -> torch.Generator:
        """A generator on the CPU that is named by the seed, the strategy, the step and `stream`."""
        return torch.Generator().manual_seed(self.seed_of(*stream))

    def seed_of(self, *stream: int | str) -> int:
        """A number that is named by the seed, the strategy, the step and `stream`."""
        return key(self.seed, "strategy", self.name, self.step, *stream)

    def draw(self, piece: Piece, width: int, kind: Literal["uniform", "normal"] = "uniform") -> Tensor:
        """Noise for the real tokens of a micro-batch, zero on padding: (rows, tokens, width), fp32.

        Each row's draw is named by the row, so it depends neither on its neighbours, nor on padding, nor on how the
        step was cut. "uniform" is between -1 and 1.
        """
        mask = piece.batch.inputs["attention_mask"].bool()  # (rows, tokens)
        noise = torch.zeros(*mask.shape, width)
        for line, row in enumerate(piece.batch.rows.tolist()):
            generator = self.generator("draw", row)
            real = mask[line].cpu()
            shape = (int(real.sum()), width)
            if kind == "uniform":
                noise[line, real] = torch.rand(shape, generator=generator) * 2 - 1
            else:
                noise[line, real] = torch.randn(shape, generator=generator)
        return noise.to(mask.device)

    def embedding(self, change: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
        """Within, the embedded text (rows, tokens, d) passes through `change`, before prompts and positions."""
        return changed_embeddings(self.tuned, change)

    def rehearse(self, batch: Batch, index: int) -> Result:
        """A plain pass that draws the dropout that the pass of micro-batch `index` of this step will draw."""
        seed_pass(self.seed, self.step - 1, index, self.device)
        return self.forward(batch)

    def examples(self, name: str = "train") -> Examples:
        """The encoded rows of a set."""
        return self.sets[name]

    def forward(self, batch: Batch) -> Result:
        """One plain pass of the task's objective, past whatever other strategies make of it."""
        assert self.objective is not None, "a run has one"
        with self.precision.autocast(self.device) if self.precision is not None else nullcontext():
            return self.objective(batch)

    def cut_by_set(self, batches: list[Batch]) -> list[Batch]:
        """The rows of a step in micro-batches of one set each, the sets in their order."""
        rows = np.concatenate([batch.rows for batch in batches])
        numbers = self.rows.numbers(rows)
        return [piece for number in np.unique(numbers) for piece in self.cut(np.sort(rows[numbers == number]))]

    def cut(self, rows: NDArray[np.int64]) -> list[Batch]:
        """Micro-batches of any examples, on the device, none wider than the run's own may be."""
        assert self.cut_rows is not None, "a run has a feed"
        return [batch.to(self.device) for batch in self.cut_rows(rows, (self.epoch, self.step))]

    @property
    def place(self) -> tuple[int, int]:
        """The epoch of this step, and its number in the epoch; both from 0."""
        assert self.feed is not None, "a run has a feed"
        return self.feed.at(self.step - 1)

    def lay(self, examples: Examples) -> list[Batch]:
        """Micro-batches of examples made in this step, on the device; their rows are numbers in `examples`."""
        assert self.feed is not None, "a run has a feed"
        return [batch.to(self.device) for batch in self.feed.lay(examples)]

    def keep(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append to the run's ledger of what was written in training: rollouts.jsonl.

        How many lines there are is in the memory. What stands behind them, of a run that was killed, is dropped, so a
        resumed run writes the same file.
        """
        kept = int(self.memory.facts.get("kept", 0))
        made = [json.dumps(dict(line), ensure_ascii=False, allow_nan=False).encode() + b"\n" for line in lines]
        if self.texts is not None:
            if self.texts.n_rows() != kept:
                self.texts.keep_rows(kept)
            self.texts.append_rows(made)
        self.memory.facts["kept"] = kept + len(made)

    def still(self) -> AbstractContextManager[None]:
        """Within, the model is in evaluation mode: no dropout."""
        return standing_still(self.tuned.model)

    def states(self) -> AbstractContextManager[States]:
        """Within, what comes out of the trunk is held, with its graph."""
        return watched_states(self.tuned)

    def gap_states(self) -> AbstractContextManager[GapStates]:
        """Within, the states of a template's gaps and the vectors of the labels' words are held, with their graph."""
        assert self.objective is not None and self.objective.gap is not None, "labels are asked for by a template"
        return self.objective.gap.watched()

    def rate_of(self, name: str) -> float:
        """The learning rate of a trained tensor in this step's update; known in `after_step`."""
        return self.optimiser.rate_of(name, self.progress.share)

    def weights(self, *, head: bool = True) -> Mapping[str, Tensor]:
        """Trained tensors by name, those that are frozen for this step included; no strategy's own numbers.

        Args:
            head: those of a new task head too, which has no past.
        """
        named, joined = self.optimiser.named, self.optimiser.joined
        return {n: p for n, p in named.items() if n not in joined and (head or not is_head(n))}

    @contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Within, trained tensors hold other values; afterwards their own again, bit for bit."""
        kept = {name: self.optimiser.named[name].detach().clone() for name in values}
        with torch.no_grad():
            for name, value in values.items():
                self.optimiser.named[name].copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    self.optimiser.named[name].copy_(value)

    def note(self, name: str, value: float) -> None:
        """A number for this step's line of the log. Noted twice, the second stays."""
        self.progress.numbers[f"{self.name}.{name}"] = float(value)
