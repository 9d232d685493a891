"""The scenes: which rows are learnt, by which model and method, for how many steps, and what there is beside them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from experiments.one_run import one_run
from luthier.data.order import shuffled
from luthier.samples.data import load_sample
from luthier.samples.store import cache_dir
from luthier.workflow.merged_folder import merge

__all__ = ["SCENES", "Scene", "further", "old_rows", "old_run", "set_rows", "target", "teacher"]

SMALL, SMALLER, LARGE, DECODER = "sample:minilm-l6", "sample:minilm-l3", "sample:mpnet-base", "sample:smollm2-135m"
WORDS_OF_TREC6 = (
    "data.template={text} Kind: {mask}",
    "data.words=ABBR=short,DESC=why,ENTY=thing,HUM=person,LOC=place,NUM=number",
)
WORDS = 48
"""Of a text, at most."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a strategy is tried in.

    Attributes:
        says: what it is, for the page.
        train, test: make the files of rows.
        steps: optimiser steps of a run.
        start: makes the model that is tuned, where it is not `model`.
    """

    says: str
    train: Callable[[], Path]
    test: Callable[[], Path]
    steps: int = 120
    model: str = SMALL
    method: str = "lora"
    given: tuple[str, ...] = ()
    start: Callable[[str, int], str] | None = None


def _home() -> Path:
    return cache_dir() / "panel" / "strategies"


def _written(name: str, rows: Callable[[], Iterable[dict[str, Any]]]) -> Path:
    """The file of that name, written where it is not there yet."""
    path = _home() / f"{name}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows()), "utf-8")
    return path


@cache
def _drawn(sample: str) -> list[dict[str, Any]]:
    """The training rows of a sample in an order of their own, the same everywhere."""
    rows = load_sample(sample).train
    return [_short(rows[i]) for i in shuffled(len(rows), 0, "strategies", sample)]


def _short(row: dict[str, Any]) -> dict[str, Any]:
    return {"text": " ".join(row["text"].split()[:WORDS]), "label": row["label"]}


def few() -> Path:
    """16 questions of each class."""

    def rows() -> Iterable[dict[str, Any]]:
        seen: dict[str, int] = {}
        for row in _drawn("trec6"):
            seen[row["label"]] = seen.get(row["label"], 0) + 1
            if seen[row["label"]] <= 16:
                yield row

    return _written("trec6-16", rows)


def held_out() -> Path:
    """300 questions of the test half."""

    def rows() -> Iterable[dict[str, Any]]:
        test = load_sample("trec6").test
        return [_short(test[i]) for i in shuffled(len(test), 0, "strategies", "test")[:300]]

    return _written("trec6-300", rows)


def many() -> Path:
    """600 questions as they come."""
    return _written("trec6-600", lambda: _drawn("trec6")[:600])


def weak() -> Path:
    """The many, three in ten of them with another row's label."""

    def rows() -> Iterable[dict[str, Any]]:
        right = json_rows(many())
        for i, row in enumerate(right):
            yield row | {"label": right[(i + 7) % len(right)]["label"] if i % 10 < 3 else row["label"]}

    return _written("trec6-weak", rows)


def further() -> Path:
    """600 further questions, none of which is among the few or the many. Who reads no labels is given them in vain."""
    return _written("trec6-further", lambda: _drawn("trec6")[1500:2100])


def target() -> Path:
    """48 questions, none of which is among the others."""
    return _written("trec6-target", lambda: _drawn("trec6")[2100:2148])


def set_rows(sample: str, count: int = 200) -> Path:
    """Rows of another sample."""
    return _written(f"{sample}-{count}", lambda: _drawn(sample)[:count])


# Two tasks in a row, both answered by yes or no: is a headline sarcastic, then, is a message spam?
_YES = {"sarcasm": {"sarcastic"}, "sms-spam": {"spam"}}


def _yes_no(sample: str, half: str, count: int) -> Path:
    def rows() -> Iterable[dict[str, Any]]:
        loaded = load_sample(sample)
        of_half = loaded.train if half == "train" else loaded.test
        for i in shuffled(len(of_half), 0, "yes or no", sample)[:count]:
            row = _short(of_half[i])
            yield row | {"label": "yes" if row["label"] in _YES[sample] else "no"}

    return _written(f"{sample}-yes-no-{half}-{count}", rows)


def of_tasks(half: str = "train") -> Path:
    """The few questions, and 96 headlines and 96 messages, each with the name of its task; to score, questions."""

    def rows() -> Iterable[dict[str, Any]]:
        questions = json_rows(few() if half == "train" else held_out())
        yield from (row | {"task": "questions"} for row in questions)
        for sample in ("sarcasm", "sms-spam") if half == "train" else ():
            yield from (row | {"task": sample} for row in _drawn(sample)[:96])

    return _written(f"tasks-{half}", rows)


def json_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a written file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def old_rows(half: str = "train") -> Path:
    """The rows of the first task: 400 to learn, 300 to score."""
    return _yes_no("sarcasm", half, 400 if half == "train" else 300)


def old_run(method: str, seed: int) -> Path:
    """A run that has learnt the first task."""
    return _kept(f"old-{method}-{seed}", SMALL, method, seed, old_rows(), old_rows("test"), 200)


def _merged(method: str, seed: int) -> str:
    """The model after the first task."""
    folder = _home() / f"old-{method}-{seed}-merged"
    if not folder.exists():
        merge(old_run(method, seed), folder)
    return str(folder)


def teacher(model: str = LARGE) -> str:
    """A run of a larger model on the many."""
    return str(_kept(f"teacher-{model.partition(':')[2]}", model, "lora", 0, many(), held_out(), 300))


def _kept(name: str, model: str, method: str, seed: int, train: Path, test: Path, steps: int) -> Path:
    folder = _home() / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as home:
            one_run(model, method, seed, train, test, f"{home}/run", [f"run.steps={steps}"])
            (Path(home) / "run").rename(folder)
    return folder


SCENES = {
    "few": Scene(says="trec6, 16 rows a class (96), LoRA on minilm-l6", train=few, test=held_out),
    "few-full": Scene(
        says="trec6, 16 rows a class (96), all weights of minilm-l6", train=few, test=held_out, method="full",
        given=("optim.lr=5e-5",),
    ),
    "many": Scene(says="trec6, 600 rows, LoRA on minilm-l6", train=many, test=held_out, steps=200),
    "weak": Scene(
        says="trec6, 600 rows, three in ten with another row's label, LoRA on minilm-l6",
        train=weak, test=held_out, steps=200,
    ),
    "student": Scene(says="trec6, 600 rows, LoRA on minilm-l3", train=many, test=held_out, model=SMALLER, steps=200),
    "then": Scene(
        says="sms-spam (200 rows) after sarcasm, both answered by yes or no; all weights of minilm-l6",
        train=lambda: _yes_no("sms-spam", "train", 200), test=lambda: _yes_no("sms-spam", "test", 300),
        method="full", given=("optim.lr=5e-5",), start=_merged, steps=60,
    ),
    "tasks": Scene(
        says="trec6, 16 rows a class, beside 96 headlines and 96 messages in one file; questions are scored",
        train=of_tasks, test=lambda: of_tasks("test"),
    ),
    "decoder": Scene(
        says="trec6, 16 rows a class, LoRA on smollm2-135m", train=few, test=held_out, model=DECODER, steps=40,
        given=("batch.size=8",),
    ),
    "decoder-full": Scene(
        says="trec6, 16 rows a class, all weights of smollm2-135m",
        train=few, test=held_out, model=DECODER, method="full", steps=40,
        given=("batch.size=8", "optim.lr=1e-4"),
    ),
    "decoder-words": Scene(
        says="trec6, 16 rows a class, labels asked for by a template, LoRA on smollm2-135m", train=few, test=held_out,
        model=DECODER, steps=40, given=("batch.size=8", *WORDS_OF_TREC6),
    ),
    "decoder-prompt": Scene(
        says="trec6, 16 rows a class, labels asked for by a template, a prompt of three vectors on smollm2-135m",
        train=few, test=held_out, model=DECODER, method="prompt_tuning",
        steps=12, given=("batch.size=8", "length=3", *WORDS_OF_TREC6),
    ),
}  # fmt: skip
