"""Tensors of a bf16 model that train in place: fp32 masters, rounded where the model reads them."""

import torch
from tiny import inputs, tiny

from luthier.surgery import attach


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
