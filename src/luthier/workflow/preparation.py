"""Everything that can be refused is refused here, and all a run needs is read: nothing has been written yet."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch

from luthier.__version__ import __version__
from luthier.anatomy import Anatomy
from luthier.core import ConfigError, NothingTrains, UnknownName, human_count, key, listed, plain
from luthier.data.chat import ChatTemplate
from luthier.data.cloze import as_cloze, with_shown
from luthier.data.columns import Columns
from luthier.data.encode import encode
from luthier.data.examples import Examples
from luthier.data.load_data import load_data
from luthier.data.order import shuffled
from luthier.data.problems import Problem
from luthier.data.row_tasks import task_names, with_heads, with_tasks
from luthier.data.rows import Table, split_rows
from luthier.data.sets import TRAIN, Sets, join, load_further, named_sources
from luthier.data.stop_tokens import refuse_endless, taught_ends
from luthier.data.tasks import Task
from luthier.data.tokenizer import choose_length, choose_pad
from luthier.data.windows import refuse_windows
from luthier.runs.spec import RunSpec
from luthier.surgery import Method, compose, reserved_positions
from luthier.surgery import Source as SavedTuning
from luthier.surgery.sources import check_shapes, opened
from luthier.training import Strategy
from luthier.training.precision import Precision, choose_device, choose_precision
from luthier.training.preference import Weighing, judge_of
from luthier.training.recipe import refuse_recipe
from luthier.training.strategy import split_settings, strategies
from luthier.training.strategy_fits import refuse_sets, refuse_task, task_of
from luthier.training.temperature import check_calibrate
from luthier.training.thresholds import check_thresholds
from luthier.training.update_checks import refuse_optimisers
from luthier.workflow.choices import choose, sentence, sizes, too_wide
from luthier.workflow.find_others import Other, find_others
from luthier.workflow.held import check_store, held_in
from luthier.workflow.load_model import (
    Source,
    empty_model,
    find_model,
    load_config,
    load_tokenizer,
    tokenizer_digest,
)
from luthier.workflow.written_checks import check_written

__all__ = ["Prepared", "prepare", "refuse_empty"]

_LANGUAGE_ROWS = 200  # a language model's rows are long: all of them can take longer than training


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything a run needs, checked, before anything is written or trained."""

    spec: RunSpec
    source: Source
    method: Method
    strategies: tuple[Strategy, ...]
    task: Task
    columns: Columns
    train_table: Table
    aside: tuple[tuple[str, str], ...]
    problems: tuple[Problem, ...] = field(repr=False)
    test_table: Table | None
    tokenizer: Any = field(repr=False)
    train: Examples
    selection: Examples | None  # training rows held out to select by; the test half has no part in that
    test: Examples | None
    selection_table: Table | None = field(default=None, repr=False)
    pad_id: int
    pad: dict[str, Any]
    max_length: int
    n_params: int
    n_base: int
    precision: Precision
    device: torch.device
    weights: torch.dtype
    fingerprints: dict[str, str]
    lines: tuple[str, ...]
    sources: tuple[SavedTuning, ...] = field(default=(), repr=False)
    others: tuple[Other, ...] = ()
    row_tasks: tuple[str, ...] = ()
    sets: Sets

    @property
    def judge(self) -> Weighing | None:
        """What weighs answers, where that is learnt."""
        return judge_of(self.strategies)

    @property
    def template(self) -> ChatTemplate | None:
        """The chat template of a language task with turns."""
        language = self.task.of_turns and self.columns.shape != "plain"
        return ChatTemplate.of(self.tokenizer) if language else None


def prepare(spec: RunSpec, say: Callable[[str], None] = lambda line: None, *, begun: bool = False) -> Prepared:
    """Read data and model structure, and refuse what cannot work. Writes nothing.

    Args:
        begun: the spec is of a run that has begun: what it left open then stays as it was.

    Raises:
        Any LuthierError: names value, place and what to do.
    """
    _refuse_ranks()
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    lines: list[str] = []

    def note(line: str) -> None:
        lines.append(line)
        say(line)

    method, strategies = _method_and_strategies(spec)
    sources = opened(spec.sources or ())
    method = compose.fitted(method, sources)
    for made in sources:
        note(f"made of {made.folder}: a tuning of {made.method}, {made.digest[:12]}")
    device = choose_device(spec.device)
    precision = choose_precision(spec.precision, device)
    source = find_model(spec.model)
    config = load_config(source)
    data = load_data(spec.data, task_of(strategies, spec.task), config)
    table, test, columns, task = data.train, data.test, data.columns, data.task
    refuse_task(strategies, task)
    if task.name == "prompts" and judge_of(strategies) is None:
        raise ConfigError(
            "task prompts: the rows say nothing to learn but what answers are rewarded. Name a strategy that learns "
            "from rewards, such as --strategy grpo --set reward=length."
        )
    held = {one.name: one.holds(columns) for one in strategies}
    _refuse_classes_only(method, task)
    for remark in data.notes:
        note(remark)
    if task.name in ("preference", "judged") and not any(one.learns for one in strategies):
        other = "dpo" if task.name == "preference" else "kto"
        note(f"the better answers are learnt as text, the worse ones not at all; {other} learns from both")
    if task.name == "preference" and (more := [c for c in (columns.share, columns.margin) if c is not None]):
        said = " and ".join(map(repr, more))
        note(f"not heeded: {said}, which reward_model alone reads; here {columns.chosen!r} is always the better answer")
    row_tasks = () if columns.row_task is None else task_names(table, columns.row_task)
    if row_tasks:
        by_task = any(one.by_task for one in strategies)
        if not by_task or any("task" in part.reads_rows for part in method.parts()):
            method = compose.for_rows(method, {"task": len(row_tasks)})
        note(f"rows are of {len(row_tasks)} tasks: {', '.join(row_tasks)}")
    if any(one.by_task for one in strategies):
        task = with_heads(task, table, columns, row_tasks)
        method = compose.for_labels(method, [len(labels) for labels in task.heads])
        note(f"each task has labels of its own: {', '.join(task.labels)}")

    tokenizer = load_tokenizer(source)
    if spec.data.template is not None:
        task = as_cloze(task, spec.data.template, spec.data.words, columns, tokenizer, config)
        refuse_task(strategies, task)  # again: some learn labels by a head alone
        note(f"labels are asked for by {task.template!r}: {', '.join(task.words)}; no new head")
    elif spec.data.words is not None:
        raise ConfigError("data.words are for the gap of a template, and data.template is left out. Give one.")

    def encoded(rows: Table, **more: Any) -> Examples:
        made = encode(rows, columns, task, tokenizer, **options, **more)
        return with_tasks(made, columns.row_task, row_tasks) if columns.row_task is not None else made

    if not begun:
        spec = choose(spec, task, method, len(table))
    select = None
    if spec.eval.thresholds:
        check_thresholds(task)
    if spec.eval.calibrate:
        check_calibrate(task)
    if spec.eval.holds_out or any(part.holds_out for part in method.parts()):
        by_class = task.name == "classification" and not task.multi_label
        table, select = split_rows(
            table, spec.eval.share, key(spec.data.split_seed, "select"), columns.content,
            columns.outcome if by_class else None,
        )  # fmt: skip
        assert select is not None
        note(f"{len(select)} training rows are held out to select by; the test half is scored once, at the end")
    if task.draws:
        task = with_shown(task, table, columns)
        note(
            f"each row is read in {task.draws} versions, with a row of each label beside it, of {len(task.shown)} kept"
        )
    if spec.eval.metric is not None:
        task.check_metric(spec.eval.metric)
    check_written(spec.eval, task, columns)
    most = spec.eval.rows or (_LANGUAGE_ROWS if task.of_words or task.writes else None)
    if test is not None and most is not None and len(test) > most:
        note(f"scores are of {most} of the {len(test)} test rows (eval.rows)")
        test = test.take(np.sort(shuffled(len(test), spec.data.split_seed, "scored")[:most]).tolist())
    learnt = len(table)
    train_print = table.fingerprint()
    further = [load_further(n, s, spec.data, columns, task, data.test) for n, s in named_sources(spec.also).items()]
    for remark in (line for one in further for line in one.notes):
        note(remark)
    if further:
        table, task = join(table, task, further)
        if task.template and len(task.labels) > len(task.words):
            raise ConfigError(f"also: labels without a word: {', '.join(task.labels[len(task.words) :])}. Give words.")
    method = compose.completed(method, tokenizer, pair=columns.pair is not None)
    empty = empty_model(source, task)
    n_vocab = int(empty.get_input_embeddings().weight.shape[0])
    if task.template:
        method = compose.for_template(method, task.word_ids, task.n_soft, n_vocab)
    anatomy = Anatomy.read(empty)
    check_shapes(anatomy, sources)
    n_params = method.n_params(anatomy)
    reserved = reserved_positions(method, anatomy)
    if n_params == 0 and not anatomy.head_tensors:
        raise NothingTrains(f"{spec.method} trains no number of {source.name}. Choose another method.")
    for part in method.parts():
        refuse_empty(part, anatomy, source.name)
    answers = max((getattr(one, "new_tokens", 0) for one in strategies if one.learns == "prompts"), default=0)
    max_length = choose_length(spec.max_length, tokenizer, config, task, reserved, answers)
    pad = choose_pad(tokenizer, n_vocab)
    others = find_others(strategies, task, tokenizer, n_vocab)
    options: dict[str, Any] = {"n_vocab": n_vocab, "max_length": max_length, "loss_on": spec.data.loss_on}
    if spec.long == "windows":
        refuse_windows(task, tokenizer)
        options["long"] = spec.long
    train_examples = encoded(table, accept_refused=spec.data.accept_refused)
    if task.of_turns and columns.shape not in ("plain", "asked"):
        refuse_endless(train_examples, taught_ends(train_examples, tokenizer), max_length)
    note(train_examples.ledger.sentence("train"))
    for remark in train_examples.ledger.notes:
        note(remark)
    n_learnt = len(train_examples) if task.of_words else len(train_examples.read_rows)
    if said := sentence(spec, n_learnt):
        note(said)
    for remark in sizes(spec, len(train_examples)):
        note(remark)
    select_examples = None
    if select is not None:
        select_examples = encoded(select, accept_refused=spec.data.accept_refused)
    test_examples = None
    if test is not None:
        test_examples = encoded(test, accept_refused=spec.data.accept_refused)
        note(test_examples.ledger.sentence("test"))
    note(precision.sentence())
    weights = held_in(spec.store, precision, n_params, anatomy.n_params)
    if of_base := check_store(spec, method, empty):
        note(of_base)
    note(
        f"method {spec.method}: trains {human_count(n_params)} of {human_count(anatomy.n_params)} numbers "
        f"({n_params / anatomy.n_params:.3%}), and a new head of "
        f"{human_count(sum(int(np.prod(anatomy.tensors[t])) for t in anatomy.head_tensors))}"
    )
    for remark in too_wide(method, anatomy):
        note(remark)
    return Prepared(
        spec=spec, source=source, method=method, strategies=strategies, task=task, columns=columns, train_table=table,
        test_table=test, aside=data.aside, problems=data.problems, tokenizer=tokenizer,
        train=train_examples, selection=select_examples, selection_table=select, test=test_examples,
        pad_id=pad.id,
        pad=plain(pad), max_length=max_length, n_params=n_params, n_base=anatomy.n_params, precision=precision,
        device=device, weights=weights, lines=tuple(lines), sources=sources, others=others,
        row_tasks=row_tasks,
        sets=Sets.of(train_examples, {TRAIN: learnt} | {one.name: len(one.table) for one in further}),
        fingerprints={
            "model": source.digest,
            "train": train_print,
            "select": select.fingerprint() if select is not None else "",
            "test": test.fingerprint() if test is not None else "",
            "tokenizer": tokenizer_digest(tokenizer),
            "luthier": __version__,
            **({"sources": " ".join(made.digest for made in sources)} if sources else {}),
            **{f"also {one.name}": one.fingerprint for one in further},
            **{f"model {other.setting}": other.digest for other in others},
            **{f"model {one.name}.{n}": digest for one in strategies for n, digest in held[one.name].items()},
        },
    )  # fmt: skip


def _refuse_ranks() -> None:
    """A launcher of several processes would get as many runs of the same rows, each taken for a part of one."""
    told = os.environ.get("WORLD_SIZE", "1")
    if told.strip() not in ("", "1"):
        raise ConfigError(
            f"WORLD_SIZE is {told!r}: a run of luthier is one process, and cannot be resumed or shared by several. "
            "Start it without a launcher such as torchrun, or unset WORLD_SIZE."
        )


def refuse_empty(part: Method, anatomy: Anatomy, model: str) -> None:
    """Refuse a method that edits the model and holds no number: a new head would hide that it does nothing.

    Raises:
        NothingTrains: with the settings that are 0.
    """
    if part.modifies or part.n_stored(anatomy) or not any(True for _ in part.edits(anatomy)):
        return
    zeros = [f"{name}=0" for name, value in part.settings().items() if value == 0 and type(value) is int]
    raise NothingTrains(
        f"{part.name} trains no number of {model}{f' with {listed(zeros)}' if zeros else ''}. "
        f"{'Raise it' if len(zeros) == 1 else 'Give it a size'}, or choose another method."
    )


def _refuse_classes_only(method: Method, task: Task) -> None:
    """Some methods make their answers of the probabilities of one label of several."""
    for part in method.parts():
        if part.classes_only and (task.name != "classification" or task.multi_label):
            what = "several labels a row" if task.multi_label else task.name
            raise ConfigError(
                f"{part.name}: makes its answers of the probabilities of classes, and this task is {what}. Leave it "
                "out, or train a classification with one label a row."
            )


def _method_and_strategies(spec: RunSpec) -> tuple[Method, tuple[Strategy, ...]]:
    """Both with their settings; a field of the run among them is told from a slip."""
    refuse_recipe(spec, "what is asked for here")
    try:
        of_strategies, of_method = split_settings(spec.strategy, spec.settings, compose.setting_names(spec.method))
        method = compose.method(spec.method, of_method)
        found = strategies(spec.strategy, of_strategies, method)
        for one in found:
            one.check(spec)
        refuse_optimisers(found, spec)
        refuse_sets(found, named_sources(spec.also))
        return method, found
    except UnknownName as error:
        misplaced = [name for name in spec.settings if name in {f.name for f in fields(spec)}]
        if not misplaced:
            raise
        raise UnknownName(
            f"{error} {misplaced[0]!r} is a field of the run: write --set run.{misplaced[0]}=..., or put it at the top "
            "of the spec."
        ) from error
