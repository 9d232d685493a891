"""A comparison by cross-validation: near copies in one fold, pooled rows, rates chosen inside each fold."""

import csv
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from little import little_model
from races import Here, base_in, here

from benchmarks import planted_truth as planted
from luthier.cli._main import main
from luthier.comparison import compare, entrant_of, statistics
from luthier.comparison import run as run_file
from luthier.comparison.baselines import WORDS, baselines, held_to_select
from luthier.comparison.parts import check_cv, parts_of, rows_in_no_fold
from luthier.comparison.statistics import _moved, resample
from luthier.core import ConfigError, DataError
from luthier.core.config import read_word
from luthier.data.near_copies import clusters
from luthier.data.problems import text_of
from luthier.report import as_markdown, gather
from luthier.report.numbers import disagreements
from luthier.runs.ledger import Entry
from luthier.runs.spec import BatchSpec, DataSpec, EvalSpec, RunSpec
from luthier.workflow import train


@pytest.fixture(autouse=True)
def _fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "DRAWS", 200)


def rows_in(folder: Path, copies: int = 9, alone: bool = False) -> RunSpec:
    """Rows of two labels, of which some differ from others in digits and signs only."""
    draw, words = random.Random(0), ("how", "far", "is", "the", "moon", "sun", "cat")
    texts = [(" ".join(draw.choices(words, k=8)) + " 1", ("good", "bad")[i % 2]) for i in range(30)]
    texts += [(f"{text[:-2].title()}, {number}!", label) for number, (text, label) in enumerate(texts[:copies])]
    texts += [("only one of these", "odd")] if alone else []
    path = folder / "copies.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *texts])
    return replace(base_in(folder), data=DataSpec(source=str(path)))


def test_each_row_is_in_one_fold_with_its_near_copies_and_seeds_are_each_folds_own(tmp_path: Path) -> None:
    parts = parts_of(rows_in(tmp_path), 4)
    where = {text_of(row, part.columns): part.fold for part in parts for row in part.held.rows}
    places = [place for part in parts for place in part.held.places]
    assert len(places) == len(set(places)) == 39 and rows_in_no_fold(parts) == ""
    texts = list(where)
    for number in set(near := clusters(texts).tolist()):
        assert len({where[text] for text, n in zip(texts, near, strict=True) if n == number}) == 1
    assert len(set(near)) == 30
    seeds = [part.seed(number) for number in range(3) for part in parts]
    assert seeds == list(range(12)), "no two runs of a method share a chance"
    alone = parts_of(rows_in(tmp_path, alone=True), 4)
    assert rows_in_no_fold(alone).startswith("1 row of 40 is in no fold")
    with pytest.raises(DataError, match="too few for 20 folds"):
        parts_of(replace(rows_in(tmp_path), data=DataSpec(source=str(_few(tmp_path)))), 20)


def _few(folder: Path) -> Path:
    path = folder / "few.csv"
    path.write_text("text,label\n" + "".join(f"{'abcdef'[i]} row,{'xy'[i % 2]}\n" for i in range(6)))
    return path


def test_what_a_fold_cannot_mean_is_refused_before_anything_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    base = RunSpec(model="nowhere", data=DataSpec(source="none.csv"))
    for folds in (1, 21):
        with pytest.raises(ConfigError, match=f"--cv {folds}: there can be 2 to 20"):
            check_cv(base, folds, [])
    for data, said in (
        (DataSpec(source="a", test="b"), "--test b"), (DataSpec(source="a", fold="1/2"), "--fold 1/2"),
        (DataSpec(source="a", test_share=0.3), "--test-share 0.3"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"{said} names rows to hold out as well"):
            check_cv(replace(base, data=data), 5, [])
    words = ["compare", "sample:minilm-l6", "--data", "sample:trec6", "--method", "lora,ia3", "--cv", "5"]
    assert (
        main([*words, "--race"]) == 2 and "--race chooses on the rows of one training half" in capsys.readouterr().err
    )


def test_pooled_rows_are_judged_once_and_the_same_command_computes_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, done, lines = rows_in(tmp_path), list[str](), list[str]()
    entrants = [entrant_of(name, read_word) for name in ("bitfit", "ia3")]

    class Killed(BaseException):
        pass

    class Dying(Here):
        def begin(self, entries: Sequence[Entry]) -> None:
            super().begin(entries[:3])
            if entries:
                raise Killed

    monkeypatch.setattr(run_file, "engine_named", lambda name, ledger, workers: Dying(ledger, done, ""))
    with pytest.raises(Killed):
        compare(base, entrants, seeds=2, home=tmp_path / "r", cv=2)
    monkeypatch.setattr(run_file, "engine_named", here(done))
    found = compare(base, entrants, seeds=2, home=tmp_path / "r", cv=2, say=lines.append)
    assert len(done) == len(set(done)) == 2 * 2 * 2
    assert found.rows == 39 and found.folds == 2 and found.seeds == (0, 1)
    assert any("2 seeds, 2 folds, 39 rows, 9 of them near copies" in line for line in lines)
    for one in found.standings:
        runs = [json.loads((tmp_path / "r" / run / "record.json").read_bytes()) for run in found.runs[one.name]]
        sizes = [
            len((tmp_path / "r" / run / "predictions.csv").read_text().splitlines()) - 1 for run in found.runs[one.name]
        ]
        rights = [run["scores"]["accuracy"] * n for run, n in zip(runs, sizes, strict=True)]
        assert one.scores == pytest.approx([sum(rights[:2]) / 39, sum(rights[2:]) / 39])
        assert one.fold_scores == pytest.approx([(rights[i] + rights[i + 2]) / 2 / sizes[i] for i in range(2)])
    assert any("is ahead of" in line for line in found.findings)
    assert any("learnt most rows in common is not counted" in line for line in found.findings)
    before = (tmp_path / "r" / "table.csv").read_bytes()
    table = list(csv.DictReader(before.decode().splitlines()))
    assert [(row["fold"], row["seed"]) for row in table[:4]] == [(str(1 + n % 2), str(n)) for n in range(4)]
    compare(base, entrants, seeds=2, home=tmp_path / "r", cv=2)
    assert len(done) == 8 and (tmp_path / "r" / "table.csv").read_bytes() == before

    story = gather([tmp_path / "r"])
    assert "--cv 2" in story.commands[0] and "fold=" not in story.commands[0]
    assert "## Fold by fold" in as_markdown(story)
    places = {row.place for row in disagreements(story)}
    held = [set(part.held.places) for part in parts_of(base, 2)]
    assert places and sum(bool(places & fold) for fold in held) > 1, "rows of every fold"


def test_rates_are_chosen_inside_each_fold_on_rows_that_it_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, done = rows_in(tmp_path), list[str]()
    monkeypatch.setattr(run_file, "engine_named", here(done))
    found = compare(base, [entrant_of("bitfit", read_word)], seeds=1, home=tmp_path / "r", cv=2, tune_lr=2)
    assert len(done) == 2 * 2 + 2 and found.rates == {} and len(found.fold_rates) == 2
    assert any("chosen anew in each of 2 folds" in line for line in found.findings)
    parts = parts_of(base, 2)
    for path in (tmp_path / "r" / "rates").iterdir():
        source = json.loads((path / "run.json").read_bytes())["spec"]["data"]["source"]
        texts = {json.loads(line)["text"] for line in Path(source).read_text().splitlines()}
        assert sum(texts == {row["text"] for row in part.data.train.rows} for part in parts) == 1
    assert "--tune-lr 2" in gather([tmp_path / "r"]).commands[0]


def test_words_learn_the_rows_that_the_runs_learn(tmp_path: Path) -> None:
    draw = random.Random(1)
    path = tmp_path / "rows.csv"
    body = [(" ".join(draw.choices("abcdefghij", k=9)) + f" {'xy'[i % 2]}", "pq"[i % 2]) for i in range(300)]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *body])
    base = RunSpec(
        model=str(little_model(tmp_path / "bert")), data=DataSpec(source=str(path)), steps=2, batch=BatchSpec(size=8),
        eval=EvalSpec(best=True, share=0.2), precision="fp32", threads=1, method="bitfit",
    )  # fmt: skip
    (part,) = parts_of(base, None)
    stopping, plain = tmp_path / "stopping", tmp_path / "plain"
    train(replace(base, out=str(stopping)), progress=False)
    train(replace(base, eval=EvalSpec(), out=str(plain)), progress=False)
    held = held_to_select(stopping)
    assert len(held) == 48 and held < set(part.data.train.places) and held_to_select(plain) == frozenset()
    seen: list[int] = []

    def counted(texts: Sequence[str], targets: object, asked: Sequence[str]) -> object:
        seen.append(len(texts))
        return np.zeros(len(asked), dtype=np.int64)

    asked = [type("Rows", (), {"places": list(part.held.places), "texts": [r["text"] for r in part.held.rows]})()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("luthier.comparison.baselines.answers_by_words", counted)
        made = baselines([part], asked, [[stopping]], {"p": 0, "q": 1})
        baselines([part], asked, [[stopping, plain]], {"p": 0, "q": 1})
    assert seen == [240 - 48, 240] and WORDS in made


def test_runs_of_folds_are_nested_and_of_one_fold_all_is_as_without() -> None:
    wanted, made = planted.answers(np.random.default_rng(0), [0.8, 0.7], rows=90, seeds=4)
    rows, near = np.arange(90), np.zeros(90, dtype=np.int64)
    without = resample(statistics.accuracy, wanted, made, rows)
    one = resample(statistics.accuracy, wanted, made, rows, folds=near)
    assert np.allclose(one.draws, without.draws, atol=1e-12)
    folds = np.repeat([0, 1, 2], 30)
    right = made[0] == wanted
    moved = _moved(lambda said: float((said == wanted).mean()), made[0], folds)
    own = np.array([[right[s][folds == f].mean() for s in range(4)] for f in range(3)])
    assert np.allclose(moved, (own - own.mean(axis=1, keepdims=True)) / 3), "its own deviation times its share of rows"


@pytest.mark.parametrize(
    ("race", "least"), [(planted.crossed_equal(3), 18), (planted.crossed_gain(6), 17)], ids=["equal", "gain"]
)
def test_what_was_planted_in_folds_is_found(race: planted.Race, least: int) -> None:
    assert sum(race(np.random.default_rng(number)) for number in range(20)) >= least
