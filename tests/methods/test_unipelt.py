"""UniPELT: its own tests, beside those that every method passes."""

import pytest
import torch
from methods.checks import logits, stir, train
from methods.generation import check_checkpointing, check_generation, check_low_precision, stirred
from tiny import inputs, tiny
from transformers import BertConfig, BertModel

from luthier.anatomy import Anatomy
from luthier.core import CannotMerge, ConfigError
from luthier.methods.hybrid.unipelt import GatedAdapter, GatedPrefixes, GatedUpdate, PrefixGate
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


@pytest.mark.acid("unipelt", 1)
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


@pytest.mark.acid("unipelt", 1)
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


@pytest.mark.acid("unipelt", 2)
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


@pytest.mark.acid("unipelt", 3)
def test_each_example_has_gates_of_its_own():
    tuned = stirred("bert", "unipelt", **SMALL)
    logits(tuned.model)
    for gate in tuned.modules(PrefixGate).values():
        assert gate.opened.shape == (3, 1, 1)
        assert len(set(gate.opened.flatten().tolist())) == 3


def test_the_gate_takes_the_place_of_alpha_over_rank():
    tuned = stirred("bert", "unipelt", **SMALL)
    update = next(iter(tuned.modules(GatedUpdate).values()))
    tuned.context.masks, tuned.context.past = {"": torch.tensor([[1, 1, 0]])}, 0
    tuned.context.memory.clear()
    x = torch.randn(1, 3, 48)
    gate = torch.sigmoid(x[:, :2] @ update.gate.linear.weight.T + update.gate.linear.bias).mean()
    found = update.after(x, torch.zeros(1, 3, 48))
    torch.testing.assert_close(found, gate * (x @ update.a.T @ update.b.T))


@pytest.mark.acid("unipelt", 5)
@pytest.mark.parametrize("name", NAMES)
def test_every_gate_learns_by_the_second_step(name):
    tuned = attach(tiny(name), "unipelt", **SMALL)
    train(tuned, 1)
    tuned.model.train()
    tuned.model(**inputs(tuned.model)).loss.backward()
    assert gates_of(tuned)
    assert all(float(p.grad.abs().max()) > 0 for gate in gates_of(tuned) for p in gate.parameters())


@pytest.mark.acid("unipelt", 4)
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


def test_prompt_vectors_before_the_text_count_as_real_tokens_in_a_gate():
    tuned = stirred("bert", "unipelt", **SMALL)
    for gate in gates_of(tuned)[:3]:
        tuned.context.masks, tuned.context.past = {"": torch.tensor([[1, 1, 0], [1, 0, 0]])}, 0
        tuned.context.memory.clear()
        x = torch.randn(2, 5, gate.linear.in_features)  # two vectors, then the text that the mask knows
        opened = torch.sigmoid(x @ gate.linear.weight[0] + gate.linear.bias)
        expected = torch.stack([opened[0, :4].mean(), opened[1, :3].mean()])
        torch.testing.assert_close(gate(x, tuned.context).flatten(), expected)


@pytest.mark.parametrize(("name", "task"), [("bert", "tokens"), ("roberta", "tokens"), ("llama", "lm"), ("t5", "")])
def test_vectors_that_are_words_open_the_gates_as_those_words_do(name, task):
    model = tiny(name, task)
    batch = inputs(model)
    labels = batch.pop("labels")
    decoder = {"decoder_input_ids": labels.clamp(min=0)} if name == "t5" else {}
    ids = torch.tensor([17, 90, 5, 44]).expand(3, 4)
    longer = {"input_ids": torch.cat([ids, batch["input_ids"]], 1),
              "attention_mask": torch.cat([torch.ones_like(ids), batch["attention_mask"]], 1)}  # fmt: skip
    alone = attach(model, "unipelt", **SMALL)
    stir(alone)
    values = {n: p.detach().clone() for n, p in alone.trained().items()}
    expected = logits(model, longer | decoder)
    alone.detach()
    both = {f"unipelt.{k}": v for k, v in SMALL.items()}
    words = ((17,), (90,), (5,), (44,))
    both |= {"prompt_tuning.length": 4, "prompt_tuning.init": "words", "prompt_tuning.words": words}
    tuned = attach(model, method("unipelt+prompt_tuning", both))
    with torch.no_grad():
        for n, p in tuned.trained().items():
            if not n.startswith("prompt_tuning:"):
                p.copy_(values[n.removeprefix("unipelt:")])
    found = logits(model, batch | decoder)
    real = batch["attention_mask"].bool() if name != "t5" else ...
    expected = expected[:, 4:] if name != "t5" else expected
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=2e-5)


def _gate_of(module, x, mask):
    opened = torch.sigmoid(x @ module.gate.linear.weight[0] + module.gate.linear.bias)
    return (opened * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_adapter_adds_its_formula_times_the_gate_of_what_it_reads(name):
    tuned = stirred(name, "unipelt", **SMALL)
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    for module in tuned.modules(GatedAdapter).values():
        tuned.context.masks, tuned.context.past, tuned.context.batch = {"": mask.long()}, 0, 2
        tuned.context.memory.clear()
        y = torch.randn(2, 3, 48)
        inner = torch.relu(y @ module.down.weight.T + module.down.bias)
        adapter = inner @ module.up.weight.T + module.up.bias
        gate = _gate_of(module, y, mask)
        assert 0.05 < float(gate[0].detach()) < 0.95
        torch.testing.assert_close(module.after(None, y), y + gate[:, None, None] * adapter, rtol=1e-4, atol=1e-5)
        flat = module.after(None, y.view(6, 48))  # as OPT hands it over
        torch.testing.assert_close(flat.view(2, 3, 48), y + gate[:, None, None] * adapter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_prefix_is_its_rows_times_the_gate_of_what_the_attention_reads(name):
    tuned = stirred(name, "unipelt", **SMALL)
    model = tuned.model
    batch = inputs(model)
    mask = batch["attention_mask"].float()
    seen = {}
    handles = []
    for key, gate in tuned.modules(PrefixGate).items():
        site = next(s for s in tuned.anatomy.all_sites if s.key == key.partition("~")[0])
        handles.append(model.get_submodule(site.path).register_forward_pre_hook(
            lambda m, args, gate=gate: seen.__setitem__(id(gate), args[0].detach())
        ))  # fmt: skip
    logits(model, batch)
    (source,) = tuned.modules(GatedPrefixes).values()
    plain = source.prefixes.keys_values(tuned.context)
    gated = source.keys_values(tuned.context)
    checked = 0
    for attention, gate, (keys, values), (k, v) in zip(
        tuned.anatomy.attentions, source.__dict__["gates"], plain, gated, strict=True
    ):
        x = seen[id(gate)]
        here = mask if attention.stack != "decoder" else torch.ones(x.shape[:2])
        opened = _gate_of(gate, x, here)[:, None, None, None]
        torch.testing.assert_close(k(), opened * keys, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(v(), opened * values, rtol=1e-4, atol=1e-6)
        checked += 1
    assert checked == len(tuned.anatomy.attentions) > 2


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "opt"])
def test_generation_does_not_depend_on_cache_or_padding(name, beams):
    check_generation(stirred(name, "unipelt", **SMALL), beams)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_blocks_give_the_same_gradients(name):
    check_checkpointing(stirred(name, "unipelt", **SMALL))


def test_a_bf16_model_trains_fp32_numbers():
    check_low_precision("llama", "unipelt", **SMALL)
