"""MAM adapter: its own tests, beside those that every method passes."""

import pytest
import torch
from methods.checks import attach_double, contribution, logits, read_by, stir, train
from methods.generation import check_checkpointing, check_generation, check_low_precision, stirred
from tiny import tiny
from transformers import RobertaConfig, RobertaModel

from luthier.anatomy import Anatomy
from luthier.core import CannotMerge
from luthier.methods.parts.parallel_branch import Beside
from luthier.methods.parts.prefixes import Prefixes
from luthier.surgery import attach, method
from luthier.surgery.tuning_files import stored_tensors

NAMES = ["bert", "llama", "t5"]
SMALL = {"length": 4, "mlp_width": 11, "width": 5}


def prefixes_of(tuned):
    (prefixes,) = tuned.modules(Prefixes).values()
    return prefixes


@pytest.mark.acid("mam", 1)
@pytest.mark.parametrize("name", NAMES)
def test_without_its_prefix_it_starts_at_the_base(name):
    model = tiny(name)
    base = logits(model)
    tuned = attach(model, "mam", **SMALL)
    assert (logits(model) - base).abs().max() > 1e-3
    prefixes_of(tuned).keys_values = lambda context: [(None, None)] * len(tuned.anatomy.attentions)
    assert torch.equal(logits(model), base)


@pytest.mark.acid("mam", 2, 5)
@pytest.mark.parametrize("name", NAMES)
def test_the_network_can_be_dropped_and_only_the_formula_is_stored(name):
    tuned = stirred(name, "mam", **SMALL)
    train(tuned, 2)
    chosen = tuned.tuning().method
    before = logits(tuned.model)
    network = sum(p.numel() for p in prefixes_of(tuned).parameters())
    assert tuned.n_trained() == chosen.n_params(tuned.anatomy)
    tuned.finish()
    assert (logits(tuned.model) - before).abs().max() <= 1e-6
    kept = sum(t.numel() for n, t in stored_tensors(tuned.tuning()).items() if not n.startswith("head/"))
    rows = sum(p.numel() for p in prefixes_of(tuned).parameters())
    assert kept == chosen.n_stored(tuned.anatomy)
    assert chosen.n_params(tuned.anatomy) - kept == network - rows


@pytest.mark.acid("mam", 3)
@pytest.mark.parametrize("name", NAMES)
def test_the_order_inside_the_prefix_does_not_matter(name):
    tuned = stirred(name, "mam", **{**SMALL, "mlp_width": 0})
    before = logits(tuned.model)
    for rows in prefixes_of(tuned).parameters():
        rows.data = rows.data.roll(1, 0)
    torch.testing.assert_close(logits(tuned.model), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [2.0, 4.0])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_its_branch_adds_the_formula_of_what_the_feed_forward_layer_reads(name, scale):
    tuned = attach_double(name, "mam", **SMALL, scale=scale)
    stir(tuned)
    model = tuned.model
    reader, behind = {
        "bert": lambda: (model.bert.encoder.layer[0].intermediate.dense, model.bert.encoder.layer[0].output.LayerNorm),
        "llama": lambda: (model.model.layers[0].mlp, model.model.layers[1].input_layernorm),  # behind the norm
        "gpt2": lambda: (model.transformer.h[0].mlp, model.transformer.h[1].ln_1),
    }[name]()
    (module,) = (m for k, m in tuned.modules(Beside).items() if k == "ffn_out@0")
    z = read_by(reader, model)
    inner = torch.relu(z @ module.down.weight.T + module.down.bias)
    expected = scale * (inner @ module.up.weight.T + module.up.bias)
    torch.testing.assert_close(contribution(tuned, behind, "ffn_out@0"), expected.detach(), rtol=1e-9, atol=1e-9)


def test_the_counts_are_those_of_the_catalogue():
    with torch.device("meta"):
        anatomy = Anatomy.read(RobertaModel(RobertaConfig(vocab_size=50265, max_position_embeddings=514)))
    assert method("mam").n_stored(anatomy) == 599_232
    assert method("mam", {"length": 30, "width": 512}).n_stored(anatomy) == 10_005_504
    assert method("mam").n_params(anatomy) - 599_232 == 15_391_520 - 294_912


def test_it_cannot_be_merged():
    tuned = stirred("bert", "mam", **SMALL)
    before = logits(tuned.model)
    with pytest.raises(CannotMerge, match="mam"):
        tuned.merge()
    assert torch.equal(logits(tuned.model), before)


@pytest.mark.acid("mam", 4)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generation_does_not_depend_on_cache_or_padding(name, beams):
    check_generation(stirred(name, "mam", **SMALL), beams)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_blocks_give_the_same_gradients(name):
    check_checkpointing(stirred(name, "mam", **SMALL))


def test_a_bf16_model_trains_fp32_numbers():
    check_low_precision("llama", "mam", **SMALL)
