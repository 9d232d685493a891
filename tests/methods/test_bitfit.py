"""BitFit: its own tests, beside those that every method passes."""

import pytest
import torch
from methods.checks import frozen_copy, logits, same, train
from tiny import HIDDEN, INNER, LAYERS, inputs, tiny

from luthier.core import AnatomyError
from luthier.surgery import attach, load
from luthier.surgery.tuning_files import stored_tensors


@pytest.mark.acid("bitfit", 1)
def test_counts_of_all_of_the_blocks_and_of_the_subset():
    block = 7 * HIDDEN + INNER
    assert attach(tiny("bert"), "bitfit", embeddings=False).n_trained() == LAYERS * block
    assert attach(tiny("bert"), "bitfit").n_trained() == LAYERS * block + 2 * HIDDEN  # embedding norm and pooler
    assert attach(tiny("roberta"), "bitfit").n_trained() == LAYERS * block + HIDDEN  # its pooler belongs to the head
    assert attach(tiny("bert"), "bitfit", subset=True).n_trained() == LAYERS * (HIDDEN + INNER)


# Where a tiny model keeps the biases of its queries and of its first feed-forward projection, and which numbers of
# them. By hand from the architectures: 4 heads of 12, hidden 48, inner 80 (BLOOM has 4 times the hidden width).
_ALL = slice(None)
_BY_HEAD = [g * 36 + i for g in range(4) for i in range(12)]  # q, k, v of each head follow one another
SUBSET = {
    "bert": {"attention.self.query.bias": _ALL, "intermediate.dense.bias": _ALL},
    "opt": {"self_attn.q_proj.bias": _ALL, "fc1.bias": _ALL},
    "llama": {"self_attn.q_proj.bias": _ALL, "mlp.up_proj.bias": _ALL},
    "gpt2": {"attn.c_attn.bias": list(range(48)), "mlp.c_fc.bias": _ALL},
    "modernbert": {"attn.Wqkv.bias": list(range(48)), "mlp.Wi.bias": list(range(80, 160))},
    "gpt-neox": {"attention.query_key_value.bias": _BY_HEAD, "mlp.dense_h_to_4h.bias": _ALL},
    "bloom": {"self_attention.query_key_value.bias": _BY_HEAD, "mlp.dense_h_to_4h.bias": _ALL},
}


@pytest.mark.parametrize("name", SUBSET)
def test_the_subset_moves_the_biases_of_queries_and_of_the_first_projection_and_nothing_else(name, tmp_path):
    model = tiny(name)
    start = {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}
    tuned = attach(model, "bitfit", subset=True, train_head=False)
    blocks = [b.path for b in tuned.anatomy.blocks]
    may_move = {f"{path}.{short}": rows for path in blocks for short, rows in SUBSET[name].items()}
    count = sum(len(torch.arange(len(start[n]))[rows]) for n, rows in may_move.items())
    assert tuned.n_trained() == len_of(tuned) == count
    train(tuned, 3, decay=0.1)
    for full, parameter in model.named_parameters(remove_duplicate=False):
        if full.startswith("luthier."):
            continue
        own = full.replace(".base.", ".")
        moved = parameter.detach() != start[own]
        expected = torch.zeros_like(moved)
        if own in may_move:
            expected[may_move[own]] = True
        assert not bool((moved & ~expected).any()), own
        assert bool(moved.any()) == (own in may_move), own
    tuned.save(tmp_path / "t")
    again = tiny(name)
    load(again, tmp_path / "t")
    assert torch.equal(logits(again), logits(model))
    stored = sum(t.numel() for n, t in stored_tensors(tuned.tuning()).items())
    assert stored == tuned.tuning().method.n_stored(tuned.anatomy)


@pytest.mark.acid("bitfit", 2)
@pytest.mark.parametrize("name", ["t5", "mistral"])
def test_a_model_without_biases_is_refused_or_given_new_ones(name):
    with pytest.raises(AnatomyError, match="add_missing_biases=true"):
        attach(tiny(name), "bitfit")
    model = tiny(name)
    before = logits(model)
    tuned = attach(model, "bitfit", add_missing_biases=True)
    assert torch.equal(logits(model), before)
    kinds = [k for k in tuned.anatomy.kinds() if k.split(".")[0] in ("attn", "cross", "ffn") and "." in k]
    assert tuned.n_trained() == sum(s.d_out for s in tuned.anatomy.sites(*kinds)) == len_of(tuned)
    losses = train(tuned, 15, lr=3e-2)
    assert losses[-1] < losses[0]


def len_of(tuned):
    return tuned.tuning().method.n_params(tuned.anatomy)


@pytest.mark.acid("bitfit", 3)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_only_biases_move_and_all_but_the_key_s_do(name):
    model = tiny(name)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    tuned = attach(model, "bitfit")
    before = frozen_copy(tuned)
    train(tuned, 5, decay=0.1)
    assert same(dict(model.named_parameters()), before)
    for unfrozen in tuned.tuning().unfrozen.values():
        if "key.bias" not in unfrozen.name:
            assert not torch.equal(unfrozen.parameter, start[unfrozen.name]), unfrozen.name
        assert unfrozen.name.endswith("bias") or unfrozen.name in tuned.anatomy.head_tensors


@pytest.mark.acid("bitfit", 4)
def test_the_key_s_bias_has_no_gradient_without_rotary():
    tuned = attach(tiny("bert").double(), "bitfit")
    tuned.model(**inputs(tuned.model)).loss.backward()
    sizes = {k: float(p.grad.abs().max()) for k, p in tuned.trained().items()}
    key = max(v for k, v in sizes.items() if "key.bias" in k)
    query = max(v for k, v in sizes.items() if "query.bias" in k)
    assert key < 1e-10 * query


def test_biases_do_not_decay_towards_zero():
    tuned = attach(tiny("bert"), "bitfit")
    (group,) = tuned.groups()
    assert group.weight_decay == 0.0
    assert set(group.names) == {n for n in tuned.trained() if not n.startswith("head/")}
