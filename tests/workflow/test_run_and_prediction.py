"""A measure is learnt from one file without a test half, and a prediction uses the base as training did."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from little import little_data, little_model

from luthier.core import ConfigError, DataError, UnknownName
from luthier.runs.spec import BatchSpec, DataSpec, RunSpec
from luthier.training.loop import Loop
from luthier.workflow import Predictor, finish, predict, train


def _spec(folder: Path, data: Path, method: str) -> RunSpec:
    model = little_model(folder / "model")
    return RunSpec(
        model=str(model), data=DataSpec(source=str(data)), method=method, steps=4, batch=BatchSpec(size=4),
        precision="bf16", threads=1, out=str(folder / "run"),
    )  # fmt: skip


def test_measures_that_are_all_different_can_be_held_out(tmp_path: Path) -> None:
    data = tmp_path / "measures.csv"
    rows = [*csv.reader(little_data(tmp_path / "rows.csv").read_text().splitlines())][1:]
    with data.open("w", newline="") as file:
        csv.writer(file).writerows([["text", "score"], *[[text, i + 0.37] for i, (text, _) in enumerate(rows)]])
    spec = _spec(tmp_path, data, "lora")
    result = train(RunSpec.from_plain({**_plain(spec), "data": {"source": str(data), "label": "score"}}))
    assert {"pearson", "spearman", "mse"} <= set(result.scores)


def _plain(spec: RunSpec) -> dict:
    from luthier.core import plain

    return {k: v for k, v in plain(spec).items() if v is not None}


@pytest.mark.parametrize(("method", "dtype"), [("lora", torch.bfloat16), ("child_tuning_d", torch.float32)])
def test_a_prediction_loads_the_base_in_the_type_it_was_trained_in(
    method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    data = little_data(tmp_path / "rows.csv")
    train(_spec(tmp_path, data, method))
    predictor = Predictor(tmp_path / "run")
    assert predictor.tuned.model.get_input_embeddings().weight.dtype == dtype
    assert len(predict(tmp_path / "run", data=str(data))) == 46


def test_rows_to_predict_must_have_the_column_that_was_read(tmp_path: Path) -> None:
    train(_spec(tmp_path, little_data(tmp_path / "rows.csv"), "lora"))
    other = tmp_path / "other.csv"
    other.write_text("words\nhello\n")
    with pytest.raises(DataError, match="no column 'text'"):
        predict(tmp_path / "run", data=str(other))


def test_rows_of_one_prediction_may_have_the_tunings_of_several_runs(tmp_path: Path) -> None:
    data = little_data(tmp_path / "rows.csv")
    spec = replace(_spec(tmp_path, data, "lora"), precision="fp32")
    train(spec)
    train(replace(spec, method="ia3", seed=1, out=str(tmp_path / "second")))
    own = Predictor(tmp_path / "run")
    texts = ["a b c", "some more words", "d", "e f"]
    first = own.texts(texts)
    second = Predictor(tmp_path / "second").texts(texts)
    own.add("second", tmp_path / "second")
    assert own.texts(texts) == first, "what was added sleeps"
    mixed = own.texts(texts, tunings=["second", "default", "default", "second"])
    for found, wanted in zip(mixed, [second[0], first[1], first[2], second[3]], strict=True):
        assert found["label"] == wanted["label"]
        assert found["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-4)
    assert first[0]["probabilities"] != pytest.approx(second[0]["probabilities"], abs=1e-4)
    with pytest.raises(ConfigError, match="2 tunings are named for 4 rows"):
        own.texts(texts, tunings=["default", "second"])
    with pytest.raises(UnknownName, match="No tuning is called 'third'"):
        own.texts(texts, tunings=["default", "second", "third", None])


def test_a_run_that_reads_rows_otherwise_cannot_be_added(tmp_path: Path) -> None:
    data = little_data(tmp_path / "rows.csv")
    spec = _spec(tmp_path, data, "lora")
    train(spec)
    train(replace(spec, max_length=9, out=str(tmp_path / "second")))
    with pytest.raises(ConfigError, match="differs from this run in max_length"):
        Predictor(tmp_path / "run").add("second", tmp_path / "second")


@pytest.mark.parametrize("method", ["lora", "adamix", "diff_pruning", "propetl"])
def test_what_is_attached_trains_in_training_mode_also_where_nothing_is_evaluated_on_the_way(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[bool]] = []
    gradients = Loop._gradients

    def watched(loop: Loop, *args: Any) -> list[float]:
        seen.append({m.training for t in loop.tuned.tunings.values() for m in t.modules()})
        return gradients(loop, *args)

    monkeypatch.setattr(Loop, "_gradients", watched)
    train(_spec(tmp_path, little_data(tmp_path / "rows.csv"), method))
    assert len(seen) > 4 and all(modes == {True} for modes in seen)


def test_what_only_steps_need_is_let_go_before_the_result_is_saved_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    refuse = finish._refuse_base

    def watched(prepared: Any, loop: Loop) -> None:
        held.append(loop.optimiser.state_bytes() + loop.optimiser.gradient_bytes())
        refuse(prepared, loop)

    monkeypatch.setattr(finish, "_refuse_base", watched)
    train(_spec(tmp_path, little_data(tmp_path / "rows.csv"), "full"))
    assert held == [0]


def test_dropout_of_lora_drops_also_where_nothing_is_evaluated_on_the_way(tmp_path: Path) -> None:
    data = little_data(tmp_path / "rows.csv")
    losses = []
    for share in (0.0, 0.9):
        spec = replace(_spec(tmp_path / str(share), data, "lora"), settings={"dropout": share}, precision="fp32")
        train(spec)
        events = [
            json.loads(line) for line in (tmp_path / str(share) / "run" / "events.jsonl").read_text().splitlines()
        ]
        losses.append([e["loss"] for e in events if e.get("event") == "step" or "loss" in e])
    assert losses[0] != losses[1]


def test_a_field_of_the_run_among_a_methods_settings_is_told_where_it_belongs(tmp_path: Path) -> None:
    spec = replace(
        _spec(tmp_path, little_data(tmp_path / "rows.csv"), "lora"), settings={"gradient_checkpointing": True}
    )
    with pytest.raises(UnknownName, match=r"run\.gradient_checkpointing"):
        train(spec)
    assert not (tmp_path / "run").exists()
