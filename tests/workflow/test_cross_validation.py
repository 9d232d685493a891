"""Cross-validation: folds that are a partition, ordinary runs, finished ones not run again, a run on all rows."""

import json
from pathlib import Path
from typing import Any

import pytest
from little import little_model
from scipy import stats

from luthier.core import ConfigError, DataError
from luthier.data.load_data import load_data
from luthier.data.rows import Table, fold_of
from luthier.runs.spec import BatchSpec, DataSpec, RunSpec
from luthier.workflow import Predictor, cross_validate, cross_validation
from luthier.workflow import run as run_file


def _table(rows: list[tuple[str, str]]) -> Table:
    return Table([{"t": t, "y": y} for t, y in rows], [f"r:{i}" for i in range(len(rows))], "r")


def test_each_row_is_in_one_fold_repeated_rows_together_and_classes_alike() -> None:
    rows = [(f"text {i % 40}", "ab"[i % 40 % 2]) for i in range(50)] + [("alone", "c")]
    table = _table(rows)
    folds = [fold_of(table, n, 4, 0, lambda r: r["t"], lambda r: r["y"]) for n in (1, 2, 3, 4)]
    assert sorted(i for fold in folds for i in fold) == list(range(50)), "all but the class of one row"
    where = {i: n for n, fold in enumerate(folds) for i in fold}
    assert all(where[i] == where[i + 40] for i in range(10))
    for fold in folds:
        contents = {rows[i] for i in fold}
        assert len(contents) == 10 and sum(y == "a" for _, y in contents) == 5
    with pytest.raises(DataError, match="too few for 4 folds"):
        fold_of(_table(rows[:3]), 1, 4, 0, lambda r: r["t"])


def test_a_fold_is_a_field_of_the_rows_and_wrong_ones_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"row {i},{'xy'[i % 2]}\n" for i in range(20)))
    halves = [load_data(DataSpec(source=str(path), fold=f"{i}/5")) for i in range(1, 6)]
    places = [place for data in halves if data.test for place in data.test.places]
    assert len(places) == len(set(places)) == 20 and all(len(data.train) == 16 for data in halves)
    for wrong in ("6/5", "0/5", "1/1", "a", "1/21", "2/"):
        with pytest.raises(ConfigError, match=r"data\.fold"):
            DataSpec(source="a", fold=wrong)
    with pytest.raises(ConfigError, match="both say"):
        DataSpec(source="a", fold="1/2", test="b")


def test_the_interval_is_students() -> None:
    values = [0.7, 0.9, 0.8, 0.85]
    low, high = cross_validation.interval(values)
    wanted = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    assert (low, high) == (pytest.approx(wanted[0], abs=1e-3), pytest.approx(wanted[1], abs=1e-3))
    table = cross_validation.STUDENT
    assert all(abs(t - stats.t.ppf(0.975, df)) < 1e-3 for df, t in enumerate(table, start=1)) and len(table) == 19


def test_finished_folds_are_not_run_again_and_the_last_run_learns_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.csv"
    lines = [f"{w} is {v},{'ab'[w == 'dog']}" for w in ("red", "dog") for v in ("how", "far", "tall", "it", "the", "a")]
    path.write_text("text,label\n" + "\n".join(lines) + "\n")
    spec = RunSpec(
        model=str(little_model(tmp_path / "bert", "bert")), data=DataSpec(source=str(path)), method="bitfit", steps=2,
        batch=BatchSpec(size=4), precision="fp32", threads=1, out=str(tmp_path / "cv"),
    )  # fmt: skip
    ran: list[str] = []
    real = run_file.train_run

    def once(each: RunSpec, listener: Any, **given: Any) -> Any:
        ran.append(Path(str(each.out)).name)
        if each.out == str(tmp_path / "cv" / "fold-2") and ran.count("fold-2") == 1:
            raise KeyboardInterrupt
        return real(each, listener, **given)

    monkeypatch.setattr(run_file, "train_run", once)
    with pytest.raises(KeyboardInterrupt):
        cross_validate(spec, 2)
    found = cross_validate(tmp_path / "cv")
    assert ran == ["fold-1", "fold-2", "fold-2", "final"]
    scored = [json.loads((tmp_path / "cv" / f"fold-{i}" / "scores.json").read_text()) for i in (1, 2)]
    assert found.mean["accuracy"] == pytest.approx(sum(s["accuracy"] for s in scored) / 2)
    assert next(iter(found.mean)) == "accuracy", "the task's own score comes first"
    assert sum(c["rows"] for c in found.classes) == 12, "each row was scored once"
    assert json.loads((found.final / "run.json").read_text())["spec"]["data"]["test_share"] == 0
    assert "12 rows: 12 used" in "".join(
        json.loads(line).get("text", "") for line in (found.final / "events.jsonl").read_text().splitlines()
    )
    assert Predictor(found.final).texts(["red is far"])[0]["label"] in "ab"
    assert cross_validate(spec, 2).mean == found.mean and len(ran) == 4, "the same again runs nothing"
    with pytest.raises(ConfigError, match="other settings"):
        cross_validate(spec, 3)
