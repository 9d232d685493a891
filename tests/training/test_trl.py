"""Under TRL's SFTTrainer the methods' hooks are called as under the Trainer it is made from."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import small
from tiny import tiny
from word_tables import WORDS, word_tokenizer

from luthier.surgery import attach, load
from luthier.training.trainer_callback import HooksCallback

pytestmark = [
    pytest.mark.slow,  # importing TRL alone takes seconds
    pytest.mark.filterwarnings("ignore"),  # TRL's own, and those of what it imports
]


def fine_tuned(name: str, folder: Path, steps: int = 6, **changes: Any) -> tuple[Any, Any, HooksCallback, list[str]]:
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = tiny("llama", "lm")
    tuned = attach(model, dataclasses.replace(small(name), **changes))
    callback, calls = HooksCallback(tuned), []
    cls = type(tuned.tuning().method)
    with pytest.MonkeyPatch.context() as patch:
        for hook in callback.asks:
            told = getattr(cls, hook)

            def noted(*given: Any, _told: Any = told, _hook: str = hook, **more: Any) -> Any:
                calls.append(_hook)
                return _told(*given, **more)

            patch.setattr(cls, hook, noted)
        rows = [{"text": " ".join(WORDS[(i + k) % len(WORDS)] for k in range(4 + i % 5))} for i in range(16)]
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=0.01, report_to=[],
                save_strategy="no", use_cpu=True, disable_tqdm=True, bf16=False, max_length=16, logging_steps=1,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=word_tokenizer("gpt"),
            callbacks=[callback],
        )  # fmt: skip
        trainer.train()
    return model, tuned, callback, calls


@pytest.mark.parametrize("name", ["adalora", "diff_pruning", "adamix"])
def test_every_hook_that_a_method_has_is_called_by_trl_and_the_result_loads(name: str, tmp_path: Path) -> None:
    model, tuned, callback, calls = fine_tuned(name, tmp_path)
    assert set(calls) == set(callback.asks) and callback.asks
    once_a_step = [hook for hook in ("before_step", "extra_loss", "after_backward", "on_step") if hook in callback.asks]
    assert {hook: calls.count(hook) for hook in once_a_step} == dict.fromkeys(once_a_step, 6)
    assert tuned.tuning().finished and calls.count("finish") == 1
    tuned.save(tmp_path / "tuning")
    ids = torch.arange(8)[None] + 5
    expected = model.eval()(input_ids=ids).logits
    fresh = tiny("llama", "lm")
    assert not torch.equal(fresh.eval()(input_ids=ids).logits, expected), "something was learnt"
    load(fresh, tmp_path / "tuning")
    assert torch.equal(fresh.eval()(input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    ("name", "setting"), [("adalora", "orthogonality"), ("diff_pruning", "l0"), ("adamix", "gamma")]
)
def test_what_a_method_adds_to_the_loss_reaches_the_gradients(name: str, setting: str, tmp_path: Path) -> None:
    """TRL makes the loss of log-probabilities, and reads none that is added to the model's."""
    found = []
    for weight in (0.0, 5.0):
        folder = tmp_path / f"{weight:g}"
        _, tuned, _, _ = fine_tuned(name, folder, steps=2, **{setting: weight})
        tuned.save(folder / "tuning")
        found.append((folder / "tuning" / "tuning.safetensors").read_bytes())
    assert found[0] != found[1]
