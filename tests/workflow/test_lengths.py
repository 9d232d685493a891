"""The steps that rows make: their lengths, micro-batches and number are those of the run itself."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from little import little_model

from luthier.core import DataError
from luthier.data.load_data import load_data
from luthier.runs.spec import BatchSpec, DataSpec, EvalSpec, RunSpec
from luthier.workflow import train
from luthier.workflow.lengths import assumed_steps, steps_of_rows
from luthier.workflow.outline import outline_of

ROWS = ["text,label"] + [f"{'red ' * (1 + 3 * (n % 9))}{n},{'ab'[n % 2]}" for n in range(60)]


def spec_of(folder: Path, **more: object) -> RunSpec:
    data = folder / "rows.csv"
    data.write_text("\n".join(ROWS) + "\n")
    values = {"method": "bitfit", "precision": "fp32", "threads": 1, "batch": BatchSpec(size=8, tokens=64), **more}
    return RunSpec(model=str(little_model(folder / "bert", "bert")), data=DataSpec(source=str(data)), **values)  # type: ignore[arg-type]


def steps_in(spec: RunSpec):  # type: ignore[no-untyped-def]
    outline = outline_of(spec.model)
    return steps_of_rows(spec, outline, load_data(spec.data, spec.task, outline.config))


def test_steps_are_as_wide_and_as_many_as_those_of_the_run(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, epochs=1.0, eval=EvalSpec(rows=4), out=str(tmp_path / "run"))
    found = steps_in(spec)
    record = train(spec).record
    assert found.widest == (record.forecast["rows"], record.forecast["tokens"])
    assert record.timing["steps"] == found.total - 1, "the first step is not timed"
    assert record.timing["pieces"] >= 1 and found.pieces > 1, "the longest steps are cut"
    lines = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    without_padding = np.mean([line["tokens"] for line in lines if line["event"] == "step"])
    assert without_padding <= found.tokens < 1.6 * without_padding
    assert found.tokens == pytest.approx(record.timing["tokens"], rel=0.2)
    assert found.width == pytest.approx(record.timing["width"], rel=0.2)


def test_how_long_a_run_trains_follows_from_its_rows_where_nobody_says_it(tmp_path: Path) -> None:
    few = steps_in(spec_of(tmp_path))
    assert few.total == 40 * -(-48 // 8), "40 epochs of the 48 rows that are learnt from"
    assert steps_in(spec_of(tmp_path, steps=7)).total == 7


def test_one_length_is_assumed_where_no_rows_say_another(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, batch=BatchSpec(size=10, tokens=100))
    found = assumed_steps(spec, 30)
    assert (found.widest, found.tokens, found.pieces, found.total) == ((3, 30), 300, 4, None)
    bare = outline_of(str(Path(spec.model) / "config.json"))
    said = steps_of_rows(spec, bare, load_data(spec.data, spec.task, bare.config))
    assert isinstance(said, str) and "tokenizer" in said


def test_a_file_without_rows_has_no_steps(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    Path(spec.data.source).write_text("text,label\n")
    with pytest.raises(DataError):
        steps_in(spec)


def test_rows_that_share_a_line_make_the_lines_of_the_run(tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": "red " * (1 + 3 * (n % 9))}) + "\n" for n in range(40)))
    model = str(little_model(tmp_path / "gpt2", "gpt2"))
    batch = BatchSpec(size=8, tokens=64, pack=True, group_by_length=False)
    spec = RunSpec(
        model=model, data=DataSpec(source=str(texts)), method="bitfit", precision="fp32", threads=1, batch=batch,
        task="causal_lm", epochs=1.0, eval=EvalSpec(rows=4), out=str(tmp_path / "run"),
    )  # fmt: skip
    found, record = steps_in(spec), train(spec).record
    padded = steps_in(replace(spec, batch=replace(batch, pack=False)))
    assert found.widest == (record.forecast["rows"], record.forecast["tokens"])
    assert found.tokens == pytest.approx(record.timing["tokens"], rel=0.2) and found.tokens < 0.9 * padded.tokens
    assert found.rows < padded.rows == 8, "several rows stand in a line"
