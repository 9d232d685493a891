"""UniPELT: its own tests, beside those that every method passes."""

import pytest
import torch
from methods.checks import logits, stir, train
from methods.generation import check_checkpointing, check_generation, check_low_precision, stirred
from tiny import inputs, tiny
from transformers import BertConfig, BertModel

from luthier.anatomy import Anatomy
from luthier.core import CannotMerge, ConfigError
from luthier.methods.hybrid.unipelt import GatedUpdate, PrefixGate
from luthier.methods.parts.prefixes import Prefixes
from luthier.surgery import attach, method

NAMES = ["bert", "llama", "t5"]
SMALL = {"rank": 3, "length": 4, "mlp_width": 9, "width": 5}


def gates_of(tuned):
    return [m.gate for m in tuned.modules().values() if hasattr(m, "gate")]


@torch.no_grad()
def shut(tuned):
    for gate in gates_of(tuned):
        gate.linear.weight.zero_()
        gate.linear.bias.fill_(-1e4)


@pytest.mark.parametrize("name", NAMES)
def test_behind_shut_gates_updates_and_adapters_vanish(name):
    model = tiny(name)
    base = logits(model)
    tuned = attach(model, "unipelt", use=("lora", "adapter"), **SMALL)
    stir(tuned)
    for key, unfrozen in tuned.tuning().unfrozen.items():
        assert key.startswith("head/")
        unfrozen.parameter.data.copy_(unfrozen.original)
    assert (logits(model) - base).abs().max() > 1e-3
    shut(tuned)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("name", NAMES)
def test_behind_shut_gates_a_prefix_is_zeros_and_not_absent(name):
    model = tiny(name)
    base = logits(model)
    tuned = attach(model, "unipelt", **SMALL)
    shut(tuned)
    found = logits(model)
    assert (found - base).abs().max() > 1e-3
    tuned.remove("default")
    tuned.add(method("prefix_tuning", {"length": 4, "mlp_width": 0}))
    for rows in next(iter(tuned.modules(Prefixes).values())).parameters():
        torch.nn.init.zeros_(rows)
    torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "task"), [("bert", ""), ("roberta", ""), ("llama", "lm"), ("opt", "lm"), ("t5", "")])
def test_padding_and_neighbours_change_nothing(name, task):
    model = tiny(name, task)
    stir(attach(model, "unipelt", **SMALL))
    batch = {k: v for k, v in inputs(model).items() if k != "labels"}
    decoder = {"decoder_input_ids": torch.tensor([[5, 9, 7]])} if name == "t5" else {}
    together = logits(model, batch | {k: v.expand(3, -1) for k, v in decoder.items()})
    for row in range(3):
        real = int(batch["attention_mask"][row].sum())
        alone = logits(model, {k: v[row : row + 1, :real] for k, v in batch.items()} | decoder)
        torch.testing.assert_close(together[row : row + 1, : alone.shape[1]], alone, rtol=1e-5, atol=1e-5)


def test_each_example_has_gates_of_its_own():
    tuned = stirred("bert", "unipelt", **SMALL)
    logits(tuned.model)
    for gate in tuned.modules(PrefixGate).values():
        assert gate.opened.shape == (3, 1, 1)
        assert len(set(gate.opened.flatten().tolist())) == 3


def test_the_gate_takes_the_place_of_alpha_over_rank():
    tuned = stirred("bert", "unipelt", **SMALL)
    update = next(iter(tuned.modules(GatedUpdate).values()))
    tuned.context.mask, tuned.context.past = torch.tensor([[1, 1, 0]]), 0
    tuned.context.memory.clear()
    x = torch.randn(1, 3, 48)
    gate = torch.sigmoid(x[:, :2] @ update.gate.linear.weight.T + update.gate.linear.bias).mean()
    found = update.after(x, torch.zeros(1, 3, 48))
    torch.testing.assert_close(found, gate * (x @ update.a.T @ update.b.T))


@pytest.mark.parametrize("name", NAMES)
def test_every_gate_learns_by_the_second_step(name):
    tuned = attach(tiny(name), "unipelt", **SMALL)
    train(tuned, 1)
    tuned.model.train()
    tuned.model(**inputs(tuned.model)).loss.backward()
    assert gates_of(tuned)
    assert all(float(p.grad.abs().max()) > 0 for gate in gates_of(tuned) for p in gate.parameters())


def test_it_cannot_be_merged():
    with pytest.raises(CannotMerge, match="unipelt"):
        stirred("bert", "unipelt", **SMALL).merge()


def test_the_counts_are_those_of_the_catalogue():
    with torch.device("meta"):
        anatomy = Anatomy.read(BertModel(BertConfig()))
    chosen = method("unipelt")
    assert chosen.n_stored(anatomy) == 1_410_672
    assert chosen.n_params(anatomy) - chosen.n_stored(anatomy) == 9_857_024 - 184_320


@pytest.mark.parametrize("use", [("adapter", "prefix"), ("adapter", "lora"), ("lora",), ("prefix",)])
def test_the_variants_count_what_they_hold(use):
    tuned = attach(tiny("t5"), "unipelt", use=use, **SMALL)
    assert tuned.n_trained() == tuned.tuning().method.n_params(tuned.anatomy)
    train(tuned, 1)


def test_an_unknown_part_is_refused():
    with pytest.raises(ConfigError, match="name some of lora, prefix, adapter"):
        method("unipelt", {"use": ("lora", "adaptor")})


def test_prompt_vectors_before_the_text_count_as_real_tokens():
    tuned = attach(tiny("llama"), method("unipelt+prompt_tuning", {f"unipelt.{k}": v for k, v in SMALL.items()}))
    assert torch.isfinite(tuned.model(**inputs(tuned.model)).loss)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "opt"])
def test_generation_does_not_depend_on_cache_or_padding(name, beams):
    check_generation(stirred(name, "unipelt", **SMALL), beams)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_blocks_give_the_same_gradients(name):
    check_checkpointing(stirred(name, "unipelt", **SMALL))


def test_a_bf16_model_trains_fp32_numbers():
    check_low_precision("llama", "unipelt", **SMALL)
