"""The loss in chunks is the model's own loss, and cutting a step finer changes nothing."""

import pytest
import torch
from tiny import inputs, tiny
from torch.testing import assert_close

from luthier.data.batches import Batch
from luthier.data.tasks import Task
from luthier.surgery import attach
from luthier.training.objective import Objective


def _batch(model: torch.nn.Module) -> Batch:
    given = inputs(model, padded=True)
    labels = given.pop("labels").clone()
    labels[given["attention_mask"] == 0] = -100
    labels[:, :3] = -100
    n = int((labels[:, 1:] != -100).sum())
    return Batch(inputs=given, labels=labels, rows=torch.arange(len(labels)).numpy(), n_targets=n, n_tokens=0)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "gpt-neox", "opt", "qwen2", "mistral", "bloom", "phi3"])
def test_chunks_give_the_loss_and_the_gradients_of_all_logits(arch: str) -> None:
    found = []
    for full in (False, True):
        model = tiny(arch, "lm")
        tuned = attach(model, "lora")
        with torch.no_grad():
            for number, parameter in enumerate(tuned.trained().values()):
                generator = torch.Generator().manual_seed(number)
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        batch = _batch(model)
        result = Objective(tuned, Task(name="causal_lm"), full_logits=full)(batch)
        assert (result.logits is None) != full, "the way that was asked for was not taken"
        result.loss.backward()
        found.append((result.loss.detach(), [p.grad for p in tuned.trained().values()]))
    assert_close(found[0][0], found[1][0], atol=1e-4, rtol=1e-5)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_scoring_counts_what_all_logits_count(arch: str) -> None:
    model = tiny(arch, "lm")
    tuned = attach(model, "lora")
    batch = _batch(model)
    with torch.inference_mode():
        scored = Objective(tuned, Task(name="causal_lm"), scoring=True)(batch)
        whole = Objective(tuned, Task(name="causal_lm"), full_logits=True)(batch)
    assert batch.labels is not None and whole.logits is not None
    told = batch.labels[:, 1:] != -100
    right = int((whole.logits[:, :-1].argmax(-1) == batch.labels[:, 1:])[told].sum())
    assert scored.correct == right
    assert_close(float(scored.loss), float(whole.loss), rtol=1e-5, atol=1e-4)
