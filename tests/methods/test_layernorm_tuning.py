"""LayerNorm tuning: its own tests, beside those that every method passes."""

import pytest
import torch
from methods.checks import frozen_copy, same, train
from methods.sizes import trained
from tiny import tiny

from luthier.surgery import attach


@pytest.mark.acid("layernorm_tuning", 1)
def test_counts_are_those_of_the_catalogue():
    assert trained("bert", "layernorm_tuning", outside=False) == 36_864
    assert trained("bert", "layernorm_tuning") == 38_400
    assert trained("bert-large", "layernorm_tuning", outside=False) == 98_304
    tuned = attach(tiny("llama"), "layernorm_tuning")
    assert tuned.n_trained() == 2 * 48 * 3 + 48


@pytest.mark.acid("layernorm_tuning", 2, 4)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "qwen3", "modernbert"])
def test_every_norm_of_every_family_trains_the_last_one_and_those_of_queries_and_keys_among_them(name):
    model = tiny(name)
    kinds = ("LayerNorm", "RMSNorm")
    norms = {n for n, m in model.named_modules() if type(m).__name__.endswith(kinds)}
    wanted = {n for n, p in model.named_parameters() if n.rpartition(".")[0] in norms}
    tuned = attach(model, "layernorm_tuning")
    assert {n.partition("/")[2] for n in tuned.trained()} >= wanted > set()


@pytest.mark.acid("layernorm_tuning", 3)
@pytest.mark.parametrize("name", ["bert", "gpt2"])  # a norm behind the sublayer, a norm before it
def test_only_norms_change_and_no_decay_pulls_at_them(name):
    tuned = attach(tiny(name, "classification"), "layernorm_tuning")
    before = frozen_copy(tuned)
    start = {n: p.detach().clone() for n, p in tuned.trained().items()}
    train(tuned, 3)
    assert same(dict(tuned.model.named_parameters()), before)
    assert all(not torch.equal(p, start[n]) for n, p in tuned.trained().items() if n.startswith("model/"))
    (group,) = tuned.groups()
    assert group.weight_decay == 0.0 and set(group.names) == {n for n in tuned.trained() if n.startswith("model/")}
