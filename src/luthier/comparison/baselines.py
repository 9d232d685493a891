"""What needs no model: the commonest answer, and word counts with logistic regression, of the rows that runs learn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from luthier.comparison.answers import Answers
from luthier.comparison.parts import Part
from luthier.data.problems import text_of
from luthier.training.word_counts import answers_by_words

__all__ = ["baselines", "held_to_select"]

WORDS = "word counts (TF-IDF) with logistic regression"


def baselines(
    parts: Sequence[Part], asked: Sequence[Answers], runs: Sequence[Sequence[Path]], numbers: dict[str, int]
) -> dict[str, NDArray[np.int64]]:
    """Their answers to the rows that all methods answered.

    They learn from the rows that the runs of the part learn from: neither those that are scored, nor those that the
    runs hold out to stop or to choose by. Where some runs hold fewer out than others, from the rows of those.

    Args:
        asked: of each part, the rows.
        runs: of each part, one run of each method.
        numbers: of the labels.
    """
    common, words, names = [], [], set()
    for part, rows, own in zip(parts, asked, runs, strict=True):
        held = min((held_to_select(run) for run in own), key=len)
        train, columns = part.data.train, part.columns
        learnt = [
            row
            for row, place in zip(train.rows, train.places, strict=True)
            if place not in held and columns.outcome(row) in numbers
        ]
        targets = np.array([numbers[columns.outcome(row)] for row in learnt], dtype=np.int64)
        most = int(np.bincount(targets, minlength=len(numbers)).argmax())
        names.add(next(label for label, number in numbers.items() if number == most))
        common.append(np.full(len(rows.places), most, dtype=np.int64))
        words.append(answers_by_words([text_of(row, columns) for row in learnt], targets, rows.texts))
    of = f"always answering {names.pop()!r}" if len(names) == 1 else "always answering the commonest label of the rest"
    found = {of: np.concatenate(common)}
    told = [one for one in words if one is not None]
    if len(told) == len(words):
        found[WORDS] = np.concatenate(told)
    return found


def held_to_select(run: Path) -> frozenset[str]:
    """Places of the training rows that a run did not learn, but stopped or chose by, as its rows.jsonl has it."""
    try:
        lines = (run / "rows.jsonl").read_bytes().splitlines()
    except OSError:  # a run from which somebody has taken it: then nothing is known to be held out
        return frozenset()
    return frozenset(str(json.loads(line)["place"]) for line in lines if line.startswith(b'{"half": "select"'))
