"""`--long windows`: a run learns, scores and predicts long rows in windows; its answers are the means of theirs."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from little import Heard, little_model, little_spec
from word_tables import WORDS

from luthier.core import ConfigError
from luthier.runs.spec import DataSpec, EvalSpec, RunSpec
from luthier.workflow import Predictor, evaluate, resume, train
from luthier.workflow.merged_folder import merge


def long_rows(path: Path, n: int = 36, *, number: bool = False) -> Path:
    """The word that tells the label stands somewhere in 8 or in 40 words."""
    words = [w for w in WORDS if w not in ("good", "bad")]
    with path.open("w") as file:
        for i in range(n):
            told = ("good", "bad")[i % 2]
            text = [words[(7 * i + k) % len(words)] for k in range(40 if i % 3 else 8)]
            text[(11 * i) % len(text)] = told
            file.write(
                json.dumps({"text": " ".join(text), "label": float(i % 2) + 0.01 * i if number else told}) + "\n"
            )
    return path


def spec_of(home: Path, **changes: object) -> RunSpec:
    data = long_rows(home / "rows.jsonl", number=changes.pop("number", False) is True)
    return little_spec(home, data=DataSpec(source=str(data)), max_length=12, long="windows", **changes)


def test_a_run_in_windows_scores_evaluates_and_predicts_alike(tmp_path: Path) -> None:
    heard = Heard()
    result = train(spec_of(tmp_path, steps=6), listener=heard)
    assert "rows of more than 12 tokens are read in" in heard.text and "0 truncated" in heard.text
    with (result.path / "predictions.csv").open(newline="") as file:
        kept = list(csv.DictReader(file))
    assert len({row["place"] for row in kept}) == len(kept) == result.quality.rows, "a row is scored once"  # type: ignore[union-attr]
    predictor = Predictor(result.path)
    answers = predictor.texts([row["text"] for row in kept])
    assert [row["answer"] for row in kept] == [a["label"] for a in answers] and not any("note" in a for a in answers)
    sure = [max(a["probabilities"].values()) for a in answers]
    assert [float(row["sure"]) for row in kept] == pytest.approx(sure, abs=2e-4)
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps({"text": r["text"], "label": r["wanted"]}) + "\n" for r in kept))
    found = evaluate(result.path, str(held))
    assert found.rows == len(kept) and found.scores == pytest.approx(result.scores, abs=1e-5)


def test_an_answer_is_the_softmax_of_the_mean_of_the_windows_logits(tmp_path: Path) -> None:
    predictor = Predictor(train(spec_of(tmp_path, steps=3)).path)
    long = " ".join([WORDS[i % len(WORDS)] for i in range(25)])
    words, room = long.split(), 10
    starts = np.linspace(0, 25 - room, 3).round().astype(int)
    pieces = [" ".join(words[s : s + room]) for s in starts]
    logits = [np.log(list(a["probabilities"].values())) for a in predictor.texts(pieces)]  # up to a constant each
    mean = np.exp(np.mean(logits, axis=0))
    whole = list(predictor.texts([long])[0]["probabilities"].values())
    assert whole == pytest.approx((mean / mean.sum()).tolist(), abs=1e-5)


def test_numbers_are_learnt_in_windows_too_and_the_rows_held_out_to_select_by_are_read_so(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, number=True, steps=6, eval=EvalSpec(best=True, every=3, share=0.3))
    result = train(spec)
    answer = Predictor(result.path).texts([" ".join(WORDS[:20])])[0]
    assert set(answer) == {"value"} and "pearson" in result.scores


def test_a_resumed_run_reads_the_same_windows(tmp_path: Path) -> None:
    once, twice = tmp_path / "a", tmp_path / "b"
    for home in (once, twice):
        home.mkdir()
    whole = train(spec_of(once, steps=8))
    train(spec_of(twice, steps=8), stop_at=3)
    again = resume(twice / "run")
    assert again.scores == whole.scores
    files = [(home / "run" / "tuning" / "tuning.safetensors").read_bytes() for home in (once, twice)]
    assert files[0] == files[1]


def test_what_leaves_the_house_says_how_long_rows_were_read(tmp_path: Path) -> None:
    path = train(spec_of(tmp_path, steps=2)).path
    said = (merge(path, tmp_path / "merged") / "README.md").read_text()
    assert "read in windows" in said and "logits" in said


def test_a_language_task_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    little_model(tmp_path / "llama", "llama")
    with pytest.raises(ConfigError, match="long: windows need rows with one answer each"):
        train(little_spec(tmp_path, kind="llama", long="windows"))
    assert not (tmp_path / "run").exists()
