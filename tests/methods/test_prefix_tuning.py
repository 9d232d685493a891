"""Prefix tuning: its own tests, beside those that every method passes."""

import pytest
import torch
from methods.checks import logits, train
from methods.generation import check_checkpointing, check_generation, check_low_precision, stirred
from tiny import inputs, tiny
from torch import nn
from transformers import BertConfig, BertModel, RobertaConfig, RobertaForSequenceClassification

from luthier.anatomy import Anatomy
from luthier.core import AnatomyError
from luthier.methods.parts.prefixes import Prefixes
from luthier.surgery import attach, method, prefix_attention
from luthier.surgery.tuning_files import stored_tensors

NAMES = ["bert", "llama", "t5"]


def prefixes_of(tuned):
    (prefixes,) = (m for m in tuned.tuning().modules() if isinstance(m, Prefixes))
    return prefixes


@pytest.mark.acid("prefix_tuning", 1)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_is_a_mixture_of_text_and_prefix_per_head(kv_heads):
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, h, 6, 10, generator=draw, dtype=torch.float64) for h in (4, kv_heads, kv_heads))
    pk, pv = (torch.randn(kv_heads, 3, 10, generator=draw, dtype=torch.float64) for _ in range(2))
    module = nn.Module().eval()
    module.is_causal, module.num_key_value_groups = False, 4 // kv_heads
    module.__dict__["_luthier_prefixes"] = [
        prefix_attention.Prefix(prefix_attention.Prefixes("", lambda: [(pk, pv)]), 0)
    ]
    found, _ = prefix_attention._attention(module, q, k, v, None, scaling=10**-0.5, is_causal=False)
    groups = 4 // kv_heads
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    pk, pv = (t.repeat_interleave(groups, 0).expand(2, 4, 3, 10) for t in (pk, pv))
    text, front = (q @ keys.transpose(-1, -2) * 10**-0.5 for keys in (k, pk))
    part = front.exp().sum(-1, keepdim=True)
    part = part / (part + text.exp().sum(-1, keepdim=True))
    expected = (1 - part) * (text.softmax(-1) @ v) + part * (front.softmax(-1) @ pv)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-9, atol=1e-9)


@pytest.mark.acid("prefix_tuning", 2)
@pytest.mark.parametrize("name", [*NAMES, "gpt2", "gemma2"])
def test_the_network_can_be_dropped(name):
    tuned = stirred(name, "prefix_tuning", length=5, mlp_width=11, dropout=0.1)
    train(tuned, 2)
    before = logits(tuned.model)
    stored_before = {k: v.clone() for k, v in stored_tensors(tuned.tuning()).items()}
    tuned.finish()
    assert (logits(tuned.model) - before).abs().max() <= 1e-6
    stored = stored_tensors(tuned.tuning())
    assert all(torch.equal(stored[k], v) for k, v in stored_before.items())
    assert not any("network" in n for n, _ in tuned.model.named_parameters())
    count = sum(t.numel() for n, t in stored.items() if not n.startswith("head/"))
    attentions = tuned.anatomy.attentions
    assert count == tuned.tuning().method.n_stored(tuned.anatomy)
    assert count == sum(2 * 5 * a.n_kv_heads * a.d_head for a in attentions)


@pytest.mark.acid("prefix_tuning", 3)
@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_of_length_zero_is_the_base_and_zeros_are_not(name):
    model = tiny(name)
    base = logits(model)
    tuned = attach(model, "prefix_tuning", length=0, mlp_width=0)
    torch.testing.assert_close(logits(model), base, rtol=1e-5, atol=1e-5)
    tuned.remove("default")
    tuned.add(method("prefix_tuning", {"length": 3, "mlp_width": 0}))
    for rows in prefixes_of(tuned).parameters():
        torch.nn.init.zeros_(rows)
    assert (logits(model) - base).abs().max() > 1e-3


@pytest.mark.parametrize("mlp", [0, 11])
def test_in_training_its_rows_are_dropped(mlp):
    tuned = attach(tiny("t5"), "prefix_tuning", length=5, mlp_width=mlp, dropout=0.4)
    prefixes = prefixes_of(tuned).train()
    torch.manual_seed(3)
    found = prefixes.keys_values(tuned.context)
    torch.manual_seed(3)
    rows = {}
    for name, group in prefixes.groups.items():
        if mlp:
            first, _, second = group.network
            whole = torch.tanh(group.embedding @ first.weight.T + first.bias) @ second.weight.T + second.bias
        else:
            whole = group.rows
        kept = torch.empty_like(whole).bernoulli_(0.6)
        assert 0 < int((kept == 0).sum()) < kept.numel()
        rows[name] = whole * kept / 0.6
    at = dict.fromkeys(rows, 0)
    for attention, pair in zip(tuned.anatomy.attentions, found, strict=True):
        group = "cross" if attention.cross else attention.stack
        for tensor in pair:  # keys, then values, of each attention in turn
            width = attention.n_kv_heads * attention.d_head
            columns = rows[group][:, at[group] : at[group] + width]
            at[group] += width
            by_head = columns.view(5, attention.n_kv_heads, attention.d_head).transpose(0, 1)
            torch.testing.assert_close(tensor, by_head)
    prefixes.eval()
    assert torch.equal(prefixes.keys_values(tuned.context)[0][0], prefixes.keys_values(tuned.context)[0][0])


def test_rows_start_small_and_the_networks_input_does_not():
    plain = prefixes_of(attach(tiny("bert"), "prefix_tuning", length=60, mlp_width=0)).groups["self"].rows.detach()
    assert plain.numel() > 10_000
    assert abs(float(plain.std()) / 0.02 - 1) < 0.03 and abs(float(plain.mean())) < 1e-3
    group = prefixes_of(attach(tiny("bert"), "prefix_tuning", length=60, mlp_width=11)).groups["self"]
    assert abs(float(group.embedding.detach().std()) - 1) < 0.06
    assert all(len(set(row.tolist())) > 40 for row in group.embedding.detach())


@pytest.mark.acid("prefix_tuning", 4)
@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2"])
def test_no_word_moves(name):
    model = tiny(name)
    embeddings = model.get_submodule({"gpt2": "transformer.drop"}.get(name, f"{name}.embeddings"))
    seen = []
    embeddings.register_forward_hook(lambda m, args, out: seen.append(out.detach().clone()))
    logits(model)
    attach(model, "prefix_tuning", length=5, mlp_width=11)
    logits(model)
    assert torch.equal(*seen)


def test_an_encoder_decoder_has_prefixes_of_its_own_in_all_three_places():
    tuned = attach(tiny("t5"), "prefix_tuning", length=5, mlp_width=11)
    prefixes = prefixes_of(tuned)
    assert set(prefixes.groups) == {"encoder", "decoder", "cross"}
    tuned.model(**inputs(tuned.model)).loss.backward()
    assert all(float(p.grad.abs().max()) > 0 for p in prefixes.parameters())
    assert tuned.n_trained() == tuned.tuning().method.n_params(tuned.anatomy)


def test_the_order_inside_a_prefix_does_not_matter():
    tuned = stirred("llama", "prefix_tuning", length=5, mlp_width=0)
    before = logits(tuned.model)
    for rows in prefixes_of(tuned).parameters():
        rows.data = rows.data.flip(0)
    torch.testing.assert_close(logits(tuned.model), before, rtol=1e-5, atol=1e-5)


def test_the_counts_are_those_of_the_catalogue():
    with torch.device("meta"):
        config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=2)
        tuned = attach(RobertaForSequenceClassification(config), "prefix_tuning", length=20, mlp_width=0)
        bert = Anatomy.read(BertModel(BertConfig()))
    assert tuned.n_trained(head=True) == 960_770
    short = method("prefix_tuning", {"length": 10, "mlp_width": 512})
    long = method("prefix_tuning", {"length": 200, "mlp_width": 800})
    assert (short.n_params(bert), short.n_stored(bert)) == (9_857_024, 184_320)
    assert (long.n_params(bert), long.n_stored(bert)) == (15_532_832, 3_686_400)


@pytest.mark.parametrize("name", ["bloom", "mpnet", "deberta-v2"])
def test_an_attention_that_no_key_can_be_put_into_is_refused_before_anything_is_touched(name):
    model = tiny(name)
    names = [n for n, _ in model.named_modules()]
    with pytest.raises(AnatomyError, match="attention interface"):
        attach(model, "prefix_tuning")
    assert [n for n, _ in model.named_modules()] == names


@pytest.mark.acid("p_tuning_v2", 4)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("mlp", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_it_computes_what_peft_computes_where_positions_are_shifted_as_peft_shifts_them(name, mlp):
    peft = pytest.importorskip("peft")
    tuned = stirred(name, "prefix_tuning", length=5, mlp_width=11 if mlp else 0)
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=mlp, encoder_hidden_size=11
    )
    if mlp and tuned.anatomy.n_kv_heads != tuned.anatomy.n_heads:
        # peft's network reads and writes rows of n_kv_heads * d_head, ours reads E of width d: no shared weights exist.
        tuned.finish()
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    theirs = peft.get_peft_model(tiny(name), config).eval()
    encoder = theirs.prompt_encoder["default"]
    group = prefixes_of(tuned).groups["self"]
    if group.network is not None:
        encoder.embedding.weight.data.copy_(group.embedding)
        encoder.transform.load_state_dict(group.network.state_dict())
    else:
        encoder.embedding.weight.data.copy_(group.rows)
    batch = inputs(tuned.model, padded=False)
    with torch.no_grad():
        found = theirs(**batch).logits
    # peft hands its prefix over as a cache, so its words stand at 5, 6, ... ; ours stay at 0, 1, ... unless told.
    there = torch.arange(5, 5 + batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    torch.testing.assert_close(logits(tuned.model, batch | {"position_ids": there}), found, rtol=1e-5, atol=1e-5)
    assert (logits(tuned.model, batch) - found).abs().max() > 1e-3


@pytest.mark.acid("prefix_tuning", 5)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart", "mistral"])
def test_generation_does_not_depend_on_cache_or_padding(name, beams):
    check_generation(stirred(name, "prefix_tuning", length=5, mlp_width=11), beams)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_blocks_give_the_same_gradients(name):
    check_checkpointing(stirred(name, "prefix_tuning", length=5, mlp_width=11, dropout=0.1))


def test_a_bf16_model_trains_fp32_numbers():
    check_low_precision("llama", "prefix_tuning", length=5, mlp_width=11)
