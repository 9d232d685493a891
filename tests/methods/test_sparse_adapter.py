"""SparseAdapter and Large-Sparse, and what modifiers need: their own tests, beside those that every method passes."""

import math
from dataclasses import replace

import pytest
import torch
from little import little_spec
from methods.checks import logits, train
from methods.sizes import anatomy_of
from tiny import inputs, tiny

from luthier import train as run
from luthier.core import CompositionError, ConfigError
from luthier.methods.parts.bottleneck import Bottleneck
from luthier.methods.parts.masks import top_k
from luthier.methods.unified.sparse_adapter import _matrices_of, flow
from luthier.surgery import METHODS, attach, gradients, load, matrices, method
from luthier.surgery.tuning_files import stored_tensors
from luthier.workflow import resume
from luthier.workflow.resume_proof import run_digests

FLOW = {"sequential_adapter.width": 12, "sequential_adapter.activation": "relu", "sparse_adapter.score": "synflow"}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}


def looks(model, *seeds):
    return [lambda seed=seed: model(**inputs(model, seed=seed)).loss for seed in seeds]


def prepared(words="sequential_adapter+sparse_adapter", seeds=(1, 2), **settings):
    tuned = attach(tiny("bert", **STILL), method(words, {"sequential_adapter.width": 12, **settings}))
    for part in tuned.tuning().method.parts():
        if part.looks_at_data:
            part.prepare(tuned, looks(tuned.model, *seeds))
    return tuned


def held(tuned):
    """Attached matrices, and their masks."""
    tuning = tuned.tuning()
    named = {f"{k}.{n}": p for k, m in tuning.modules_by_key().items() for n, p in m.named_parameters()}
    return [(named[n], mask) for n, mask in tuning.masks.items()]


@pytest.mark.acid("large_sparse", 1)
def test_counts_are_those_of_the_catalogue():
    dense = method("sequential_adapter+sparse_adapter", {"train_norms": False})
    assert dense.n_params(anatomy_of("roberta")) == 471_859 + 19_968
    large = method("large_sparse", {"train_norms": False})
    assert large.n_params(anatomy_of("roberta")) == 2_359_296 + 26_112
    half = method("sequential_adapter+sparse_adapter", {"train_norms": False, "sparsity": 0.5})
    assert half.n_params(anatomy_of("roberta")) == 2_359_296 // 2 + 19_968
    shapes = matrices(method("sequential_adapter", {}), anatomy_of("roberta"))
    assert sum(a * b for a, b in shapes) == 2_359_296


@pytest.mark.parametrize("words", ["lora", "mam", "phm_delta", "prefix_tuning", "parallel_adapter"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_matrices_of_other_methods_are_counted_without_a_model(words, name):
    tuned = attach(tiny(name), words)
    named = (p for m in tuned.tuning().modules_by_key().values() for p in m.parameters())
    wanted = sorted(tuple(p.shape) for p in named if p.dim() > 1)
    assert sorted(matrices(tuned.tuning().method, tuned.anatomy)) == wanted


@pytest.mark.acid("sparse_adapter", 1)
@pytest.mark.parametrize("score", ["snip", "magnitude", "random", "er"])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_exactly_as_many_are_kept_as_the_formula_says(score, scope):
    tuned = prepared(score=score, scope=scope, sparsity=0.8)
    pairs = held(tuned)
    sizes = [mask.numel() for _, mask in pairs]
    kept = math.floor(0.2 * sum(sizes) + 1e-6) if scope == "model" else sum(math.floor(0.2 * n + 1e-6) for n in sizes)
    assert sum(int(mask.sum()) for _, mask in pairs) == kept
    assert tuned.n_trained() == tuned.tuning().method.n_params(tuned.anatomy)
    assert all(not p[~mask].any() for p, mask in pairs)


@pytest.mark.acid("sparse_adapter", 1)
def test_equal_scores_keep_no_more():
    tuned = attach(tiny("bert"), method("sparse_adapter", {"score": "magnitude", "sparsity": 0.7}))
    with torch.no_grad():
        for parameter in tuned.trained().values():
            parameter.fill_(0.5)
    tuned.tuning().method.parts()[-1].prepare(tuned, [])
    assert tuned.n_trained() == tuned.tuning().method.n_params(tuned.anatomy)


@pytest.mark.acid("sparse_adapter", 2)
def test_what_is_masked_stays_zero_under_momentum_and_decay():
    tuned = prepared(sparsity=0.8)
    before = [p.detach().clone() for p, _ in held(tuned)]
    train(tuned, 5, decay=0.1)
    for (parameter, mask), start in zip(held(tuned), before, strict=True):
        assert not parameter[~mask].any()
        assert not mask.any() or not torch.equal(parameter, start)


@pytest.mark.acid("sparse_adapter", 3, 4)
def test_scores_are_gradient_times_weight_computed_apart_and_know_no_order_of_the_data():
    tuned = attach(tiny("bert", **STILL), method("sparse_adapter", {"width": 12, "sparsity": 0.6}))
    named = {n: p for n, p in tuned.trained().items() if p.dim() > 1 and not n.startswith("head/")}
    tuned.model.eval()
    both = [gradients(look, list(named.values())) for look in looks(tuned.model, 1, 2)]
    scores = torch.cat(
        [((a + b) / 2 * p.detach()).abs().flatten() for a, b, p in zip(*both, named.values(), strict=True)]
    )
    for seeds in ((1, 2), (2, 1)):
        masks = torch.cat([m.flatten() for _, m in held(prepared(seeds=seeds, sparsity=0.6))])
        assert scores[masks].min() >= 0.999 * scores[~masks].max()


@pytest.mark.acid("sparse_adapter", 9)
def test_a_file_holds_a_bit_for_what_is_masked_and_loads_to_the_same_bits(tmp_path):
    tuned = prepared(sparsity=0.8)
    train(tuned, 2)
    tensors = {n: t for n, t in stored_tensors(tuned.tuning()).items() if "|" in n}
    total = sum(mask.numel() for _, mask in held(tuned))
    kept = sum(int(mask.sum()) for _, mask in held(tuned))
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert size <= 4 * kept + total / 8 + len(tensors)
    tuned.save(tmp_path / "tuning")
    model = tiny("bert", **STILL)
    again = load(model, tmp_path / "tuning", trainable=True)
    assert torch.equal(logits(model), logits(tuned.model))
    assert again.n_trained() == tuned.n_trained()
    train(again, 2)
    assert all(not p[~mask].any() for p, mask in held(again))


def test_what_is_made_of_masked_numbers_is_stored_whole():
    tuned = prepared()
    key, module = next(iter(tuned.tuning().modules_by_key().items()))
    made = {n: t + 1 for n, t in module.state_dict().items()}
    module.stored = lambda: made
    found = stored_tensors(tuned.tuning())
    assert all(torch.equal(found[f"{key}.{n}"], t) for n, t in made.items())


def test_alone_it_stands_beside_the_method_of_its_paper():
    made = method("sparse_adapter", {"width": 7, "sparsity": 0.9})
    assert [p.name for p in made.parts()] == ["sequential_adapter", "sparse_adapter"]
    assert made.parts()[0].width == 7 and made.default_lr == made.parts()[0].default_lr
    assert not made.mergeable and method("lora+sparse_adapter", {}).mergeable
    assert [p.name for p in method("large_sparse", {}).parts()] == ["sequential_adapter", "sparse_adapter"]


def test_it_merges_where_the_other_does():
    tuned = attach(tiny("bert", **STILL), method("lora+sparse_adapter", {"score": "random"}))
    tuned.tuning().method.parts()[1].prepare(tuned, [])
    train(tuned, 3)
    expected = logits(tuned.model)
    torch.testing.assert_close(logits(tuned.merge()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("words", ["sparse_adapter", "mam+sparse_adapter"])
def test_a_stopped_run_goes_on_to_the_bit(words, tmp_path):
    settings = {"sparsity": 0.8} | ({"sparse_adapter.score": "random"} if "mam" in words else {})
    spec = little_spec(tmp_path, "lora")
    spec = replace(spec, method=words, settings=settings, steps=6)
    run(replace(spec, out=str(tmp_path / "whole")))
    for stop in (1, 4):
        run(replace(spec, out=str(tmp_path / f"at-{stop}")), stop_at=stop)
        resume(tmp_path / f"at-{stop}")
        assert run_digests(tmp_path / f"at-{stop}") == run_digests(tmp_path / "whole")


@pytest.mark.acid("sparse_adapter", 7)
def test_a_matrix_of_zeros_cannot_be_scored():
    for words, settings in (("lora+sparse_adapter", {}), ("sparse_adapter", {"init": "zero_up"})):
        tuned = attach(tiny("bert"), method(words, settings))
        with pytest.raises(ConfigError, match="one of two matrices starts at zero"):
            tuned.tuning().method.parts()[-1].prepare(tuned, looks(tuned.model, 1))


@pytest.mark.parametrize(("sparsity", "says"), [(0.0, "leave sparse_adapter out"), (1.0, "keeps nothing")])
def test_nothing_and_everything_are_refused(sparsity, says):
    with pytest.raises(ConfigError, match=says):
        method("sparse_adapter", {"sparsity": sparsity})


def test_beside_what_has_no_matrix_and_unprepared_it_refuses():
    with pytest.raises(CompositionError, match="attach no matrix"):
        method("bitfit+sparse_adapter", {}).n_params(anatomy_of("bert"))
    with pytest.raises(CompositionError, match="no gradient enters"):
        method("lst+sparse_adapter", {}).n_params(anatomy_of("bert"))
    with pytest.raises(CompositionError, match="breaks the density"):
        method("adamix+sparse_adapter", {})
    for words in ("p_tuning+sparse_adapter", "hiwi+sparse_adapter"):
        with pytest.raises(CompositionError, match="a network makes the numbers of"):
            method(words, {})
    with pytest.raises(ConfigError, match="nothing was masked"):
        train(attach(tiny("bert"), "sparse_adapter"), 1)


def learnt(score, seed):
    """The loss after ten steps where the stream's first six numbers say nearly everything."""
    model = tiny("bert", **STILL)
    given = {"sequential_adapter.width": 12, "sequential_adapter.train_norms": False, "sparse_adapter.score": score}
    tuned = attach(model, method("sequential_adapter+sparse_adapter", given), seed=seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "LayerNorm" in name:
                p[6:] *= 0.02
    rows = [inputs(model, seed=n) for n in (1, 2)]
    torch.manual_seed(seed)
    for part in tuned.tuning().method.parts():
        if part.looks_at_data:
            part.prepare(tuned, [lambda batch=batch: model(**batch).loss for batch in rows])
    own = [p for n, p in tuned.trained().items() if not n.startswith("head/")]
    descent = torch.optim.Adam(own, lr=5e-3)
    for _ in range(10):
        loss = sum(model(**batch).loss for batch in rows)
        descent.zero_grad()
        loss.backward()
        tuned.state.mask_gradients()
        descent.step()
        tuned.state.constrain()
    return float(loss.detach())


@pytest.mark.acid("sparse_adapter", 5)
def test_where_few_inputs_matter_snip_keeps_better_entries_than_chance():
    snip, chance = ([learnt(score, seed) for seed in range(5)] for score in ("snip", "random"))
    assert sum(snip) / 5 < sum(chance) / 5 - 0.01


@pytest.mark.acid("sparse_adapter", 6)
def test_what_flows_into_a_bottleneck_flows_out_of_it_in_every_round():
    tuned = attach(tiny("bert"), method("sequential_adapter+sparse_adapter", FLOW))
    tuning = tuned.tuning()
    named = _matrices_of(tuning)
    before = [p.detach().clone() for p in named.values()]
    masks = [torch.ones_like(p, dtype=torch.bool) for p in named.values()]
    for share in (0.8, 0.5, 0.2):
        scores = dict(zip(named, flow(tuned, tuning, list(named.values()), masks), strict=True))
        for down in (n for n in named if n.endswith("down.weight")):
            up = down.replace("down", "up")
            torch.testing.assert_close(scores[down].sum(), scores[up].sum(), rtol=1e-5, atol=0)
        masks = top_k(list(scores.values()), int(share * sum(s.numel() for s in scores.values())))
    assert all(torch.equal(p, b) for p, b in zip(named.values(), before, strict=True)), "it leaves no trace"


def test_synflow_needs_no_data_and_keeps_its_share():
    tuned = attach(tiny("bert"), method("sequential_adapter+sparse_adapter", FLOW))
    tuned.tuning().method.parts()[-1].prepare(tuned, [])
    pairs = held(tuned)
    assert sum(int(m.sum()) for _, m in pairs) == math.floor(0.2 * sum(m.numel() for _, m in pairs) + 1e-6)
    assert all(m.any() for _, m in pairs), "no matrix is emptied"


@pytest.mark.parametrize("beside", ["adalora", "prefix_tuning"])
def test_masks_of_tensors_that_are_gone_after_the_end_count_no_more(beside):
    settings = {f"{beside}.{n}": v for n, v in METHODS.get(beside).tiny.items() if n != "lr"}
    settings["sparse_adapter.score"] = "random"
    tuned = attach(tiny("bert"), method(f"{beside}+sparse_adapter", settings), train_head=False)
    tuned.tuning().method.parts()[-1].prepare(tuned, looks(tuned.model, 1))
    tuned.finish()
    left = {f"{k}.{n}": p for k, m in tuned.tuning().modules_by_key().items() for n, p in m.named_parameters()}
    masked = sum(int((~mask).sum()) for name, mask in tuned.tuning().masks.items() if name in left)
    assert tuned.n_trained() == sum(p.numel() for p in left.values() if p.requires_grad) - masked


@pytest.mark.acid("sparse_adapter", 8)
@pytest.mark.parametrize("words", ["sequential_adapter", "parallel_adapter"])
def test_compacted_it_computes_the_same_with_narrower_layers(words, tmp_path):
    tuned = _beside(words)
    tuning = tuned.tuning()
    bottlenecks = [(k, m) for k, m in tuning.modules_by_key().items() if isinstance(m, Bottleneck)]
    with torch.no_grad():
        for number, (key, module) in enumerate(bottlenecks):
            tuning.masks[f"{key}.down.weight"][number % 3] = False  # reads nothing, and gives what its bias says
            tuning.masks[f"{key}.up.weight"][:, 4 + number % 2] = False  # nothing is read of it
            if number == 1:
                tuning.masks[f"{key}.down.weight"][:] = False  # one unit is left, as no layer has no width
            for parameter in (module.down.bias, module.up.bias):
                parameter.uniform_(-1, 1)
    tuned.state.constrain()
    wide = logits(tuned.model)
    tuned.finish()
    widths = [m.down.out_features for _, m in bottlenecks]
    assert max(widths) <= 10 and all(m.up.weight.shape[1] == m.down.out_features for _, m in bottlenecks)
    torch.testing.assert_close(logits(tuned.model), wide, rtol=1e-5, atol=1e-5)
    tuned.save(tmp_path / "tuning")
    again = load(tiny("bert", **STILL), tmp_path / "tuning")
    assert torch.equal(logits(again.model), logits(tuned.model))
    assert [m.down.out_features for m in again.modules(Bottleneck).values()] == widths


def _beside(words):
    made = method(f"{words}+sparse_adapter", {f"{words}.width": 12, "sparse_adapter.compact": True, "score": "random"})
    tuned = attach(tiny("bert", **STILL), made)
    for part in tuned.tuning().method.parts():
        if part.looks_at_data:
            part.prepare(tuned, looks(tuned.model, 1))
    return tuned
