"""Ways of asking against each other: the same held-out rows for all, several seeds, and what may be said of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from luthier.asking.desk import LABELLED, OPEN, Desk, Query, Shown, check_template
from luthier.asking.engine import Of, Told, put
from luthier.asking.machine import Cost, Machine
from luthier.asking.scoring import METRICS, Standings, judged
from luthier.asking.way import Way
from luthier.core import ConfigError, DataError, UnknownName, near
from luthier.data.cloze import words_of
from luthier.data.columns import Columns, label_name
from luthier.data.load_data import Data, load_data
from luthier.data.order import shuffled
from luthier.data.retrieval import Retriever, Vectors, Words
from luthier.data.rows import Table
from luthier.runs.spec import DataSpec

__all__ = ["AskSpec", "Asked", "ask", "desk_of", "refuse_ways"]


@dataclass(frozen=True, kw_only=True)
class AskSpec:
    """What is asked, beside the ways.

    Attributes:
        rows: held-out rows that are asked about; None for all. The same rows as `eval.rows` of a run takes.
        seed: the first; each seed draws other rows to show.
        template, words, before: see `luthier.asking.desk`; None for the usual.
    """

    data: DataSpec
    rows: int | None = None
    seed: int = 0
    seeds: int = 1
    metric: str | None = None
    template: str | None = None
    words: str | None = None
    before: str = ""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """All ways on all rows."""

    standings: Standings
    runs: tuple[Of, ...]
    wanted: tuple[str, ...]
    """of each row"""
    queries: tuple[Query, ...]
    reads: str = ""
    """how prompts were laid before the model, where not as they are"""


def ask(
    machine: Machine | Callable[[], Machine], ways: Mapping[str, Way], spec: AskSpec, *, config: Any = None,
    say: Callable[[str], None] = lambda line: None, done: Callable[[Of], None] = lambda run: None,
) -> Asked:  # fmt: skip
    """Ask a model about held-out rows in several ways, and compare them on these rows.

    Args:
        machine: what answers, or what makes it once the rows are known to be right.
        ways: a name for each; the same way may stand there twice with other settings.
        config: of the model, as transformers has it; tells which task fits.
        done: is given each way and seed that is finished.

    Raises:
        ConfigError, UnknownName: a setting, a metric, a template that cannot work.
        DataError: rows that cannot be asked about.
        LuthierError: of the machine; what was finished was handed to `done`.
    """
    if not ways:
        raise ConfigError("no way of asking is named. Name one, such as --strategy icl.")
    data = load_data(spec.data, "auto", config)
    pool, queries, wanted = _rows(data, spec)
    for note in data.notes:
        say(note)
    labelled = data.columns.shape == "labelled"
    known = METRICS["labels" if labelled else "texts"]
    metric = spec.metric or known[0]
    if metric not in known:
        raise UnknownName(f"--metric {metric!r}: these rows are scored by {', '.join(known)}.{near(metric, known)}")
    if callable(machine):
        machine = machine()
    refuse_ways(ways, machine, labelled=labelled)
    desks = [_desk(pool, data, spec, machine, seed) for seed in range(spec.seed, spec.seed + spec.seeds)]
    runs = []
    try:
        for way in ways.values():
            for number, desk in enumerate(desks):
                notes = way.refuse(desk, queries)
                for note in notes if number == 0 else ():
                    say(note)
        if machine.said:
            say(machine.said)
        say(f"{len(queries)} held-out rows are asked about; {len(pool)} rows may be shown")
        for desk in desks:
            for name, way in ways.items():
                machine.forget()
                machine.cost = Cost()
                told = _put(name, way, queries, desk, machine, done)
                runs.append(Of(name=name, seed=desk.seed, told=tuple(told), cost=machine.cost))
                done(runs[-1])
                say(f"{name}, seed {desk.seed}: {_said(machine.cost)}")
    finally:
        machine.forget()  # also where it failed: the process of a chat template ends with it
    labels = desks[0].labels
    common = Counter(row.answer for row in pool).most_common(1)[0][0] if pool else ""
    standings = judged(
        list(ways), runs, wanted, [" ".join(query.texts) for query in queries], labels=labels, common=common,
        metric=metric, seeds=[desk.seed for desk in desks],
    )  # fmt: skip
    return Asked(
        standings=standings, runs=tuple(runs), wanted=tuple(wanted), queries=tuple(queries), reads=machine.reads
    )


def _put(
    name: str, way: Way, queries: Sequence[Query], desk: Desk, machine: Machine, done: Callable[[Of], None]
) -> list[Told]:
    kept: list[Told] = []
    try:
        return put(way, queries, desk, machine, kept.extend)
    except BaseException:
        done(Of(name=name, seed=desk.seed, told=tuple(kept), cost=machine.cost))  # what was paid for is kept
        raise


def _said(cost: Cost) -> str:
    return (
        f"{cost.requests} requests, {cost.read} tokens read ({cost.computed} computed), {cost.written} written, "
        f"{cost.seconds:.1f} s"
    )


def refuse_ways(ways: Mapping[str, Way], machine: Machine, *, labelled: bool) -> None:
    """Refuse ways whose requests a machine cannot answer, before any is put.

    Raises:
        ConfigError: says which.
    """
    for name, way in ways.items():
        if way.scores and not machine.scores and (labelled or not way.writes):
            raise ConfigError(
                f"{name} scores labels, and {machine.name} gives no log-probabilities of a text that it is handed. Ask "
                "in a way that writes (cot, self_consistency), or a model of your own."
            )


# ---------------------------------------------------------------------- rows


def _rows(data: Data, spec: AskSpec) -> tuple[tuple[Shown, ...], list[Query], list[str]]:
    """Rows to show, rows to ask about, and what each of these should be answered."""
    columns, task = data.columns, data.task
    if columns.shape not in ("labelled", "answered") or task.multi_label or task.name == "regression":
        raise DataError(
            f"{spec.data.source}: rows of {task.name.replace('_', ' ')} ({columns.shape}). Asking needs a text with "
            "one of several labels, or a prompt with its response. Name the columns: --label, or --prompt and "
            "--response."
        )
    if data.test is None or not len(data.test):
        raise DataError(f"{spec.data.source}: no rows are held out to ask about. Give --test FILE, or more rows.")
    test = data.test
    if spec.rows is not None and spec.rows < len(test):
        test = test.take(np.sort(shuffled(len(test), spec.data.split_seed, "scored")[: spec.rows]).tolist())
    pool = tuple(_shown(data.train, columns))
    asked = list(_shown(test, columns))
    queries = [Query(number=i, place=row.place, texts=row.texts) for i, row in enumerate(asked)]
    return pool, queries, [row.answer for row in asked]


def _shown(table: Table, columns: Columns) -> list[Shown]:
    found = []
    for number, (row, place) in enumerate(zip(table.rows, table.places, strict=True)):
        if columns.shape == "labelled":
            names = [name for name in (columns.text, columns.pair) if name is not None]
            texts = tuple(str(row.get(name) or "") for name in names)
            answer = label_name(row[str(columns.label)])
        else:
            parts = [str(row.get(name) or "") for name in (columns.prompt, columns.context) if name is not None]
            texts, answer = ("\n".join(part for part in parts if part),), str(row.get(str(columns.response)) or "")
        if not "".join(texts).strip():
            raise DataError(f"{place}: nothing to ask about, its text is empty. Fill it in, or leave the row out.")
        found.append(Shown(number=number, place=place, texts=texts, answer=answer, row=row))
    return found


def _desk(pool: tuple[Shown, ...], data: Data, spec: AskSpec, machine: Machine, seed: int) -> Desk:
    pair = data.columns.pair is not None
    labelled = data.columns.shape == "labelled"
    usual = LABELLED.replace("{text}", "{text}\nText: {pair}") if pair else LABELLED if labelled else OPEN
    template = spec.template.replace("\\n", "\n") if spec.template is not None else usual
    check_template(template, pair)
    if spec.words is not None and not labelled:
        raise ConfigError("--words are for labels, and these rows have none. Leave them out.")
    words = words_of(spec.words, data.task.labels) if labelled else {}
    twice = [word for word, times in Counter(words.values()).items() if times > 1]
    if twice:
        raise ConfigError(f"--words: two labels have the word {twice[0]!r}. Choose another for one of them.")
    return desk_of(pool, words=words, template=template, before=spec.before, seed=seed, machine=machine)


def desk_of(
    pool: tuple[Shown, ...],
    *,
    words: Mapping[str, str],
    template: str,
    machine: Machine,
    before: str = "",
    seed: int = 0,
) -> Desk:
    """A desk over these rows, with their retrievers and the machine's measure of length."""

    @lru_cache(maxsize=4)
    def find(by: str) -> Retriever:
        texts = ["\n".join(row.texts) for row in pool]
        if by == "bm25":
            return Words(texts)
        from luthier.workflow.sentence_vectors import SentenceVectors

        return Vectors(texts, SentenceVectors(by))

    return Desk(
        pool=pool, words=words, template=template, before=before, seed=seed, count=machine.count, size=machine.size,
        limit=machine.limit, find=find,
    )  # fmt: skip
