"""What a run chooses where nobody did."""

from pathlib import Path
from typing import Any

import pytest
import torch
from little import little_spec

from luthier.anatomy import Anatomy
from luthier.runs import RunFolder
from luthier.runs.spec import BatchSpec, EvalSpec, OptimSpec, RunSpec
from luthier.surgery import compose
from luthier.training.optimiser import Optimiser, optimiser_of
from luthier.workflow import prepare, resume, train
from luthier.workflow.choices import (
    FEWEST_STEPS,
    MOST_EPOCHS,
    PATIENCE,
    budget,
    choose,
    reopened,
    sentence,
    sizes,
    too_wide,
)
from luthier.workflow.load_model import empty_model
from luthier.workflow.resume_proof import run_digests

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("little")


@pytest.mark.parametrize("rows", [500, 600, 1000, 5000, 100_000])
def test_a_run_of_enough_rows_makes_some_hundreds_of_steps_and_three_epochs_at_least(rows: int) -> None:
    found = budget(rows, 16, share=0.1)
    per_epoch = -(-(rows - round(0.1 * rows)) // 16)
    assert found.epochs >= 3 and found.epochs * per_epoch >= FEWEST_STEPS
    assert (found.epochs - 1) * per_epoch < FEWEST_STEPS or found.epochs == 3
    assert per_epoch <= found.every <= found.epochs * per_epoch


def test_few_rows_are_all_learnt_from_and_not_passed_over_without_end() -> None:
    assert budget(20, 16, share=0.1).epochs == MOST_EPOCHS
    assert budget(499, 16, share=0.1).every == 0
    assert budget(5000, 16, share=0.0).every == 0


def test_what_was_given_is_not_chosen(home: Path) -> None:
    prepared = prepare(little_spec(home, steps=None))
    task, method = prepared.task, prepared.method

    def chosen(**given: Any) -> RunSpec:
        return choose(little_spec(home, **{"steps": None, **given}), task, method, 600)

    free = chosen(optim=OptimSpec())
    assert (free.epochs, free.eval.best, free.eval.patience) == (budget(600, 8, share=0.1).epochs, True, PATIENCE)
    assert (free.optim.lr, free.optim.head_lr) == (method.default_lr, method.default_head_lr or method.default_lr)
    assert set(free.chosen) == {"epochs", "eval.every", "eval.best", "eval.patience", "optim.lr", "optim.head_lr"}
    assert choose(free, task, method, 5) == free  # chosen once
    for given in ({"epochs": 2.0}, {"steps": 7}):
        assert not chosen(**given).eval.holds_out and chosen(**given).chosen == ()
        assert (chosen(**given).epochs, chosen(**given).steps) == (given.get("epochs"), given.get("steps"))
    assert (chosen().optim.lr, chosen().optim.head_lr) == (3e-3, None)
    own = chosen(eval=EvalSpec(patience=2))
    assert (own.eval.patience, own.eval.best, own.chosen) == (2, False, ("epochs",))
    assert not chosen(eval=EvalSpec(every=0)).eval.holds_out
    assert not chosen(eval=EvalSpec(share=0)).eval.holds_out


def test_what_was_chosen_is_open_again_where_what_it_hangs_on_is_changed(home: Path) -> None:
    prepared = prepare(little_spec(home, steps=None))
    spec = choose(little_spec(home, steps=None, optim=OptimSpec()), prepared.task, prepared.method, 600)
    values = RunSpec.from_plain(reopened(_plain(spec), {}))
    assert values == spec.from_plain({**_plain(spec), "chosen": sorted(spec.chosen)})
    other = RunSpec.from_plain(reopened(_plain(spec), {"method": "ia3"}))
    assert (other.optim.lr, other.optim.head_lr, other.epochs) == (None, None, spec.epochs)
    shorter = RunSpec.from_plain(reopened(_plain(spec), {"steps": 5}))
    assert (shorter.epochs, shorter.eval.patience, shorter.eval.best, shorter.optim.lr) == (
        None, None, False, spec.optim.lr,
    )  # fmt: skip
    assert RunSpec.from_plain(reopened(_plain(spec), {"epochs": 5.0})).chosen == ("optim.head_lr", "optim.lr")


def _plain(spec: RunSpec) -> dict[str, Any]:
    from luthier.core import plain

    found: dict[str, Any] = plain(spec)
    return found


def test_a_step_that_the_rows_cannot_fill_is_said(home: Path) -> None:
    spec = little_spec(home, batch=BatchSpec(size=1_000_000, accumulate=99))
    said = [
        "batch.size = 1000000 is more than the 37 rows: each step takes all of them",
        "batch.accumulate = 99 is more than the 37 rows of a step: it is cut into 37 micro-batches, of one row each",
    ]
    assert sizes(spec, 37) == said and set(said) <= set(prepare(spec).lines)
    assert sizes(little_spec(home, batch=BatchSpec(size=37, accumulate=37)), 37) == []
    one = little_spec(home, batch=BatchSpec(size=4, accumulate=5))
    assert [line.partition(":")[0] for line in sizes(one, 37)] == [
        "batch.accumulate = 5 is more than the 4 rows of a step"
    ]


def test_the_line_says_steps_epochs_rows_and_rates(home: Path) -> None:
    prepared = prepare(little_spec(home, steps=None))
    spec = choose(little_spec(home, steps=None, optim=OptimSpec()), prepared.task, prepared.method, 600)
    said = sentence(spec, 540)
    assert said.startswith("about 408 steps: 6 epochs of 540 rows, stops early, learning rate 0.002")
    assert sentence(little_spec(home), 540) == ""


@pytest.mark.parametrize("beside", ["", "mine:"])
def test_a_head_learns_at_its_own_rate_beside_a_second_tuning_too(beside: str) -> None:
    head = f"{beside}head/w"
    named = {head: torch.nn.Parameter(torch.ones(2)), "lora/a": torch.nn.Parameter(torch.ones(2))}
    for parameter in named.values():
        parameter.grad = torch.ones(2)
    optimiser: Optimiser = optimiser_of(OptimSpec(head_lr=0.25), named, [], 0.125)
    optimiser.step(1.0)
    moved = {name: float(1 - p.detach()[0]) for name, p in named.items()}
    assert moved[head] == pytest.approx(0.25, rel=1e-4) and moved["lora/a"] == pytest.approx(0.125, rel=1e-4)


def test_the_folder_holds_what_was_chosen_and_a_run_that_stops_early_resumes_to_the_bit(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.workflow.choices.ENOUGH_TO_SPARE", 20)
    monkeypatch.setattr("luthier.workflow.choices.FEWEST_STEPS", 16)

    def spec(out: str) -> RunSpec:
        return little_spec(
            home, steps=None, out=str(tmp_path / out), optim=OptimSpec(), batch=BatchSpec(size=8, tokens=48),
            eval=EvalSpec(share=0.3),
        )  # fmt: skip

    train(spec("whole"))
    held = RunFolder.open(tmp_path / "whole", write=False).spec
    assert held["eval"]["patience"] == PATIENCE and held["epochs"] > 3 and held["optim"]["lr"] == 2e-3
    assert RunSpec.from_toml(tmp_path / "whole" / "spec.toml").epochs == held["epochs"]
    train(spec("part"), stop_at=5)
    monkeypatch.setattr("luthier.workflow.choices.FEWEST_STEPS", 40)  # another version chooses otherwise
    resume(tmp_path / "part")
    assert run_digests(tmp_path / "part") == run_digests(tmp_path / "whole")


def test_a_method_that_trains_more_than_the_weight_it_stands_at_is_said(home: Path) -> None:
    prepared = prepare(little_spec(home, method="lora", settings={"rank": 900}))
    anatomy = Anatomy.read(empty_model(prepared.source, prepared.task))
    (said,) = too_wide(prepared.method, anatomy)
    assert (
        said.startswith("lora trains ")
        and said in prepared.lines
        and "more than any change of it needs; so at 6" in said
    )
    assert too_wide(compose.method("lora+sequential_adapter", {"sequential_adapter.width": 900}), anatomy) == []
    assert too_wide(compose.method("full", {}), anatomy) == []
