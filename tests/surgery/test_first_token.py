"""The last block for the first token alone: the same logits and gradients, and only where that is so."""

from typing import Any

import pytest
import torch
from contracts.cells import Refused, attached
from tiny import inputs, tiny
from torch import Tensor, nn

from luthier.core import key
from luthier.surgery import METHODS, AddBranch, Attachment, PrependTokens, Tuned, attach
from luthier.surgery.first_token import first_token_place


def _needs_all_tokens(tuned: Tuned) -> bool:
    """Prompts put other tokens first, a branch reads all states, and some attachments mix the tokens of a row."""
    edits = list(tuned.tuning().method.edits(tuned.anatomy))
    mixing = (m for m in tuned.modules(Attachment).values() if not m.per_token)
    return any(isinstance(e, PrependTokens | AddBranch) for e in edits) or any(True for _ in mixing)


def _moved(tuned: Tuned) -> None:
    """No trained number is at its start, where many methods change nothing."""
    generator = torch.Generator().manual_seed(key(0, "moved"))
    with torch.no_grad():
        for parameter in tuned.trained().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def _pass(tuned: Tuned, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    given = {n: v for n, v in batch.items() if n != "labels"}
    tuned.model.zero_grad()
    logits = tuned.model(**given).logits
    logits.square().sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in tuned.trained().items() if p.grad is not None}


@pytest.mark.parametrize("name", METHODS.names())
def test_with_every_method_the_cut_block_gives_the_same_logits_and_gradients(name: str) -> None:
    try:
        tuned, model, batch = attached(name, "bert")
    except Refused:
        return
    model.eval().double()
    _moved(tuned)
    narrow = tuned.fast.first_token()
    if narrow is None:
        assert _needs_all_tokens(tuned), "an eighth of the products is work for nobody"
        return
    assert not _needs_all_tokens(tuned)
    whole, whole_grads = _pass(tuned, batch)
    with narrow.on():
        cut, cut_grads = _pass(tuned, batch)
    assert torch.allclose(cut, whole, rtol=1e-11, atol=1e-12)
    assert cut_grads.keys() == whole_grads.keys()
    for n, grad in whole_grads.items():
        assert torch.allclose(cut_grads[n], grad, rtol=1e-9, atol=1e-11), n


@pytest.mark.parametrize("arch", ["bert", "roberta", "electra", "deberta-v2"])
def test_the_bert_family_is_cut_and_gives_the_same_logits(arch: str) -> None:
    model = tiny(arch, "classification").eval().double()
    tuned = attach(model, "lora")
    _moved(tuned)
    batch = inputs(model)
    narrow = tuned.fast.first_token()
    assert narrow is not None
    whole, _ = _pass(tuned, batch)
    seen: list[Any] = []
    handle = tuned.edited.modules[tuned.anatomy.blocks[-1].path].register_forward_hook(
        lambda m, a, out: seen.append((out[0] if isinstance(out, tuple) else out).shape)
    )
    with narrow.on():
        cut, _ = _pass(tuned, batch)
    handle.remove()
    assert torch.allclose(cut, whole, rtol=1e-11, atol=1e-12)
    assert seen == [(len(batch["input_ids"]), 1, tuned.anatomy.d)], "the last block computed more than one token"


@pytest.mark.parametrize(
    ("arch", "task"),
    [("bert", "tokens"), ("albert", "classification"), ("llama", "classification"), ("gpt2", "lm"), ("t5", "seq2seq")],
)
def test_a_model_whose_head_reads_other_tokens_or_has_no_such_place_is_left_whole(arch: str, task: str) -> None:
    assert attach(tiny(arch, task), "lora").fast.first_token() is None


def test_a_head_that_takes_the_mean_is_found_out() -> None:
    model = tiny("bert", "classification")

    class Mean(nn.Module):
        def forward(self, states: Tensor) -> Tensor:
            return states.mean(1)

    model.bert.pooler = Mean()
    assert attach(model, "lora").fast.first_token() is None


def test_outside_of_the_switch_a_user_sees_all_states() -> None:
    model = tiny("bert", "classification")
    tuned = attach(model, "lora")
    assert tuned.fast.first_token() is not None
    batch = inputs(model)
    batch.pop("labels", None)
    out = model(**batch, output_hidden_states=True)
    assert out.hidden_states[-1].shape[1] == batch["input_ids"].shape[1]


def test_who_asks_again_gets_the_same_hook_and_it_goes_when_the_tunings_go() -> None:
    model = tiny("bert", "classification")
    before = [len(m._forward_pre_hooks) for m in model.modules()]
    tuned = attach(model, "lora")
    first = tuned.fast.first_token()
    assert first is not None and tuned.fast.first_token() is first
    place = first_token_place(tuned.anatomy, tuned.edited.modules)
    assert place is not None and len(place._forward_pre_hooks) == 1
    tuned.detach()
    assert [len(m._forward_pre_hooks) for m in model.modules()] == before
