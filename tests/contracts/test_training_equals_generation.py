"""What a decoder learns from and what it writes with are one computation: training's logits are generation's.

Training reads whole rows, padded on the right, through the engine's objective and its fast paths. Generation reads the
prompt, padded on the left, and then one token at a time from its cache.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cells import ARCHITECTURES, Refused, attached, shake, small, task_of
from tiny import tiny
from tiny_methods import settings
from torch import Tensor, nn
from torch.testing import assert_close

from luthier.core import AnatomyError, NothingTrains
from luthier.data.batches import Batch
from luthier.data.tasks import Task
from luthier.surgery import METHODS, attach, compose
from luthier.training.objective import Objective

DECODERS = [arch for arch, task in ARCHITECTURES.items() if task == "lm"]
TOGETHER = ["lora+prompt_tuning", "ia3+prefix_tuning"]
LENGTHS, ANSWER, PAD, IGNORED = (3, 9, 6), 4, 0, -100

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def rows(n_vocab: int) -> list[Tensor]:
    """Prompts of three lengths, each with an answer of four tokens."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(4, n_vocab, (n + ANSWER,), generator=generator) for n in LENGTHS]


def as_trained(tuned: Any, given: list[Tensor], *, training: bool) -> Tensor:
    """Logits of the answers' tokens, (rows, ANSWER, vocabulary), by the objective of the loop."""
    width = max(len(row) for row in given)
    ids, mask = torch.full((len(given), width), PAD), torch.zeros(len(given), width, dtype=torch.long)
    labels = torch.full((len(given), width), IGNORED)
    for i, row in enumerate(given):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
        labels[i, LENGTHS[i] : len(row)] = row[LENGTHS[i] :]
    n = int((labels != IGNORED).sum())
    batch = Batch(
        inputs={"input_ids": ids, "attention_mask": mask}, labels=labels, rows=torch.arange(len(given)).numpy(),
        n_targets=n, n_tokens=int(mask.sum()),
    )  # fmt: skip
    tuned.model.eval()
    tuned.model.luthier.train(training)
    with torch.no_grad():
        torch.manual_seed(5)
        result = Objective(tuned, Task(name="causal_lm"), full_logits=True)(batch)
        torch.manual_seed(5)
        chunked = Objective(tuned, Task(name="causal_lm"))(batch)
    assert result.logits is not None
    assert_close(chunked.loss, result.loss, rtol=1e-5, atol=1e-4)
    return torch.stack([result.logits[i, LENGTHS[i] - 1 : LENGTHS[i] - 1 + ANSWER] for i in range(len(given))])


def as_written(model: Any, given: list[Tensor], prompts: Sequence[int]) -> Tensor:
    """The same logits from `generate`, which is made to write what follows these many tokens of each row."""
    model.eval()
    width, n_new = max(prompts), len(given[0]) - prompts[0]
    ids, mask = torch.full((len(given), width), PAD), torch.zeros(len(given), width, dtype=torch.long)
    for i, row in enumerate(given):
        ids[i, width - prompts[i] :], mask[i, width - prompts[i] :] = row[: prompts[i]], 1

    def only(row: int, so_far: Tensor) -> list[int]:
        return [int(given[row][prompts[row] + len(so_far) - width])]

    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=n_new, do_sample=False, pad_token_id=PAD,
        eos_token_id=None, prefix_allowed_tokens_fn=only, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(out.sequences[:, width:], torch.stack([row[-n_new:] for row in given]))
    return torch.stack(out.logits, 1)


def tuned_decoder(name: str, arch: str, fast: bool) -> tuple[Any, Any]:
    """The method, without dropout, every number off its start; None where it has nothing to train in a decoder."""
    parts = name.split("+")
    if len(parts) == 1:
        if task_of(name, arch) != "lm":
            return None, None
        method = small(name)
        if hasattr(method, "dropout"):
            method = dataclasses.replace(method, dropout=0.0)  # type: ignore[type-var]
        tuned, model, _ = attached(name, arch, method=method)
    else:
        model = tiny(arch, "lm")
        tuned = attach(model, compose.method(name, settings(name)))
    for module in model.modules():  # a branch beside the trunk has the trunk's dropout
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    one = rows(model.config.vocab_size)[1][None]
    for part in (p for t in tuned.tunings.values() for p in t.method.parts() if p.looks_at_data):
        part.prepare(tuned, [lambda: model(input_ids=one, labels=one).loss] * 2)
    model.zero_grad()
    shake(tuned)
    if fast:
        tuned.forward.route_attention()
        tuned.fast.accelerate()
    return tuned, model


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("arch", DECODERS)
@pytest.mark.parametrize("name", [*METHODS.names(), *TOGETHER])
def test_the_logits_of_training_are_those_of_generation(name: str, arch: str, fast: bool) -> None:
    try:
        tuned, model = tuned_decoder(name, arch, fast)
    except Refused:
        return  # the contract counts the refusal
    if tuned is None:
        with pytest.raises((AnatomyError, NothingTrains)):
            attach(tiny(arch, "lm"), small(name))
        return
    method = tuned.tuning().method
    given = rows(model.config.vocab_size)
    trained = as_trained(tuned, given, training=False)
    # All but the last token at once, as the first pass of `generate` reads a prompt.
    prompts = [row[:-1] for row in given]
    first = as_written(model, given, prompts=[len(prompt) for prompt in prompts])[:, 0]
    assert_close(as_trained(tuned, prompts, training=False)[:, -1], first, **CLOSE)
    # Token by token from the cache.
    written = as_written(model, given, prompts=LENGTHS)
    if method.looks_ahead:
        assert not torch.allclose(trained, written, **CLOSE), "it says that it looks ahead, and does not"
    else:
        assert_close(trained, written, **CLOSE)
    with tuned.base_only():
        plain = as_written(model, given, prompts=LENGTHS)
    assert not torch.allclose(plain, written, atol=1e-3), "the tuning changes nothing here"
    learning = as_trained(tuned, given, training=True)
    assert torch.allclose(learning, trained, **CLOSE) == (not method.draws)
