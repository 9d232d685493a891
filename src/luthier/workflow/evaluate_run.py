"""Score a finished run on any labelled rows, as its held-out rows were scored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.core import ConfigError, DataError, build
from luthier.data.batches import EvalBatches
from luthier.data.chat import ChatTemplate
from luthier.data.columns import is_blank
from luthier.data.encode import encode
from luthier.data.examples import Examples
from luthier.data.load_data import load_inputs
from luthier.data.rows import Table
from luthier.data.tasks import Task
from luthier.runs import durable
from luthier.surgery import answerers
from luthier.training.evaluate import Evaluator
from luthier.training.objective import Objective
from luthier.training.quality import Quality, beside_plain, judge
from luthier.workflow.finish import answers_csv
from luthier.workflow.load_model import collator_of
from luthier.workflow.prediction import Predictor

__all__ = ["Evaluation", "evaluate", "evaluator_of"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The scores of a run on rows that were given, and what they are worth."""

    rows: int
    scores: dict[str, float]
    quality: Quality | None = field(default=None, repr=False)
    left_out: tuple[tuple[str, str], ...] = ()
    """place and reason of each row that could not be used"""
    notes: tuple[str, ...] = ()
    """what was recognised when the rows were read"""


def evaluate(
    path: Path | str, data: str, *, delimiter: str | None = None, encoding: str | None = None, skip_bad: bool = False,
    out: Path | str | None = None,
) -> Evaluation:  # fmt: skip
    """Score a finished run on the rows of a file, as its held-out rows were scored. Writes nothing but `out`.

    >>> from luthier import train
    >>> result = train("sample:minilm-l6", "reviews.csv", text="review", label="stars", steps=2)
    >>> sorted(evaluate(result.path, "reviews.csv").scores)
    ['accuracy', 'loss', 'macro_f1', 'mcc']

    Args:
        path: the folder of a finished run.
        data: rows with the columns of the training rows, the label too.
        delimiter, encoding: of a .csv file; left out, what it shows.
        skip_bad: go on without the rows that cannot be used, however many; else more than the run accepted stop it.
        out: a .csv file to write, with what was wanted and answered in each row (labels and numbers).

    Raises:
        ConfigError: no such run, one that is not finished, or `out` is there.
        DataError: rows, columns or labels that cannot be used.
        WrongBase, IntegrityError: model, tokenizer or tuning are not those of the run.
    """
    target = None if out is None else _free(Path(out))
    predictor = Predictor(path)
    task = predictor.task
    if target is not None and task.name not in ("classification", "regression"):
        raise ConfigError(
            f"out: of task {task.name} no sheet of answers is written; luthier predict {path} writes them."
        )
    table, columns = load_inputs(data, predictor.columns, delimiter=delimiter, encoding=encoding)
    notes = table.notes
    wanted = {
        "labelled": "label",
        "tagged": "tags",
        "answered": "response",
        "preferred": "rejected",
        "judged": "label",
        "asked": "response",
    }.get(columns.shape)
    told = wanted is not None and getattr(predictor.columns, wanted) is not None  # prompts may have none
    if wanted is not None and told and getattr(columns, wanted) is None:
        name = getattr(predictor.columns, wanted)
        raise DataError(
            f"{table.source}: no column {name!r}, which says what is right. Its columns are "
            f"{', '.join(map(repr, table.columns))}. Rename one, or answer without scores: luthier predict {path} "
            f"--data {data}."
        )
    most = 1.0 if skip_bad else predictor.spec.data.accept_refused
    table, left_out = _with_answers(table, columns.label or columns.tags, most)
    template = predictor.contract["template"]
    examples = encode(
        table, columns, task, predictor.tokenizer,
        n_vocab=int(predictor.tuned.model.get_input_embeddings().weight.shape[0]),
        max_length=int(predictor.contract["max_length"]), accept_refused=most,
        loss_on=predictor.contract["loss_on"], long=predictor.contract["long"],
        template=None if template is None else build(ChatTemplate, template, "template"),
    )  # fmt: skip
    examples = predictor.of_tasks(examples)
    refused = [(table.places[r["row"]], str(r["reason"])) for r in examples.ledger if r["status"] == "refused"]
    evaluator = evaluator_of(predictor, examples)
    with predictor.answering():
        found = evaluator.outputs()
        plainly = None
        if answerers(predictor.tuned):
            evaluator.plainly = True
            plainly = evaluator.outputs()
    quality = None
    if examples.targets is not None:
        learnt = _learnt(Path(path), task, examples.row_targets)
        quality = judge(task, found["logits"], examples.row_targets, learnt, float(found["loss"]))
        if quality is not None and plainly is not None:
            quality = beside_plain(quality, task, plainly["logits"], examples.row_targets, float(plainly["loss"]))
    if target is not None:
        durable.write_bytes(target, answers_csv(task, columns, table, examples, found["logits"]))
    return Evaluation(
        rows=len(examples.read_rows), scores=evaluator.scores_of(found), quality=quality,
        left_out=(*left_out, *refused), notes=notes,
    )  # fmt: skip


def _free(out: Path) -> Path:
    if out.exists():
        raise ConfigError(f"{out}: is there already. Name a file that does not exist.")
    if out.suffix.lower() != ".csv":
        raise ConfigError(f"{out}: answers are written as .csv. Name such a file.")
    if not out.parent.is_dir():
        raise ConfigError(f"{out}: its folder does not exist. Make it, or name another place.")
    return out


def _with_answers(table: Table, name: str | None, most: float) -> tuple[Table, Sequence[tuple[str, str]]]:
    """The rows that say what is right, and the places of the others."""
    if name is None:
        return table, ()
    blank = {i for i, row in enumerate(table.rows) if is_blank(row.get(name))}
    if not blank:
        return table, ()
    places = [(table.places[i], f"nothing in field {name!r}") for i in sorted(blank)]
    if len(blank) > most * len(table) or len(blank) == len(table):
        shown = "; ".join(f"{place}: {why}" for place, why in places[:5])
        raise DataError(
            f"{table.source}: {len(blank)} of {len(table)} rows have nothing in {name!r} ({shown}). Fill them in, "
            "or go on without them: --skip-bad."
        )
    return table.take(i for i in range(len(table)) if i not in blank), places


def evaluator_of(predictor: Predictor, examples: Examples) -> Evaluator:
    """What scores a loaded run on rows."""
    spec, task, model = predictor.spec, predictor.task, predictor.tuned.model
    objective = Objective(
        predictor.tuned,
        task,
        scoring=True,
        judge=predictor.judge,
        tokenizer=predictor.tokenizer,
        columns=predictor.columns,
    )
    tokens = 2 * spec.batch.tokens
    if (task.of_words or task.writes) and not objective.chunked:
        tokens = max(1, min(tokens, 2**26 // int(model.get_input_embeddings().weight.shape[0])))  # as in training
    collator = collator_of(
        task, model, predictor.tokenizer, pad_id=int(predictor.contract["pad"]["id"]), pad_to=spec.batch.pad_to,
        seed=spec.seed,
    )  # fmt: skip
    batches = EvalBatches(examples, collator, tokens)
    return Evaluator(predictor.tuned, objective, batches, predictor.precision, predictor.device)


def _learnt(path: Path, task: Task, targets: NDArray[Any]) -> NDArray[Any]:
    """Targets as the training rows had them: what a guess would be made from."""
    if task.name == "regression":
        return np.zeros(1, dtype=np.float32)  # their mean, in the unit of the model
    kept = path / "quality.json"
    if kept.exists():
        counts = {c["name"]: int(c["learnt"]) for c in json.loads(kept.read_text(encoding="utf-8"))["classes"]}
        return np.repeat(np.arange(len(task.labels)), [counts.get(name, 0) for name in task.labels])
    return targets  # a run without held-out rows: guessing from the rows at hand is the stricter comparison
