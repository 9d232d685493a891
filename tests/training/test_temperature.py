"""A temperature is fitted on rows held out to select by: it recovers a planted one, and changes no answer."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from little import little_model

from luthier.core import ConfigError
from luthier.data.tasks import Task
from luthier.runs.spec import BatchSpec, DataSpec, EvalSpec, RunSpec
from luthier.training.quality import judge
from luthier.training.temperature import COLDEST, HOTTEST, calibrated, check_calibrate, fit_temperature, tempered
from luthier.workflow import train

ABC = Task(name="classification", labels=("a", "b", "c"))


def planted(temperature: float, n: int = 6000) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are `temperature` times as sure as their answers are right, and the right answers."""
    draw = np.random.default_rng(0)
    honest = draw.normal(0, 1.5, (n, 3))
    chances = np.exp(honest) / np.exp(honest).sum(1, keepdims=True)
    wanted = (chances.cumsum(1) < draw.random((n, 1))).sum(1)
    return honest * temperature, wanted.astype(np.int64)


@pytest.mark.parametrize("planted_at", [0.5, 1.0, 3.0])
def test_a_planted_temperature_comes_out_and_certainty_fits_at_it(planted_at: float) -> None:
    logits, wanted = planted(planted_at)
    found = fit_temperature(ABC.probabilities(logits), wanted)
    assert found == pytest.approx(planted_at, rel=0.08)
    judged = judge(ABC, logits, wanted, wanted, 0.5)
    assert judged is not None
    beside = calibrated(judged, ABC, logits, wanted, found)
    assert beside.calibrated_calibration_error is not None and beside.calibrated_calibration_error < 0.02
    assert beside.nll == judged.nll and beside.score == judged.score
    if planted_at == 3.0:
        assert beside.calibration_error > 0.1
        assert beside.calibrated_nll < beside.nll - 0.1 and beside.calibrated_brier < beside.brier - 0.02


def test_no_other_temperature_is_better_on_the_rows_it_is_fitted_on() -> None:
    logits, wanted = planted(2.0, n=200)
    chances = ABC.probabilities(logits)

    def nll(temperature: float) -> float:
        return float(-np.log(tempered(chances, temperature)[np.arange(len(wanted)), wanted]).mean())

    best = fit_temperature(chances, wanted)
    assert all(nll(best) < nll(best * factor) for factor in (0.8, 0.95, 1.05, 1.25))


def test_rows_that_are_all_right_or_all_wrong_end_at_the_bounds() -> None:
    chances = np.array([[0.9, 0.1]] * 4)
    assert fit_temperature(chances, np.zeros(4, dtype=np.int64)) == pytest.approx(COLDEST, rel=1e-6)
    assert fit_temperature(chances, np.ones(4, dtype=np.int64)) == pytest.approx(HOTTEST, rel=1e-6)
    certain = fit_temperature(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([0, 1]))
    assert np.isfinite(certain)


SEVERAL = Task(name="classification", labels=("a",), multi_label=True)


@pytest.mark.parametrize("task", [Task(name="regression"), Task(name="causal_lm"), SEVERAL])
def test_answers_that_are_no_one_label_have_no_temperature(task: Task) -> None:
    with pytest.raises(ConfigError, match=r"eval\.calibrate"):
        check_calibrate(task)


def test_a_run_fits_it_on_rows_that_it_neither_learns_nor_scores(tmp_path: Path) -> None:
    kinds = (("red", "colour"), ("dog", "animal"))
    rows = [f"{w} is {v} {n},{kind}" for w, kind in kinds for v in ("how", "far") for n in range(12)]
    data = tmp_path / "rows.csv"
    data.write_text("\n".join(["text,label", *rows]) + "\n")
    spec = RunSpec(
        model=str(little_model(tmp_path / "bert", "bert")), data=DataSpec(source=str(data)), method="bitfit", steps=2,
        batch=BatchSpec(size=8), precision="fp32", threads=1, out=str(tmp_path / "run"),
        eval=EvalSpec(calibrate=True, share=0.3),
    )  # fmt: skip
    result = train(spec)
    kept = json.loads((tmp_path / "run" / "quality.json").read_text())
    assert COLDEST <= kept["temperature"] <= HOTTEST and kept["calibrated_nll"] > 0
    assert result.quality is not None and result.quality.temperature == kept["temperature"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "rows.jsonl").read_text().splitlines()]
    halves = {half: sum(line["half"] == half for line in lines) for half in ("train", "select", "test")}
    assert halves["select"] == round(0.3 * (halves["train"] + halves["select"]))
    with (tmp_path / "run" / "predictions.csv").open(newline="") as file:
        assert all(float(row["sure"]) >= 0.5 for row in csv.DictReader(file)), "what is answered is not changed"
    with pytest.raises(ConfigError, match=r"eval\.calibrate goes by rows held out"):
        EvalSpec(calibrate=True, share=0)
