"""SHADOW: what peft computes and its gradients, generation with the cache, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from little import little_spec
from methods.checks import counted, goes_on_from_its_cache_alone, logits, stir
from tiny import inputs, tiny
from torch.testing import assert_close

from luthier import train as run
from luthier.core import AnatomyError, CannotMerge, CompositionError, ConfigError
from luthier.data.batches import Batch
from luthier.data.tasks import Task
from luthier.methods.additive.shadow import Mirror
from luthier.surgery import attach, from_peft, load, to_peft
from luthier.training.objective import Objective
from luthier.workflow import resume
from luthier.workflow.resume_proof import run_digests


def stirred(arch: str = "llama", **settings: Any) -> Any:
    tuned = attach(tiny(arch, "lm"), "shadow", train_head=False, **{"rank": 3, "strength": 0.5, **settings})
    stir(tuned)
    tuned.model.eval()
    return tuned


def left_padded(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, model.config.vocab_size, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[2, :1] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hidden", [None, 5])
def test_peft_has_the_same_answers_and_gradients(hidden: int | None, tmp_path: Path) -> None:
    tuned = stirred(hidden=hidden, dropout=0.0)
    to_peft(tuned, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny("llama", "lm"), str(tmp_path / "ours"), is_trainable=True).eval()
    theirs.peft_config["default"].auxiliary_loss_weight = 0.0
    batch = left_padded(tuned.model)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    mine, other = tuned.model(**batch), theirs(**batch)
    assert not torch.allclose(mine.logits, tiny("llama", "lm").eval()(**batch).logits, atol=1e-2)
    assert_close(other.logits, mine.logits, rtol=1e-5, atol=1e-5)
    mine.loss.backward()
    other.loss.backward()
    ours = {n: p.grad for n, p in tuned.trained().items()}
    there = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad and p.grad is not None}
    assert len(ours) == len(there) == 3 * 2 + 2 * 8 + 17
    for name, gradient in there.items():
        assert any(
            gradient.shape == g.shape and torch.allclose(gradient, g, rtol=1e-3, atol=1e-5) for g in ours.values()
        ), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("full_logits", [False, True])
def test_the_second_loss_and_its_gradients_are_pefts(full_logits: bool, tmp_path: Path) -> None:
    tuned = stirred(dropout=0.0, auxiliary=0.3)
    to_peft(tuned, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny("llama", "lm"), str(tmp_path / "ours"), is_trainable=True).eval()
    assert theirs.peft_config["default"].auxiliary_loss_weight == 0.3
    assert from_peft(tiny("llama", "lm"), tmp_path / "ours").tuning().method.auxiliary == 0.3
    given = left_padded(tuned.model)
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    labels[1, :3] = -100
    n = int((labels[:, 1:] != -100).sum())
    batch = Batch(inputs=given, labels=labels, rows=torch.arange(3).numpy(), n_targets=n, n_tokens=17)
    objective = Objective(tuned, Task(name="causal_lm"), full_logits=full_logits)
    tuned.model.eval()
    (mirror,) = (m for m in tuned.model.modules() if isinstance(m, Mirror))
    mirror.training = True  # this alone, as a run would have it: nothing is dropped
    mine = tuned.tuning().method.loss(tuned, lambda: objective(batch)).loss / n
    other = theirs(**given, labels=labels).loss
    assert_close(mine, other, rtol=1e-5, atol=1e-5)
    assert float(mine) > float(objective(batch).loss.detach()) / n * 1.1
    mine.backward()
    other.backward()
    ours = [p.grad for p in tuned.trained().values()]
    there = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad and p.grad is not None}
    assert len(ours) == len(there)
    for name, gradient in there.items():
        assert any(gradient.shape == g.shape and torch.allclose(gradient, g, rtol=1e-3, atol=1e-5) for g in ours), name
    tuned.model.eval()  # where rows are scored, the task's loss alone
    alone = tuned.tuning().method.loss(tuned, lambda: objective(batch)).loss
    assert torch.equal(alone, objective(batch).loss)
    with pytest.raises(ConfigError, match=r"shadow.auxiliary: must be at least 0, got -1"):
        attach(tiny("llama", "lm"), "shadow", auxiliary=-1.0)


def test_it_starts_as_the_base_and_only_the_correction_moves_first() -> None:
    tuned = attach(tiny("llama", "lm"), "shadow", train_head=False)
    batch = inputs(tuned.model)
    assert torch.equal(logits(tuned.model, batch), logits(tiny("llama", "lm"), batch))
    tuned.model(**batch).loss.backward()
    moved = {n for n, p in tuned.trained().items() if p.grad is not None and p.grad.any()}
    assert moved == {n for n in tuned.trained() if n.endswith("up.weight")} and len(moved) == 3


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_generation_with_the_cache_is_that_without_and_pads_on_the_left_say_nothing(arch: str) -> None:
    model = stirred(arch).model
    batch = left_padded(model)
    ask: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for beams in (1, 2):
        with_cache = model.generate(**batch, **ask, num_beams=beams, use_cache=True)
        assert torch.equal(with_cache, model.generate(**batch, **ask, num_beams=beams, use_cache=False))
    alone = model.generate(batch["input_ids"][:1, 3:], **ask)
    assert torch.equal(model.generate(**batch, **ask)[0, 3:], alone[0])


@pytest.mark.parametrize("lazy", [True, False])
def test_a_conversation_goes_on_from_its_cache_and_another_s_cache_is_refused(lazy: bool) -> None:
    goes_on_from_its_cache_alone(stirred(), lazy=lazy)


def test_blocks_that_are_computed_again_have_the_same_gradients() -> None:
    tuned = stirred(dropout=0.0)
    batch, found = inputs(tuned.model), []
    for again in (False, True):
        if again:
            tuned.model.activation_checkpointing_enable()
        tuned.model.train()
        tuned.model.zero_grad()
        torch.manual_seed(0)  # the tiny model drops out
        tuned.model(**batch).loss.backward()
        found.append({n: p.grad.clone() for n, p in tuned.trained().items()})
    assert all(g.any() for g in found[0].values())
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_it_is_saved_and_loaded_and_counted(tmp_path: Path) -> None:
    tuned = stirred()
    assert tuned.n_trained() == tuned.tuning().method.n_params(tuned.anatomy)
    tuned.save(tmp_path / "a")
    again = tiny("llama", "lm")
    load(again, tmp_path / "a")
    batch = left_padded(again)
    assert torch.equal(logits(again, batch), logits(tuned.model, batch))
    block = 4 * (768 * 768 + 768) + 2 * (768 * 3072) + 3072 + 768 + 4 * 768
    assert counted("shadow", rank=8) == block + 12 * 2 * 8 * 768 + 11 * 2 * (2 * 8 * 768 + 8 + 768)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks it
def test_what_it_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AnatomyError, match="this t5 has two"):
        attach(tiny("t5"), "shadow")
    with pytest.raises(CompositionError, match="takes the calls of blocks over"):
        attach(tiny("llama"), "shadow+tiny_attention")
    with pytest.raises(ConfigError, match=r"shadow\.strength"):
        attach(tiny("llama"), "shadow", strength=0.0)
    with pytest.raises(CannotMerge):
        attach(tiny("llama"), "shadow").merge()
    with pytest.raises(CannotMerge, match="beside a gpt2 model"):
        to_peft(attach(tiny("gpt2", "lm"), "shadow", train_head=False), tmp_path / "a")
    config = peft.ShadowConfig(task_type="CAUSAL_LM", r=3, shadow_num_hidden_layers=2)
    peft.get_peft_model(tiny("llama", "lm"), config).save_pretrained(str(tmp_path / "two"))
    with pytest.raises(ConfigError, match="shadow_num_hidden_layers is 2"):
        from_peft(tiny("llama", "lm"), tmp_path / "two")
    config = peft.ShadowConfig(task_type="CAUSAL_LM", r=3, target_modules=["model.layers.0", "model.layers.1"])
    peft.get_peft_model(tiny("llama", "lm"), config).save_pretrained(str(tmp_path / "some"))
    with pytest.raises(ConfigError, match="not all blocks"):
        from_peft(tiny("llama", "lm"), tmp_path / "some")


def test_a_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    spec = little_spec(tmp_path, "shadow", settings={"rank": 3}, steps=4)
    run(replace(spec, out=str(tmp_path / "whole")))
    run(replace(spec, out=str(tmp_path / "stopped")), stop_at=2)
    resume(tmp_path / "stopped")
    assert run_digests(tmp_path / "stopped") == run_digests(tmp_path / "whole")
