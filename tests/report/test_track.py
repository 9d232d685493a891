"""Trackers are told what the run's own log holds; one that fails or is missing harms no run."""

import importlib
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from little import little_data, little_model

from luthier.cli._main import main
from luthier.core import Interrupted, UnknownName, UsageError
from luthier.report.track import Tracked, check_trackers, trackers
from luthier.runs import Journal
from luthier.training import Listener

TELLS = """
import json, sys
from pathlib import Path
_all = []
def _note(*what):
    _all.append(what)
    Path({file!r}).write_text(json.dumps(_all))
"""
# What is called of each package, and no more.
FAKES = {
    "trackio": "def init(**k): _note('init', k)\ndef log(n, step): _note('log', step, n)\ndef finish(): _note('end')\n",
    "wandb": "class R:\n    def log(self, n, step): _note('log', step, n)\n"
    "    def finish(self, exit_code): _note('end', exit_code)\n"
    "def init(**k):\n    _note('init', k)\n    return R()\n",
    "mlflow": "def set_experiment(n): _note('experiment', n)\n"
    "def start_run(run_name): _note('init', {'name': run_name})\n"
    "def log_params(p): _note('params', p)\ndef log_metrics(n, step): _note('log', step, n)\n"
    "def end_run(status): _note('end', status)\n",
}  # fmt: skip


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages of these names that note what they are told."""
    home = tmp_path / "packages"
    home.mkdir()
    for name, text in FAKES.items():
        (home / f"{name}.py").write_text(TELLS.format(file=str(home / f"{name}.json")) + text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(home))
    importlib.invalidate_caches()
    return home


def train_words(folder: Path) -> list[str]:
    model, data = little_model(folder / "bert", "bert"), little_data(folder / "rows.csv")
    return [
        "train",
        str(model),
        "--data",
        str(data),
        "--steps",
        "2",
        "--batch",
        "8",
        "--threads",
        "1",
        "--precision",
        "fp32",
    ]


def test_every_tracker_hears_what_the_log_holds(fakes: Path, tmp_path: Path) -> None:
    words = [*train_words(tmp_path), "--method", "bitfit", "--out", str(tmp_path / "x")]
    assert main([*words, "--track", "trackio,wandb", "--track", "mlflow"]) == 0
    rows = Journal(tmp_path / "x" / "events.jsonl").rows()
    losses = [row["loss"] for row in rows if row["event"] == "step"]
    scores = next(row for row in rows if row["event"] == "scores")
    for name in FAKES:
        told: list[list[Any]] = json.loads((fakes / f"{name}.json").read_text())
        steps = [what for what in told if what[0] == "log"]
        assert [what[2]["train/loss"] for what in steps if "train/loss" in what[2]] == losses
        assert steps[-1][1] == 2 and steps[-1][2]["eval/accuracy"] == pytest.approx(scores["accuracy"], abs=1e-6)
        assert next(what for what in told if what[0] == "init")[1]["name"] == "x"
        assert told[-1] == {"trackio": ["end"], "wandb": ["end", 0], "mlflow": ["end", "FINISHED"]}[name]
    config = json.loads((fakes / "wandb.json").read_text())[0][1]["config"]
    assert config["method"] == "bitfit" and config["batch.size"] == 8 and "steps" in config


def test_one_that_fails_is_named_and_the_run_goes_on(
    fakes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (fakes / "trackio.py").write_text(
        "def init(**k): pass\ndef log(n, step): raise OSError('no network')\ndef finish(): pass\n"
    )
    (fakes / "mlflow.py").write_text("def set_experiment(n): raise RuntimeError('no server')\n")
    words = [*train_words(tmp_path), "--method", "bitfit", "--out", str(tmp_path / "x")]
    assert main([*words, "--track", "trackio,mlflow"]) == 0
    said = capfd.readouterr().err
    assert said.count("trackio: no network. It is told nothing more; the run goes on.") == 1
    assert "mlflow: no server" in said
    assert (tmp_path / "x" / "record.json").is_file()


def test_what_is_missing_is_refused_before_work_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.report.track.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="the package wandb is not installed"):
        check_trackers(["wandb"])
    with pytest.raises(UnknownName, match="tensorboard"):
        check_trackers(["tensorbord"])
    assert main([*train_words(tmp_path), "--out", str(tmp_path / "x"), "--track", "mlflow"]) == 2
    assert not (tmp_path / "x").exists()
    assert trackers() == ["mlflow", "tensorboard", "trackio", "wandb"]


def test_several_runs_are_not_told_of(fakes: Path, tmp_path: Path) -> None:
    assert main([*train_words(tmp_path), "--cv", "2", "--out", str(tmp_path / "x"), "--track", "trackio"]) == 2
    assert not (tmp_path / "x").exists()


def test_no_tracker_is_imported_that_nobody_named() -> None:
    script = "import sys, luthier.report.track as t, luthier.workflow; t.trackers(); print(sorted({'wandb', 'mlflow', "
    script += "'trackio', 'tensorboard'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_value_that_is_no_number_is_kept_from_trackers(fakes: Path) -> None:
    with Tracked(["trackio"], Listener(), "x", {"a": {"b": None, "c": [1, 2]}}) as told:
        told.start(1, 0)
        told.step(1, {"event": "step", "step": 1, "loss": float("nan"), "lr": 0.5, "ok": True, "why": "w"}, 1, 1)
    noted = json.loads((fakes / "trackio.json").read_text())
    assert noted[0][1]["config"] == {"a.c": "[1, 2]"}
    assert noted[1] == ["log", 1, {"train/lr": 0.5}]


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("burst"), "FAILED"), (Interrupted("stopped", 15), "KILLED"), (None, "FINISHED")]
)
def test_a_run_that_did_not_finish_is_none_that_did(fakes: Path, error: Exception | None, status: str) -> None:
    with suppress(ValueError, Interrupted), Tracked(["mlflow", "wandb"], Listener(), "x", {}) as told:
        told.start(1, 0)
        if error is not None:
            raise error
    assert json.loads((fakes / "mlflow.json").read_text())[-1] == ["end", status]
    assert json.loads((fakes / "wandb.json").read_text())[-1] == ["end", 0 if error is None else 1]


def test_tensorboard_reads_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    with Tracked(["tensorboard"], Listener(), "x", {"a": 1}) as told:
        told.start(2, 0)
        told.step(1, {"loss": 0.5}, 1, 1)
        told.scores(2, {"accuracy": 0.75})
    read = EventAccumulator(str(tmp_path / "tensorboard" / "x"))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("eval/accuracy")] == [(2, 0.75)]
