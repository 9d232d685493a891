"""Under the Trainer of transformers the methods' hooks are called, in their order, once each where they should be."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import small
from surgery.test_other_trainers import Rows
from tiny import inputs, tiny

from luthier.core import ConfigError
from luthier.methods.unified.adamix import disagreement
from luthier.surgery import Method, attach, load
from luthier.training.trainer_callback import HooksCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*", "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*lr_scheduler.step.*"
)


def trained(model: Any, tuned: Any, folder: Path, steps: int = 4, **more: Any) -> HooksCallback:
    from transformers import Trainer, TrainingArguments

    batch = inputs(model)
    callback = HooksCallback(tuned)
    settings = {
        "learning_rate": 0.01, "max_steps": steps, "per_device_train_batch_size": len(batch["input_ids"]),
        "report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1,
    } | more  # fmt: skip
    made = Trainer(
        model=model, args=TrainingArguments(str(folder), **settings), train_dataset=Rows(batch, 16),
        callbacks=[callback],
    )  # fmt: skip
    made.train()
    callback.losses = [row["loss"] for row in made.state.log_history if "loss" in row]  # type: ignore[attr-defined]
    return callback


@pytest.mark.parametrize("name", ["adalora", "diff_pruning", "adamix"])
def test_a_method_that_must_be_asked_trains_is_finished_and_loads(name: str, tmp_path: Path) -> None:
    model = tiny("bert", "classification")
    fresh = copy.deepcopy(model)
    tuned = attach(model, small(name))
    trained(model, tuned, tmp_path, steps=6)
    assert tuned.tuning().finished
    tuned.save(tmp_path / "tuning")
    model.eval()
    batch = inputs(model)
    expected = model(**batch).logits
    load(fresh, tmp_path / "tuning")
    assert torch.equal(fresh.eval()(**batch).logits, expected)
    if name == "adalora":
        method = tuned.tuning().method
        kept = sum(int(m.keep.sum()) for m in tuned.model.modules() if hasattr(m, "keep"))
        assert kept == method.target_rank * sum(hasattr(m, "keep") for m in tuned.model.modules()), "the budget is met"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_hooks_are_called_in_the_order_of_our_own_loop_once_a_step(
    accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("bert", "classification")
    tuned = attach(model, small("adalora"))
    cls, calls = type(tuned.tuning().method), []

    def watching(hook: str) -> Any:
        told = getattr(cls, hook)

        def watched(self: Method, *given: Any) -> Any:
            calls.append((hook, *given[1:]))
            return told(self, *given)

        return watched

    for hook in ("extra_loss", "after_backward", "on_step", "finish"):
        monkeypatch.setattr(cls, hook, watching(hook))
    trained(model, tuned, tmp_path, steps=2, gradient_accumulation_steps=accumulate)
    each = [[("extra_loss",), ("after_backward", s, 2), ("on_step", s, 2)] for s in (1, 2)]
    assert calls == [*each[0], *each[1], ("finish",)]


@pytest.mark.parametrize(("arch", "task"), [("bert", "classification"), ("gpt2", "lm")])
def test_the_loss_of_adamix_is_that_of_two_passes(
    arch: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(arch, task)
    tuned = attach(model, small("adamix"))
    batch = inputs(model)
    seen: list[Any] = []
    inner = model.forward

    @functools.wraps(inner)  # the trainer reads its arguments' names
    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(inner(*args, **kwargs))
        return seen[-1]

    monkeypatch.setitem(model.__dict__, "forward", watched)
    found = trained(model, tuned, tmp_path, steps=1).losses  # type: ignore[attr-defined]
    first, second = seen[0], seen[1]
    labels = batch["labels"]
    n = int((labels != -100).sum())  # as the trainer counts: it takes a row's first token for a target too
    apart = disagreement(first.logits, second.logits, labels, shifted=task == "lm")
    assert float(apart.detach()) > 0
    assert found[0] == pytest.approx(float((first.loss + apart / n).detach()), rel=1e-3), "of the log: four digits"


def test_a_loss_that_is_computed_outside_the_model_is_refused(tmp_path: Path) -> None:
    model = tiny("bert", "classification")
    tuned = attach(model, small("adamix"))
    with pytest.raises(ConfigError, match="adamix changes the loss, and this trainer computes it outside"):
        trained(model, tuned, tmp_path, steps=1, label_smoothing_factor=0.1)


def test_a_method_whose_phases_no_trainer_enters_is_refused(tmp_path: Path) -> None:
    model = tiny("bert", "classification")
    tuned = attach(model, small("lt_sft"))
    with pytest.raises(ConfigError, match="lt_sft cuts a run into 2 phases, which this trainer does not have"):
        trained(model, tuned, tmp_path, steps=1)


def test_groups_hold_each_trained_tensor_once_at_the_rate_of_its_method() -> None:
    tuned = attach(tiny("bert", "classification"), small("diff_pruning"))
    groups = HooksCallback(tuned).groups(lr=0.1, weight_decay=0.5)
    held = [p for group in groups for p in group["params"]]
    assert len(held) == len(tuned.trained()) and {id(p) for p in held} == {id(p) for p in tuned.trained().values()}
    assert {group["lr"] for group in groups} != {0.1} and groups[-1]["lr"] == 0.1
