"""Thresholds of a run are read by whoever answers; what is unsure is marked, task by task."""

import csv
import json
from pathlib import Path

import pytest
from little import little_model

from luthier.core import ConfigError
from luthier.data.tasks import Task
from luthier.runs.spec import BatchSpec, DataSpec, EvalSpec, RunSpec
from luthier.workflow import Predictor, evaluate, train
from luthier.workflow.unsure import check_unsure, unsure_of


def test_thresholds_are_stored_with_the_tuning_and_predict_and_evaluate_go_by_them(tmp_path: Path) -> None:
    words = {"red": ["colour"], "dog": ["animal"], "cat": ["animal", "pet"], "blue": ["colour", "pet"]}
    rows = [{"text": f"{w} is {v}", "label": words[w]} for w in words for v in ("how", "far", "tall", "it", "the") * 4]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = RunSpec(
        model=str(little_model(tmp_path / "bert", "bert")), data=DataSpec(source=str(data)), method="bitfit", steps=2,
        batch=BatchSpec(size=8), precision="fp32", threads=1, out=str(tmp_path / "run"),
        eval=EvalSpec(thresholds=True, share=0.4),
    )  # fmt: skip
    result = train(spec)
    predictor = Predictor(tmp_path / "run")
    at = predictor.task.thresholds
    assert len(at) == 3 and at != (0.5, 0.5, 0.5), "after two steps no label is at one half"
    found = predictor.texts([row["text"] for row in rows[:20]], unsure=0.9)
    for answer in found:
        shares = list(answer["probabilities"].values())
        assert answer["label"] == [n for n, p, t in zip(predictor.task.labels, shares, at, strict=True) if p >= t]
        assert answer["unsure"], "nothing is learnt to nine tenths in two steps"
    with (tmp_path / "run" / "predictions.csv").open(newline="") as file:
        kept = list(csv.DictReader(file))
    answers = predictor.texts([row["text"] for row in kept])
    assert [json.loads(row["answer"]) for row in kept] == [a["label"] for a in answers]
    (tmp_path / "kept.jsonl").write_text(
        "".join(json.dumps({"text": r["text"], "label": json.loads(r["wanted"])}) + "\n" for r in kept)
    )
    assert evaluate(tmp_path / "run", str(tmp_path / "kept.jsonl")).scores["micro_f1"] == pytest.approx(
        result.scores["micro_f1"]
    )


def test_what_is_unsure_is_said_for_labels_several_labels_and_tags() -> None:
    label = {"label": "a", "probabilities": {"a": 0.55, "b": 0.45}}
    assert unsure_of(label, 0.6) is True and unsure_of(label, 0.5) is False
    several = {"label": ["a"], "probabilities": {"a": 0.55, "b": 0.05, "c": 0.48}}
    assert unsure_of(several, 0.6) == ["a", "c"] and unsure_of(several, 0.5) == []
    tags = {"tags": ["O", None, "B-LOC"], "sure": [0.9, None, 0.4]}
    assert unsure_of(tags, 0.6) == [2]
    with pytest.raises(ConfigError, match="answers in numbers"):
        check_unsure(0.6, Task(name="regression"))
    with pytest.raises(ConfigError, match="answers in text"):
        check_unsure(0.6, Task(name="causal_lm"))
    with pytest.raises(ConfigError, match="got 60"):
        check_unsure(60, Task(name="classification", labels=("a", "b")))
