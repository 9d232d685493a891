"""Models that train in place: fp32 masters rounded where the model reads them, and the fast paths that they take."""

import copy
from typing import Any

import pytest
import torch
from tiny import inputs, tiny
from torch import nn

from luthier.kernels import attention, can_pack
from luthier.surgery import attach
from luthier.surgery.frozen_layers import fast_linear


def test_an_embedding_that_trains_is_rounded_row_by_row_to_the_same_numbers() -> None:
    tuned = attach(tiny("bert").to(torch.bfloat16), "full")
    table = tuned.model.base_model.embeddings.word_embeddings
    master = tuned.trained()["model/bert.embeddings.word_embeddings.weight"]
    with torch.no_grad():
        master.add_(torch.randn_like(master) * 1e-3)
    ids = inputs(tuned.model)["input_ids"]
    found = table(ids)
    assert master.dtype == torch.float32
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.nn.functional.embedding(ids, master.to(torch.bfloat16)))


def test_the_gradient_of_a_word_that_stands_often_is_summed_in_fp32() -> None:
    tuned = attach(tiny("bert").to(torch.bfloat16), "full")
    table = tuned.model.base_model.embeddings.word_embeddings
    master = tuned.trained()["model/bert.embeddings.word_embeddings.weight"]
    often = torch.full((1, 1001), 7)
    table(often).sum().backward()
    assert master.grad is not None
    # bf16 stops counting at 256: adding one to it rounds back.
    assert torch.equal(master.grad[7], torch.full_like(master.grad[7], 1001.0))


def test_a_table_that_renormalises_its_rows_is_left_to_the_framework() -> None:
    model = tiny("bert").to(torch.bfloat16)
    model.base_model.embeddings.word_embeddings.max_norm = 0.5
    tuned = attach(model, "full")
    table = tuned.model.base_model.embeddings.word_embeddings
    with torch.no_grad():
        rows = table(inputs(tuned.model)["input_ids"])
    assert float(rows.float().norm(dim=-1).max()) <= 0.51


def test_rotated_queries_of_an_fp32_base_take_the_fast_attention_under_autocast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tuned = attach(tiny("llama"), "full")
    batch = inputs(tuned.model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = tuned.model(**batch)[0]
    assert tuned.forward.route_attention()

    def slow(*args: Any) -> Any:
        raise AssertionError("the plain formula was used")

    monkeypatch.setattr(attention, "_formula", slow)
    with torch.autocast("cpu", torch.bfloat16):
        found = tuned.model(**batch)[0]
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


def test_the_trunks_dropout_from_counters_drops_its_share_and_follows_the_ambient_seed() -> None:
    tuned = attach(tiny("bert"), "full")
    tuned.fast.accelerate(dropout=True)
    drop = tuned.model.bert.embeddings.dropout
    assert drop.fast is not None
    x = torch.ones(64, 512, requires_grad=True)
    drop.train()
    torch.manual_seed(3)
    first = drop(x)
    (gradient,) = torch.autograd.grad(first.sum(), x)
    second = drop(x)
    torch.manual_seed(3)
    again = drop(x)
    dropped = (first == 0).float().mean().item()
    assert abs(dropped - drop.p) < 0.01
    assert torch.allclose(first[first != 0], torch.tensor(1 / (1 - drop.p)), atol=1e-3)
    assert torch.equal(gradient, first.detach()), "what was dropped gets no gradient, the rest its factor"
    assert torch.equal(first, again) and not torch.equal(first, second)
    drop.eval()
    assert drop(x) is x


def test_dropout_is_left_alone_where_it_is_not_asked_for() -> None:
    tuned = attach(tiny("bert"), "lora")
    tuned.fast.accelerate()
    assert type(tuned.model.bert.embeddings.dropout) is nn.Dropout


CAST = ("lora", "bitfit", "full", "head_only", "child_tuning_d")


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CAST)
def test_a_model_that_is_cast_after_attaching_is_cast_whole_with_what_waits_beside_it(
    name: str, held: torch.dtype
) -> None:
    base = tiny("bert", "classification").to(held)
    batch = inputs(base)
    tuned = attach(copy.deepcopy(base), name)
    with torch.no_grad():
        for parameter in tuned.trained().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    tuned.activate()
    tuned.add("lora", name="waits", train_head=False)  # the first one's values lie beside the model while it is cast
    tuned.model.double()
    tuned.activate("default")
    with torch.no_grad():
        found = tuned.model(**batch).logits
        with tuned.base_only():
            plain = tuned.model(**batch).logits
        again = tuned.model(**batch).logits
    expected = base.double()(**batch).logits
    assert found.dtype == plain.dtype == torch.float64
    assert torch.equal(plain, expected), "the base is the one that was loaded, in its new type"
    assert torch.equal(found, again) and not torch.equal(found, plain)
    for wanted in (torch.bfloat16, torch.float32):
        tuned.model.to(wanted)
        with tuned.base_only():
            assert tuned.model(**batch).logits.dtype == wanted
    assert {p.dtype for p in tuned.detach().parameters()} == {torch.float32}


def test_a_frozen_linear_layer_is_packed_and_a_layer_of_another_class_is_left_alone() -> None:
    class Other(nn.Linear):
        def forward(self, x: Any) -> Any:
            return super().forward(x) * 2

    plain, other = (cls(64, 64).to(torch.bfloat16).requires_grad_(False) for cls in (nn.Linear, Other))
    found = fast_linear(plain, min_width=64)
    assert (found is not None) == can_pack(plain.weight)
    assert fast_linear(other, min_width=64) is None
    assert fast_linear(plain, min_width=65) is None
    if found is not None:
        x = torch.randn(3, 64).to(torch.bfloat16)
        torch.testing.assert_close(found[0](x), plain(x), rtol=2**-6, atol=2**-5)
