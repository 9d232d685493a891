"""Equal budgets: sizes by trained numbers, and as many steps for all."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from little import little_model
from races import base_in, here

from benchmarks import planted_truth as planted
from luthier.cli import compare as command
from luthier.cli._main import main
from luthier.cli._output import Screen
from luthier.comparison import compare, entrant_of, statistics
from luthier.comparison import run as run_file
from luthier.comparison.sizes import sized
from luthier.core import ConfigError
from luthier.core.config import read_word
from luthier.data.tasks import Task
from luthier.report import gather
from luthier.runs.spec import DataSpec, RunSpec

TASK = Task(name="classification", labels=("a", "b"))


def entrants(*names: str) -> list[Any]:
    return [entrant_of(name, read_word) for name in names]


@pytest.fixture
def base(tmp_path: Path) -> RunSpec:
    return RunSpec(model=str(little_model(tmp_path / "bert")), data=DataSpec(source="rows.csv"))


@pytest.mark.parametrize(
    ("method", "field"),
    [("lora", "rank"), ("sequential_adapter", "width"), ("p_tuning_v2", "length"), ("pfeiffer_adapter", "reduction")],
)
def test_a_method_is_as_large_as_the_budget_allows(method: str, field: str, base: RunSpec) -> None:
    found = sized(base, entrants(method), TASK, 3000)
    (one,) = found.entrants
    size = one.settings[field]
    assert one.name == f"{method}:{field}={size}" and not found.refused
    next_larger = size - 1 if field == "reduction" else size + 1
    with pytest.raises(ConfigError, match=r"its size is given\). --budget params="):
        sized(base, entrants(f"{method}:{field}={next_larger}"), TASK, 3000)
    assert sized(base, entrants(one.name), TASK, 3000).entrants == (one,), "a size that is given is kept"


def test_who_trains_more_at_any_size_is_a_row_that_says_by_how_much(base: RunSpec) -> None:
    found = sized(base, entrants("head_only", "full", "lora", "lora+ia3", "lora:rank=1"), TASK, 400)
    assert [e.name for e in found.entrants] == ["head_only"]
    assert "it has no size to choose" in found.refused["full"]
    assert "more than --budget params=400" in found.refused["full"]
    assert "rank=1 trains fewest" in found.refused["lora"] and "its size is given" in found.refused["lora:rank=1"]
    assert "head_only 0" in found.said[0]
    with pytest.raises(ConfigError, match=r"no method trains so few numbers\. full: it trains"):
        sized(base, entrants("full"), TASK, 400)
    least = int(found.refused["lora"].rpartition("params=")[2].split()[0])
    with pytest.raises(ConfigError, match="it is lora:rank=1, which stands twice"):
        sized(base, entrants("lora", "lora:rank=1"), TASK, least)


def test_sizes_stand_in_the_table_and_whoever_exceeds_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "DRAWS", 100)
    monkeypatch.setattr(run_file, "engine_named", here([]))
    found = compare(
        base_in(tmp_path), entrants("bitfit", "lora", "full"), seeds=1, home=tmp_path / "r", params=3000
    )  # fmt: skip
    sizes = {s.name: s.costs.trained for s in found.standings}
    (lora,) = (name for name in sizes if name.startswith("lora:rank="))
    assert 2000 < sizes[lora] <= 3000 and "more than --budget params=3000" in found.failed["full"]
    assert any("Each method is as large as 3.0 k trained numbers" in line for line in found.findings)
    command = gather([tmp_path / "r"]).commands[0]
    assert "--budget params=3000" in command and lora in command and "full" in command


def test_a_method_is_named_whole_beside_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(command, "screen", lambda: Screen(as_json=False, out=out, err=out))
    monkeypatch.setattr(statistics, "DRAWS", 100)
    found = planted.crossed((0.9, 0.5), 2)(np.random.default_rng(0))
    name = "sequential_adapter:activation=gelu:width=3285"
    command._show(replace(found, standings=(replace(found.standings[0], name=name), *found.standings[1:])))
    lines = [line for line in out.getvalue().splitlines() if line.startswith(name)]
    first = found.standings[0]
    assert any(f" {first.score:.3f} " in line and " best " in line for line in lines)
    folds = [f"{score:.3f}" for score in first.fold_scores]
    assert folds in [line.split()[1:] for line in lines]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "steps=9", "--steps", "5"], "--steps 5 says another length"),
        (["--budget", "steps=9", "--epochs", "2"], "--epochs 2"),
        (["--budget", "steps=9", "--patience", "2"], "--patience 2"),
        (["--budget", "params=lots"], "--budget params=lots: write minutes=20"),
        (["--budget", "memory=8GB"], "Add --race"),
        (["--budget", "params=9,minutes=2"], "Add --race"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [
        "compare",
        "sample:minilm-l6",
        "--data",
        "sample:trec6",
        "--method",
        "lora,ia3",
        "--out",
        str(tmp_path / "r"),
    ]
    assert main([*base, *words]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "r").exists()
