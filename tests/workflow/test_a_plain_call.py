"""`train(model, data, ...)`: names as the command line has them, rows from a file or from memory."""

import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from little import little_data, little_model

from luthier.core import ConfigError, DataError, UnknownName, UsageError
from luthier.workflow import resume, train
from luthier.workflow.call import spec_of

ROWS = [
    {"text": f"{word} is {kind}", "label": kind} for word in ("how", "far", "tall", "who") for kind in ("a", "of")
] * 3


def test_words_of_a_call_go_where_the_command_line_puts_them() -> None:
    spec = spec_of("m", "rows.csv", {"method": "lora", "epochs": 2, "rank": 16, "lr": 0.01, "batch": 4, "text": "t"})
    assert (spec.model, spec.data.source, spec.epochs, spec.settings) == ("m", "rows.csv", 2, {"rank": 16})
    assert (spec.optim.lr, spec.batch.size, spec.data.text) == (0.01, 4, "t")
    with pytest.raises(ConfigError, match=r"epochs: must be above 0, got -1"):
        spec_of("m", "rows.csv", {"epochs": -1})
    with pytest.raises(UsageError, match=r"no rows to learn from"):
        spec_of("m", None, {})


@pytest.mark.parametrize("kind", ["list", "frame", "dataset", "halves"])
def test_rows_of_memory_are_learnt_and_the_run_can_be_resumed(tmp_path: Path, kind: str) -> None:
    made: dict[str, Any] = {
        "list": lambda: ROWS,
        "frame": lambda: pd.DataFrame(ROWS),
        "dataset": lambda: datasets.Dataset.from_list(ROWS),
        "halves": lambda: datasets.DatasetDict(
            {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:4])}
        ),
    }
    model = little_model(tmp_path / "model")
    out = tmp_path / "runs" / "one"
    words = {"method": "lora", "steps": 4, "batch": 4, "rank": 2, "threads": 1, "precision": "fp32"}
    assert train(model, made[kind](), out=str(out), stop_at=2, **words).record.status == "paused"
    result = resume(out)
    assert result.record.status == "finished" and result.record.bit_exact
    assert result.record.spec["settings"] == {"rank": 2}
    kept = Path(result.record.spec["data"]["source"])
    assert [json.loads(line) for line in kept.read_text().splitlines()] == ROWS
    assert (result.record.spec["data"]["test"] is not None) == (kind == "halves")


def test_a_resumed_run_tells_the_time_of_all_its_attempts(tmp_path: Path) -> None:
    out = tmp_path / "run"
    model, data = little_model(tmp_path / "model"), little_data(tmp_path / "rows.csv")
    train(model, data, steps=3, threads=1, precision="fp32", out=str(out), stop_at=1, progress=False)
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    for event in events:
        if event["event"] == "paused":
            event["seconds"] = 1000.0
    (out / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert 1000 < resume(out).record.seconds < 2000


def test_a_result_is_short_and_answers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, data = little_model(tmp_path / "model"), little_data(tmp_path / "rows.csv")
    words = {"steps": 2, "threads": 1, "precision": "fp32", "out": str(tmp_path / "run")}
    result = train(model, data, progress=False, **words)
    assert capfd.readouterr() == ("", "")
    assert len(repr(result)) < 400 and f"accuracy {result.scores['accuracy']:.4g}" in repr(result)
    assert result._repr_html_().startswith("<table>") and "accuracy" in result._repr_html_()
    assert result.predict("good good") == result.predict(["good good"])
    assert (result.merge(tmp_path / "plain") / "model.safetensors").exists()
    train(model, data, progress=True, **{**words, "out": str(tmp_path / "shown")})
    shown = capfd.readouterr()
    assert not shown.out and "columns: a text with a label" in shown.err


@pytest.mark.parametrize(
    ("model", "data", "given", "error", "says"),
    [
        (object(), "rows.csv", {}, UsageError, "luthier.attach"),
        ("m", 3, {}, DataError, "int is no table"),
        ("m", [], {}, DataError, "holds no rows"),
        ("m", ["text"], {}, DataError, r"data\[0\]: str is no row"),
        ("m", "rows.csv", {"epochs": 1, "steps": 2}, ConfigError, "give one of the two"),
        ("m", "rows.csv", {"precision": "int8"}, ConfigError, "'int8'"),
        ("m", "rows.csv", {"seed": "a"}, ConfigError, "whole number"),
    ],
)
def test_what_cannot_work_is_said_at_once(model: Any, data: Any, given: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        train(model, data, **given)


def test_names_of_peft_in_a_call_are_answered(tmp_path: Path) -> None:
    model, data = little_model(tmp_path / "model"), little_data(tmp_path / "rows.csv")
    with pytest.raises(UnknownName, match=r"lora_alpha is called alpha here: alpha=8"):
        train(model, data, lora_alpha=8, out=str(tmp_path / "run"))
    with pytest.raises(UnknownName, match=r"'epoch' is no field.*'epochs'"):
        train(model, data, epoch=2, out=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
