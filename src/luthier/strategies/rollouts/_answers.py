"""Answers as tensors and as texts: the pieces that strategies of rollouts are put together from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier.data.batches import Batch
from luthier.data.columns import Columns
from luthier.data.examples import IGNORED, Examples
from luthier.data.stop_tokens import stop_ids
from luthier.strategies.rollouts._rewards import Asked
from luthier.training.answers import positions_for_rows
from luthier.training.course import Course
from luthier.training.objective import Objective
from luthier.training.written import write_ids

__all__ = [
    "Lines", "asked_of", "autocast_of", "ends_of", "grown_to", "in_lines", "one_reward", "prompts_of", "texts_of",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Some answers in one pass. T is the most tokens of an answer.

    Attributes:
        chance: log-probability of each token, (lines, T), with its graph.
        mask: 1 for the tokens that count, (lines, T).
        held: what is remembered of these answers, by name, each (lines, ...).
        values: of a head of the strategy's own, (lines, T); None without one.
        first: whether nothing has been learnt from these answers yet.
    """

    chance: Tensor
    mask: Tensor
    held: Mapping[str, Tensor]
    values: Tensor | None = None
    first: bool = True

    @property
    def old(self) -> Tensor:
        """The chances when the answers were written: in the first pass these very ones, so their ratio is 1."""
        return self.chance.detach() if self.first else self.held["old"]

    def sums(self, each: Tensor) -> Tensor:
        """Over the tokens of each line that count: (lines,)."""
        return (each * self.mask).sum(1)


def one_reward(value: float, cut: float, samples: int) -> str:
    """Said of answers of which all got the same."""
    why = f" ({cut:.0%} of them were cut: raise new_tokens)" if cut > 0.5 else ""
    return (
        f"all {samples} answers to each prompt got one reward, such as {value:.4g}{why}: none is better than another. "
        "Try more samples, a higher temperature, easier prompts, or a reward that tells half-right from wrong."
    )


def asked_of(
    examples: Examples, numbers: Sequence[int], prompts: Sequence[str], texts: Sequence[str], columns: Columns
) -> list[Asked]:
    """Answers with the rows that they are to."""
    found = []
    table = examples.ledger.table
    for number, prompt, text in zip(numbers, prompts, texts, strict=True):
        place = int(examples.rows[number])
        row = table.rows[place]
        given = row.get(columns.prompt) if columns.prompt else None
        right = row.get(columns.response) if columns.response else None
        found.append(
            Asked(
                prompt=given if isinstance(given, str) else prompt,
                answer=text,
                row=row,
                place=table.places[place],
                right=None if right is None else str(right),
            )
        )
    return found


def prompts_of(examples: Examples, lines: NDArray[Any]) -> list[list[int]]:
    return [examples.ids[examples.offsets[i] : examples.offsets[i + 1]].tolist() for i in lines.tolist()]


def texts_of(tokenizer: Any, lists: Sequence[Sequence[int]]) -> list[str]:
    return [str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip() for ids in lists]


def ends_of(course: Course) -> list[int]:
    return stop_ids(course.examples(), course.tokenizer, course.tuned.model)


def autocast_of(course: Course) -> Any:
    return course.precision.autocast(course.device) if course.precision is not None else nullcontext()


def in_lines(values: Tensor, told: Tensor, width: int) -> Tensor:
    """Numbers of labelled tokens, (targets,), as (lines, T), each line from its first on; zeros behind."""
    real = torch.arange(width, device=told.device) < told.sum(1)[:, None]
    return values.new_zeros(real.shape).masked_scatter(real, values)


def grown_to(tensor: Tensor, width: int, new: int) -> Tensor:
    """A tensor of answers as of answers of another length, zeros behind."""
    if tensor.dim() < 2 or tensor.shape[1] != width:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(len(tensor), max(0, new - width))], 1)[:, :new]


def ledger_lines(
    course: Course, held: Mapping[str, Tensor], prompts: Sequence[Sequence[int]], texts: Sequence[str],
    rewards: Sequence[Mapping[str, float]],
) -> list[dict[str, Any]]:  # fmt: skip
    """What rollouts.jsonl says of each answer; the answers to one prompt stand one after the other."""
    examples, said = course.examples(), texts_of(course.tokenizer, prompts)
    found: list[dict[str, Any]] = []
    for k, number in enumerate(held["line"].tolist()):
        same = bool(found) and number == held["line"][k - 1]
        found.append(
            {
                "step": course.step,
                "place": examples.ledger.place(int(examples.rows[number])),
                "sample": found[-1]["sample"] + 1 if same else 0,
                "prompt": said[k],
                "answer": texts[k],
                "reward": round(float(held["reward"][k]), 6),
                "rewards": {name: round(value, 6) for name, value in rewards[k].items()},
                "tokens": int(held["size"][k]),
                "cut": bool(held["cut"][k]),
                **({"kl": round(float((held["old"] - held["base"])[k].sum()), 6)} if "base" in held else {}),
            }
        )
    return found


def scored_answers(
    objective: Objective, batch: Batch, valued: Callable[..., tuple[list[float], list[float]]], most: int
) -> Tensor:
    """Of each prompt: what its likeliest answer is worth, what the base's is, and the tokens of the first.

    Args:
        valued: what answers and those of the base are worth: see `RolloutSettings.valued`.
        most: tokens of an answer.

    Returns:
        (prompts, 3).
    """
    examples, tuned, columns = objective.examples, objective.tuned, objective.columns
    assert examples is not None and columns is not None
    prompts = prompts_of(examples, batch.rows)
    said = texts_of(objective.tokenizer, prompts)

    def written() -> list[list[int]]:
        return write_ids(
            tuned, prompts, seeds=None, most=most, temperature=1.0, limit=positions_for_rows(tuned),
            stop=stop_ids(examples, objective.tokenizer, tuned.model),
            facts={n: v for n, v in batch.inputs.items() if n.startswith("row_")},
        )  # fmt: skip

    def asked(answers: list[list[int]]) -> list[Asked]:
        return asked_of(examples, batch.rows.tolist(), said, texts_of(objective.tokenizer, answers), columns)

    own = written()
    with tuned.base_only():
        base = written()
    first, second = valued(asked(own), asked(base), columns)
    return torch.tensor([*zip(first, second, map(float, map(len, own)), strict=True)])


def constant_groups(held: Mapping[str, Tensor], samples: int) -> Tensor:
    """Whether all answers to a prompt got one reward, (prompts,)."""
    groups = held["reward"].view(-1, samples)
    return groups.max(1).values == groups.min(1).values


def examples_of(examples: Examples, held: Mapping[str, Tensor], chosen: NDArray[np.int64], counts: Tensor) -> Examples:
    """Prompts with answers, of which the answers carry loss; marks are the numbers of the answers.

    Args:
        counts: what each adds to the number that a step's loss is divided by.
    """
    lines = held["line"].numpy()[chosen]
    prompts = prompts_of(examples, lines)
    sizes = held["size"].numpy()[chosen]
    answers = [held["answer"][k, :n].tolist() for k, n in zip(chosen.tolist(), sizes.tolist(), strict=True)]
    lengths = [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
    return Examples(
        ids=np.asarray([t for p, a in zip(prompts, answers, strict=True) for t in (*p, *a)], dtype=np.int32),
        labels=np.asarray(
            [t for p, a in zip(prompts, answers, strict=True) for t in (*[IGNORED] * len(p), *a)], dtype=np.int32
        ),
        offsets=np.cumsum([0, *lengths]).astype(np.int64),
        rows=examples.rows[lines],
        n_targets=counts.long().numpy(),
        marks=chosen.astype(np.float32)[:, None],
        facts={n: v[lines] for n, v in examples.facts.items()},
        ledger=examples.ledger,
    )
