"""The command that a page names makes the run that it is about."""

from typing import Any

import pytest

from luthier.cli._main import main
from luthier.core import plain
from luthier.report.gather import command_of
from luthier.runs.spec import RunSpec

SPECS: list[dict[str, Any]] = [
    {"method": "lora", "settings": {"rank": 4, "alpha": 8.0}, "steps": 7},
    {"method": "ia3", "seed": 3, "epochs": 0.5, "fast": False, "recheck": 5, "precision": "fp32"},
    {"method": "bitfit", "optim": {"lr": 0.01, "betas": [0.9, 0.95]}, "batch": {"size": 4}, "task": "classification"},
    {
        "method": "lora", "data": {"source": "my rows.csv", "text": "a b", "label": "it's", "strict": True},
        "gradient_checkpointing": True, "max_length": 64, "eval": {"every": 10, "best": True},
    },
]  # fmt: skip


@pytest.mark.parametrize("given", SPECS)
def test_the_command_asks_for_the_same_run(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = RunSpec.from_plain({"model": "sample:minilm-l6", "data": {"source": "sample:trec6"}, **given})
    asked: list[RunSpec] = []
    monkeypatch.setattr("luthier.workflow.train", lambda spec, **rest: asked.append(spec))
    monkeypatch.setattr("luthier.cli._progress.show_result", lambda result: None)
    words = ["train", *command_of(plain(spec))]
    assert main(words) == 0
    assert asked[0].digest() == spec.digest()


def test_what_luthier_chose_itself_is_left_out() -> None:
    spec = plain(RunSpec.from_plain({"model": "m", "data": {"source": "d"}, "optim": {"lr": 0.002}}))
    assert "--set optim.lr=0.002" in " ".join(command_of(spec))
    assert "optim.lr" not in " ".join(command_of({**spec, "chosen": ["optim.lr"]}))
