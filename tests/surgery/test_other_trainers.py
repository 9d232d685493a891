"""Other people's trainers on a tuned model: what trains, what is held, what is saved."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import shake
from kinds import KINDS, logits, make, prepared, shaken, tokenizer
from tiny import inputs, tiny
from torch import Tensor

from luthier.core import ConfigError
from luthier.surgery import Tuned, attach, load

# Trainers warn about what does not concern a tuning: no accelerator to pin memory for, renamed settings of theirs.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*", "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*lr_scheduler.step.*"
)


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """One batch of `inputs`, row by row, over and over."""

    def __init__(self, batch: dict[str, Tensor], times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return len(self.batch["input_ids"]) * self.times

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {k: v[i % len(v)] for k, v in self.batch.items()}


def trainer(model: Any, batch: dict[str, Tensor], folder: Path, **more: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    settings = {
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "num_train_epochs": 1,
        "per_device_train_batch_size": len(batch["input_ids"]),
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
    } | more
    return Trainer(model=model, args=TrainingArguments(str(folder), **settings), train_dataset=Rows(batch, 8))


def losses(made: Any) -> list[float]:
    return [row["loss"] for row in made.state.log_history if "loss" in row]


def tuned_for_training(name: str) -> tuple[Tuned, Any, dict[str, Tensor]]:
    arch, task = ("bert", "classification") if name in ("bitfit", "child_tuning_d") else ("gpt2", "lm")
    model = tiny(arch, task)
    batch = inputs(model)
    return prepared(attach(model, make(name)), batch), model, batch


@pytest.mark.parametrize("name", list(KINDS))
def test_the_trainer_of_transformers_trains_it_and_nothing_else(name: str, tmp_path: Path) -> None:
    tuned, model, batch = tuned_for_training(name)
    learns = {id(p) for p in tuned.trained().values()}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if id(p) not in learns}
    start = {n: p.detach().clone() for n, p in tuned.trained().items()}
    made = trainer(model, batch, tmp_path / "out", learning_rate=0.3 if name == "prompt_tuning" else 0.01)
    made.train()
    found = losses(made)
    assert sum(found[-2:]) < 2 * found[0], found
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], value) for n, value in frozen.items())
    assert any(not torch.equal(p, start[n]) for n, p in tuned.trained().items())
    for unfrozen in tuned.tuning().unfrozen.values():
        if unfrozen.mask is not None:
            outside = ~unfrozen.mask
            assert bool(outside.any()) and torch.equal(unfrozen.parameter[outside], unfrozen.original[outside])
    model.eval()
    expected = logits(model, batch)
    made.save_model(str(tmp_path / "saved"))
    made.save_model(str(tmp_path / "saved"))  # as trainers do
    fresh = tiny("bert", "classification") if name in ("bitfit", "child_tuning_d") else tiny("gpt2", "lm")
    load(fresh, tmp_path / "saved" / "tunings" / "default")
    assert torch.equal(logits(fresh, batch), expected)
    assert not (tmp_path / "saved" / "config.json").exists()


def test_a_trainer_resumes_from_its_checkpoint_and_finds_its_best(tmp_path: Path) -> None:
    tuned, model, batch = tuned_for_training("lora")
    saving = {"save_strategy": "steps", "save_steps": 4}
    made = trainer(model, batch, tmp_path / "a", **saving)
    made.train()
    expected = {n: p.detach().clone() for n, p in tuned.trained().items()}
    names = sorted(p.name for p in (tmp_path / "a" / "checkpoint-4").iterdir())
    assert "model.safetensors" in names and "tunings" in names
    from safetensors import safe_open

    with safe_open(tmp_path / "a" / "checkpoint-4" / "model.safetensors", "pt") as file:
        held = list(file.keys())
    assert held and all(n.startswith("luthier.") for n in held), "base weights in a checkpoint"
    again, other, _ = tuned_for_training("lora")
    shake(again)  # whatever it holds is replaced
    twin = trainer(other, batch, tmp_path / "b", **saving)
    _load_checkpoint(twin, tmp_path / "a" / "checkpoint-4")
    first = json.loads((tmp_path / "a" / "checkpoint-8" / "trainer_state.json").read_text())
    assert first["global_step"] == 8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    for n, p in again.trained().items():
        torch.testing.assert_close(p.detach(), expected[n])


def _load_checkpoint(made: Any, folder: Path) -> None:
    made._load_from_checkpoint(str(folder))


def test_decay_and_momentum_of_any_optimiser_stay_inside_the_mask() -> None:
    for make_optimiser in (
        lambda ps: torch.optim.AdamW(ps, lr=0.1, weight_decay=0.5),
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.5),
        lambda ps: torch.optim.RMSprop(ps, lr=0.01, weight_decay=0.5),
    ):
        tuned, model, batch = tuned_for_training("child_tuning_d")
        optimiser = make_optimiser([p for p in model.parameters() if p.requires_grad])
        for _ in range(3):
            model(**batch).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        masked = [u for u in tuned.tuning().unfrozen.values() if u.mask is not None]
        assert masked
        for u in masked:
            assert torch.equal(u.parameter[~u.mask], u.original[~u.mask])
        assert any(not torch.equal(u.parameter[u.mask], u.original[u.mask]) for u in masked)


def test_an_optimiser_of_another_model_is_left_alone_and_so_is_everything_after_detaching() -> None:
    from luthier.surgery import other_trainers

    tuned, model, _ = tuned_for_training("child_tuning_d")
    other = torch.nn.Linear(3, 2)
    other(torch.ones(1, 3)).sum().backward()
    held = {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert all(torch.equal(p, held[n]) for n, p in model.named_parameters())
    assert tuned in other_trainers._watched
    tuned.detach()
    assert tuned not in other_trainers._watched


@pytest.mark.parametrize("name", ["adalora", "diff_pruning", "adamix"])
def test_a_method_that_must_be_asked_refuses_a_trainer_that_does_not_ask(name: str) -> None:
    from cells import small

    model = tiny("bert", "classification")
    batch = inputs(model)
    attach(model, small(name))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(**batch).loss.backward()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ConfigError, match=f"{name} has to be asked"):
        optimiser.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_mask_that_was_never_chosen_is_found_out_at_the_first_step() -> None:
    model = tiny("bert", "classification")
    attach(model, make("child_tuning_d"))
    model(**inputs(model)).loss.backward()
    with pytest.raises(ConfigError, match="mask was never chosen"):
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]).step()


@pytest.mark.parametrize("name", list(KINDS))
def test_the_sft_trainer_of_trl_trains_it(name: str, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = tiny("gpt2", "lm")
    tuned = prepared(attach(model, make(name)), inputs(model))
    learns = {id(p) for p in tuned.trained().values()}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if id(p) not in learns}
    rows = Dataset.from_dict({"prompt": ["w5 w9", "w6 w7 w8"] * 6, "completion": [" w20 w21", " w30"] * 6})
    settings = SFTConfig(
        output_dir=str(tmp_path / "out"),
        learning_rate=0.3 if name == "prompt_tuning" else 0.02,
        per_device_train_batch_size=2,
        num_train_epochs=1,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        max_length=16,
        gradient_checkpointing=False,
        lr_scheduler_type="constant",
    )
    made = SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer())
    made.train()
    found = losses(made)
    assert len(found) == 6 and sum(found[-2:]) < sum(found[:2]), found
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], value) for n, value in frozen.items())
    model.eval()
    batch = inputs(model)
    expected = logits(model, batch)
    made.save_model(str(tmp_path / "saved"))
    fresh = tiny("gpt2", "lm")
    load(fresh, tmp_path / "saved" / "tunings" / "default")
    assert torch.equal(logits(fresh, batch), expected)


def test_a_tuned_model_says_that_it_cannot_be_copied() -> None:
    _, model, _ = shaken("lora")
    with pytest.raises(ConfigError, match="Copy the base before attaching"):
        copy.deepcopy(model)
