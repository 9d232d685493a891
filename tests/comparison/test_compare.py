"""A comparison from its cells to its words, on tiny runs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from little import little_model
from races import base_in, here

from luthier.cli._main import main
from luthier.comparison import Entrant, compare, entrant_of, statistics
from luthier.comparison import run as run_file
from luthier.comparison.cells import Sweep, cells_of
from luthier.comparison.verdict import Costs, judge
from luthier.core import ConfigError, DataError, LuthierError
from luthier.core.config import read_word
from luthier.runs.ledger import Ledger
from luthier.runs.spec import DataSpec, RunSpec
from luthier.workflow import train


@pytest.fixture(autouse=True)
def _fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "DRAWS", 200)


def test_what_is_finished_is_not_run_again_and_a_failure_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, done, lines = base_in(tmp_path), list[str](), list[str]()
    entrants = [entrant_of(name, read_word) for name in ("bitfit", "lora:rank=2", "ia3")]
    monkeypatch.setattr(run_file, "engine_named", here(done, fail="ia3"))
    first = compare(base, entrants, seeds=2, home=tmp_path / "race", say=lines.append)
    assert len(done) == 4 and len(set(done)) == 4
    assert {s.name for s in first.standings} == {"bitfit", "lora:rank=2"}
    assert first.failed == {"ia3": "it may not"} and any("ia3 has no result" in line for line in first.findings)
    assert any("most likely not be seen" in line for line in lines), "said before the first run"
    lora = json.loads(next((tmp_path / "race" / "cells").glob("lora*")).joinpath("run.json").read_text())
    assert lora["spec"]["settings"] == {"rank": 2}
    again = compare(base, entrants[:2], seeds=2, home=tmp_path / "race", say=lines.append)
    assert len(done) == 4, "the same cells are found again"
    assert again.standings == first.standings
    assert json.loads((tmp_path / "race" / "comparison.json").read_text())["rows"] == first.rows
    assert "always answering" in " ".join(first.baselines)


def test_a_cell_is_found_by_everything_that_its_run_depends_on(tmp_path: Path) -> None:
    base = RunSpec(model="m", data=DataSpec(source="d"), steps=3)
    one = cells_of(base, [Entrant("lora", "lora", {})], range(2), tmp_path)
    assert one[0].path != one[1].path
    other = cells_of(
        RunSpec(model="m", data=DataSpec(source="d"), steps=4), [Entrant("lora", "lora", {})], [0], tmp_path
    )
    assert other[0].path != one[0].path
    assert cells_of(base, [Entrant("lora", "lora", {})], [0], tmp_path)[0] == one[0]


def standing(answered: Any, seeds: int, **kwargs: Any) -> Any:
    wanted = np.zeros(answered.shape[2], dtype=np.int64)
    names = [f"m{i}" for i in range(len(answered))]
    costs = [Costs(trained=100 // (i + 1), seconds=1.0, peak_bytes=None, stored_bytes=1) for i in range(len(names))]
    return judge(
        names, answered, wanted, np.arange(len(wanted)), seeds=range(seeds), metric="accuracy", costs=costs,
        **{"margin": None, "baselines": {}, "failed": {}, **kwargs},
    )  # fmt: skip


def test_an_interval_ends_where_the_score_does() -> None:
    right = np.zeros((1, 3, 9), dtype=np.int64)
    right[0, 1, 1:], right[0, 2, :1] = 1, 1  # seeds far apart: their spread alone would reach beyond
    (only,) = standing(right, 3).standings
    assert (only.low, only.high) == (0.0, 1.0) and 0 < only.score < 1


def test_equal_methods_tie_and_the_one_that_trains_least_is_named() -> None:
    right = np.zeros((2, 1, 300), dtype=np.int64)
    right[:, :, :60] = 1
    found = standing(right, 1)
    assert [s.word for s in found.standings] == ["best", "ties"]
    assert "m1 is within 0.010 of it, so it ties." in found.findings
    assert any("m1 trains 2.0 times fewer numbers" in line for line in found.findings)


def test_a_worse_method_is_worse_on_these_seeds_until_there_are_six() -> None:
    answers = np.zeros((2, 6, 300), dtype=np.int64)
    answers[0, :, :30] = 1
    answers[1, :, :90] = 1
    few, many = standing(answers[:, :2], 2), standing(answers, 6)
    assert "m1 is worse than it on these seeds." in few.findings
    assert any("cannot be told from 2 seeds" in line for line in few.findings)
    assert "m1 is worse than it." in many.findings
    assert few.standings[1].flips == ((60, 0), (60, 0)) and few.standings[1].mcnemar[0] < 1e-9


def test_a_difference_that_is_seen_is_a_tie_only_on_the_users_word() -> None:
    answers = np.zeros((2, 3, 1000), dtype=np.int64)
    answers[1, :, :15] = 1
    assert standing(answers, 3).standings[1].word == "worse"
    assert standing(answers, 3, margin=0.05).standings[1].word == "ties"
    one = standing(answers[:, :1], 1, margin=0.05)
    assert one.standings[1].word == "not told apart"
    assert any(line.startswith("On these rows m0 alone is right in 15, m1 alone in 0") for line in one.findings)


def test_few_rows_cannot_tell_and_a_baseline_that_wins_is_the_headline() -> None:
    answers = np.zeros((2, 1, 20), dtype=np.int64)
    answers[0, 0, :4], answers[1, 0, 3:8] = 1, 1
    found = standing(answers, 1, baselines={"word counts": np.zeros(20, dtype=np.int64)})
    assert found.standings[1].word == "not told apart"
    assert found.findings[0].startswith("No method beats word counts, whose accuracy on these rows is 1.000")


@pytest.mark.slow
def test_processes_give_what_one_process_gives(tmp_path: Path) -> None:
    base = base_in(tmp_path)
    entrants = [entrant_of(name, read_word) for name in ("bitfit", "ia3")]
    found = compare(base, entrants, seeds=1, home=tmp_path / "race", workers=2)
    alone = train(RunSpec(**{**vars(base), "method": "bitfit", "out": str(tmp_path / "alone")}), progress=False)
    scores = {s.name: s.score for s in found.standings}
    assert scores["bitfit"] == pytest.approx(alone.scores["accuracy"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "lora,lora"], "stands twice"),
        (["--method", "lroa"], "Did you mean"),
        (["--method", "lora:rank"], "'rank' is no setting"),
        (["--method", "family:additve"], "Did you mean 'additive'"),
        ([], "no methods are named"),
        (["--method", "lora,ia3", "--metric", "f1"], "--metric 'f1'"),
        (["--method", "lora,ia3", "--margin", "5"], "--margin 5"),
        (["--method", "lora", "--strategy", "lldr"], "Did you mean 'llrd'"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_read(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["compare", "sample:minilm-l6", "--data", "sample:trec6", "--steps", "1", "--out", str(tmp_path / "r")]
    assert main([*base, *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(("made", "said"), [("file", "is a file"), ("run", "is the folder of a run")])
def test_a_folder_that_is_none_is_refused_before_the_data_are_read(made: str, said: str, tmp_path: Path) -> None:
    home = tmp_path / "r"
    if made == "file":
        home.write_text("mine")
    else:
        home.mkdir()
        (home / "run.json").write_text("{}")
    base = RunSpec(model="nowhere", data=DataSpec(source="nothing.csv"), steps=1)
    with pytest.raises(ConfigError, match=said):
        compare(base, [Entrant("lora", "lora", {})], seeds=1, home=home)


def test_a_task_without_one_label_a_row_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "numbers.csv"
    data.write_text("text,label\n" + "".join(f"row {i},{i / 7:.3f}\n" for i in range(40)))
    base = RunSpec(model=str(little_model(tmp_path / "bert")), data=DataSpec(source=str(data)), steps=1)
    with pytest.raises(ConfigError, match="the task is regression"):
        compare(base, [Entrant("lora", "lora", {})], seeds=1, home=tmp_path / "r")


def test_held_out_rows_that_are_one_row_over_and_over_are_refused(tmp_path: Path) -> None:
    test, base = tmp_path / "copies.csv", base_in(tmp_path)
    test.write_text("text,label\n" + 6 * "the very same row again,bad\n")
    base = replace(base, data=replace(base.data, test=str(test), test_share=0.1))
    with pytest.raises(DataError, match=r"near copies of one another.*--test FILE"):
        compare(base, [Entrant("lora", "lora", {})], seeds=1, home=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_where_nothing_has_a_result_the_reasons_are_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_file, "engine_named", here([], fail="ia3"))
    with pytest.raises(LuthierError, match="ia3: it may not"):
        compare(base_in(tmp_path), [Entrant("ia3", "ia3", {})], seeds=1, home=tmp_path / "r")


def test_where_a_baseline_wins_the_headline_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    base = base_in(tmp_path)
    monkeypatch.setattr(run_file, "engine_named", here([]))
    words = ["compare", base.model, "--data", base.data.source, "--method", "bitfit", "--seeds", "1", "--steps", "1"]
    assert main([*words, "--precision", "fp32", "--threads", "1", "--out", str(tmp_path / "r")]) == 0
    said = next(line for line in capfd.readouterr().out.splitlines() if line)
    assert (
        said.startswith("No method beats always answering 'good'")
        and "Train longer, with other rates, or on more rows" in said
    )
    assert main(["report", str(tmp_path / "r"), "--format", "md"]) == 0
    assert "No method beats always answering" in capfd.readouterr().out.split("\n\n")[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["worker", "--ledger", "nowhere"], "holds no ledger"),
        (["compare", "m", "--data", "d", "--method", "lora", "--engine", "rai"], "Did you mean 'ray'"),
        (["compare", "m", "--data", "d", "--method", "lora", "--tune-lr", "3", "--search", "tpe"], "grid, halving"),
    ],
)
def test_who_cannot_work_is_told_why(words: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    words = [*words, "--out", "runs/none"] if words[0] == "compare" else words
    words = ["sample:minilm-l6" if w == "m" else "sample:trec6" if w == "d" else w for w in words]
    assert main(words) == 2 and said in capfd.readouterr().err


def test_a_run_that_was_deleted_is_made_again_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, done = base_in(tmp_path), list[str]()
    monkeypatch.setattr(run_file, "engine_named", here(done))
    entrants = [entrant_of(name, read_word) for name in ("bitfit", "ia3")]
    compare(base, entrants, seeds=1, home=tmp_path / "r")
    before = (tmp_path / "r" / "table.csv").read_bytes()
    gone = tmp_path / "r" / "cells" / done[0]
    shutil.rmtree(gone)
    compare(base, entrants, seeds=1, home=tmp_path / "r")
    assert done == [done[0], done[1], done[0]] and (tmp_path / "r" / "table.csv").read_bytes() == before
    sweep = Sweep(Ledger(tmp_path / "r"), lambda n: here(done)("", Ledger(tmp_path / "r"), n))
    cells = cells_of(base, entrants, [0], tmp_path / "r")
    assert sweep.standing(cells) == 2
    next((tmp_path / "r" / "ledger" / "results").iterdir()).write_text('{"sco')
    assert sweep.standing(cells) == 1, "what will be said to be finished, and what will be computed, are all"
