"""Answers that a run writes to held-out rows: scored as those of predict would be, and what is forgotten beside it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from little import Heard, little_data, little_spec

from luthier.core import ConfigError
from luthier.data.load_data import load_inputs
from luthier.runs import RunFolder
from luthier.runs.spec import DataSpec, EvalSpec, RunSpec
from luthier.training import metrics
from luthier.workflow import Predictor, resume, train
from luthier.workflow.general_text import forgotten

SCORES = EvalSpec(metric="token_f1", best=True, every=4, written=7, new_tokens=5, forgetting=True)


def spec(home: Path, name: str = "run", **changes: object) -> RunSpec:
    return replace(little_spec(home, kind="llama", steps=8, eval=SCORES, out=str(home / name)), **changes)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("written")


def scored(path: Path) -> list[dict[str, float]]:
    return [e for e in RunFolder.open(path, write=False).events() if e["event"] == "scores"]


def test_a_run_selects_by_what_it_writes_and_goes_on_to_the_bit(home: Path) -> None:
    heard = Heard()
    result = train(spec(home), listener=heard)
    assert set(metrics.METRICS) > {"rouge_l", "bleu", "exact_match", "token_f1", "forgetting"} <= result.scores.keys()
    during = scored(home / "run")[:2]
    best = max(during, key=lambda e: (e["token_f1"], -e["step"]))
    taken = [e["step"] for e in RunFolder.open(home / "run", write=False).events() if e["event"] == "best_taken"]
    assert taken == ([] if best["step"] == 8 else [best["step"]])
    train(spec(home, "again"), stop_at=5)
    again = resume(home / "again")
    assert again.scores == result.scores and scored(home / "again") == scored(home / "run")


def test_the_scores_are_those_of_what_predict_answers(home: Path) -> None:
    if not (home / "run").exists():
        train(spec(home))
    predictor = Predictor(home / "run")
    table, columns = load_inputs(str(home / "turns.csv"), predictor.columns)
    found = json.loads((home / "run" / "samples.json").read_text())
    assert len(found) == 5 and set(found[0]) == {"place", "prompt", "wanted", "before", "after"}
    rows = [table.places.index(sample["place"]) for sample in found]
    said = predictor.rows(table.take(rows), max_new_tokens=5)
    assert [row["text"] for row in said] == [sample["after"] for sample in found]
    assert [table.rows[row][columns.response] for row in rows] == [sample["wanted"] for sample in found]
    assert any(sample["before"] != sample["after"] for sample in found)


def test_what_is_forgotten_is_the_rise_of_the_loss_over_the_base(home: Path) -> None:
    if not (home / "run").exists():
        train(spec(home))
    predictor = Predictor(home / "run")
    by = (predictor.tokenizer, predictor.precision, predictor.device)
    kept = json.loads((home / "run" / "scores.json").read_text())["forgetting"]
    assert forgotten(predictor.tuned, *by) == pytest.approx(kept, abs=1e-5) and kept != 0
    predictor.tuned.activate()
    assert forgotten(predictor.tuned, *by) == 0, "the base forgets nothing"


def test_rows_without_one_answer_in_text_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "plain.csv").write_text("text\n" + "\n".join(f"the cat sat on {n} mats" for n in range(40)))
    plain = DataSpec(source=str(tmp_path / "plain.csv"))
    pairs = DataSpec(source=str(little_data(tmp_path / "pairs.csv", kind="pairs")))
    for data, task, evaluation, why in (
        (plain, "causal_lm", SCORES, "rows of plain text have no one answer"),
        (pairs, "preference", replace(SCORES, metric=None), "rows of task preference have no one answer"),
    ):
        with pytest.raises(ConfigError, match=why):
            train(spec(tmp_path, data=data, task=task, eval=replace(evaluation, forgetting=False)))
    labelled = little_spec(tmp_path, eval=EvalSpec(forgetting=True))
    with pytest.raises(ConfigError, match="this task is classification"):
        train(labelled)
    assert not (tmp_path / "run").exists()
