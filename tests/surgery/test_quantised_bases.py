"""Bases whose layers hold integers or float8 with a scale beside them, as bitsandbytes and transformers hold them."""

from typing import Any

import pytest
import torch
from cells import small
from kinds import prepared, with_twin
from torch import Tensor, nn
from unusual import learnt, llama, word_ids

from luthier.core import AnatomyError, CannotMerge
from luthier.surgery import METHODS, attach


class Int8(nn.Linear):
    """As bitsandbytes' Linear8bitLt: a scale for each row, under another name."""

    def __init__(self, plain: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = plain.in_features, plain.out_features, None
        scale = plain.weight.data.abs().amax(1, keepdim=True) / 127
        self.register_buffer("SCB", scale)
        self.weight = nn.Parameter((plain.weight.data / scale).round().to(torch.int8), requires_grad=False)

    def numbers(self) -> Tensor:
        scale: Tensor = self.SCB  # type: ignore[assignment]
        return self.weight.float() * scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.numbers().to(x.dtype))


class Float8(nn.Linear):
    """As transformers' FP8Linear: one scale for a block, as a parameter."""

    def __init__(self, plain: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = plain.in_features, plain.out_features, None
        scale = plain.weight.data.abs().max() / 448
        self.weight_scale_inv = nn.Parameter(scale.reshape(1, 1), requires_grad=False)
        self.weight = nn.Parameter((plain.weight.data / scale).to(torch.float8_e4m3fn), requires_grad=False)

    def numbers(self) -> Tensor:
        return self.weight.float() * self.weight_scale_inv

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.numbers().to(x.dtype))


def quantised(kind: Any) -> tuple[Any, Any]:
    """A model with layers of `kind`, and the same function with plain layers."""
    short, plain = llama(), llama()
    for name, module in list(plain.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            parent, _, child = name.rpartition(".")
            held = kind(module)
            setattr(short.get_submodule(parent), child, held)
            with torch.no_grad():
                module.weight.copy_(held.numbers())
    return short, plain


@pytest.mark.parametrize("kind", [Int8, Float8])
@pytest.mark.parametrize("name", METHODS.names())
def test_a_method_beside_quantised_layers_computes_what_it_does_beside_plain_ones_or_is_refused(
    name: str, kind: Any
) -> None:
    short, plain = quantised(kind)
    ids = word_ids(2, 7)
    both = with_twin(name, short, plain)
    if both is None:
        return
    tuned = both[0]
    for each in both:
        learnt(prepared(each, {"input_ids": ids, "labels": ids}), 0.1)
        each.model.eval()
    torch.testing.assert_close(short(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    before = {n: p.clone() for n, p in short.named_parameters()}
    tables = {"tensor/model.embed_tokens.weight", "tensor/lm_head.weight"}
    if tuned.modules().keys() - tables or not tuned.tuning().method.mergeable:
        with pytest.raises(CannotMerge):
            tuned.merge()
        assert all(torch.equal(p.float(), before[n].float()) for n, p in short.named_parameters())
        return
    merged = tuned.merge()  # all that it trains lies beside the quantised layers, in tensors such as a norm's
    assert not any(type(m) is nn.Linear for n, m in short.named_modules() if n != "lm_head")
    torch.testing.assert_close(merged(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["dora", "full", "intrinsic_said", "diff_pruning", "lst"])
def test_methods_that_compute_with_the_weight_are_refused_beside_int8(name: str) -> None:
    with pytest.raises(AnatomyError, match="quantised"):
        attach(quantised(Int8)[0], small(name))


@pytest.mark.parametrize("name", ["lora", "ia3", "adalora"])
def test_merging_into_int8_says_that_the_layer_is_quantised(name: str) -> None:
    tuned = learnt(attach(quantised(Int8)[0], small(name)))
    with pytest.raises(CannotMerge, match="quantised"):
        tuned.merge()
