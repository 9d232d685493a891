"""Ladder side-tuning: what it computes and where it starts, against formulas written out here."""

import math

import pytest
import torch
import torch.nn.functional as F
from methods.checks import stir
from tiny import inputs, tiny

from luthier.methods.additive.lst import Sides
from luthier.surgery import attach

STILL = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0},
    "llama": {"attention_dropout": 0.0},
    "t5": {"dropout_rate": 0.0},
}


def attached(name, **settings):
    """A model in float64 whose only dropout is the side's own; every number of the side moved off its start."""
    tuned = attach(tiny(name, **STILL[name]), "lst", reduction=3, train_head=False, **settings)
    tuned.model.double()
    stir(tuned, 0.1)
    (sides,) = tuned.modules(Sides).values()
    with torch.no_grad():
        for ladder in sides.ladders.values():
            ladder.alpha.copy_(torch.linspace(-0.3, 0.2, len(ladder.alpha)))
    return tuned, sides


def blocks_of(model, name):
    if name == "bert":
        return list(model.bert.encoder.layer)
    return list(model.model.layers)


def hidden_states(tuned, name, batch):
    """What the frozen model's first block reads, and what each block gives."""
    seen = []
    with tuned.base_only(), torch.no_grad():
        blocks = blocks_of(tuned.model, name)

        def first(block, args, kwargs):
            seen.append(args[0] if args else kwargs["hidden_states"])

        handles = [blocks[0].register_forward_pre_hook(first, with_kwargs=True)]

        def behind(block, args, out):
            seen.append(out[0] if isinstance(out, tuple) else out)

        handles += [block.register_forward_hook(behind) for block in blocks]
        tuned.model(**batch)
        for handle in handles:
            handle.remove()
    assert len(seen) == len(blocks) + 1
    return seen


def reference(tuned, sides, name, batch, kept, temperature, dropout=None):
    """g_0 = D_0(E(x)); g <- Block_i(mu_i g + (1 - mu_i) D_i(h_i)); U(drop(norm(g))), and the model's own head."""
    states = hidden_states(tuned, name, batch)
    ladder, model = sides.ladders["self"], tuned.model
    linear = lambda x, layer: x @ layer.weight.T + layer.bias
    g = linear(states[0], ladder.entry)
    real = batch["attention_mask"].bool()
    length = real.shape[1]
    seen = real[:, None, None, :].expand(-1, 1, length, -1)
    more = {}
    if name == "llama":
        seen = seen & torch.ones(length, length).tril().bool()
        positions = torch.arange(length)[None]
        more["position_embeddings"] = ladder.rotary(g, positions)
    mask = torch.zeros(seen.shape, dtype=g.dtype).masked_fill(~seen, -1e30)
    for number, layer in enumerate(kept):
        mu = 1 / (1 + math.exp(-float(ladder.alpha[number]) / temperature))
        mixed = mu * g + (1 - mu) * linear(states[layer + 1], ladder.steps[number])
        g = ladder.blocks[number](mixed, attention_mask=mask, **more)
        g = g[0] if isinstance(g, tuple) else g
    if name == "bert":
        g = F.layer_norm(g, g.shape[-1:], ladder.norm.weight, ladder.norm.bias, ladder.norm.eps)
    else:
        g = g * (g.square().mean(-1, keepdim=True) + ladder.norm.variance_epsilon).rsqrt() * ladder.norm.weight
    if dropout is not None:
        g = F.dropout(g, dropout, training=True)
    last = linear(g, ladder.up)
    if name == "bert":
        pooled = torch.tanh(linear(last[:, 0], model.bert.pooler.dense))
        return linear(pooled, model.classifier)
    return last @ model.lm_head.weight.T


@pytest.mark.parametrize("temperature", [0.1, 0.7])
@pytest.mark.parametrize("layers", [(), (0, 2), (1,)])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_it_computes_the_formula(name, layers, temperature):
    tuned, sides = attached(name, layers=layers, temperature=temperature)
    batch = {k: v for k, v in inputs(tuned.model).items() if k != "labels"}
    kept = layers or (0, 1, 2)
    with torch.no_grad():
        found = tuned.model(**batch).logits
        expected = reference(tuned, sides, name, batch, kept, temperature)
    real = batch["attention_mask"].bool() if name == "llama" else ...
    torch.testing.assert_close(found[real], expected[real], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_in_training_its_last_state_is_dropped_and_nothing_else(name):
    tuned, sides = attached(name, dropout=0.5)
    model = tuned.model
    batch = {k: v for k, v in inputs(model, padded=False).items() if k != "labels"}
    model.luthier.train()
    with torch.no_grad():
        torch.manual_seed(5)
        found = model(**batch).logits
        torch.manual_seed(5)
        expected = reference(tuned, sides, name, batch, (0, 1, 2), 0.1, dropout=0.5)
        whole = reference(tuned, sides, name, batch, (0, 1, 2), 0.1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert (found - whole).abs().max() > 1e-2


def test_the_side_decoder_reads_the_side_encoder_through_its_own_cross_attention():
    """T5, up to what its blocks compute: the ladders of both stacks, and what crosses between them."""
    tuned, sides = attached("t5")
    model = tuned.model
    batch = inputs(model, padded=False)
    calls = {}
    for stack, ladder in sides.ladders.items():
        for number, block in enumerate(ladder.blocks):

            def keep(module, args, kwargs, out, place=(stack, number)):
                calls[place] = (args[0], kwargs, out[0] if isinstance(out, tuple) else out)

            block.register_forward_hook(keep, with_kwargs=True)
    frozen = {}
    for stack in ("encoder", "decoder"):
        for number, block in enumerate(getattr(model, stack).block):

            def note(module, args, kwargs, out, place=(stack, number)):
                frozen[place] = (args[0], out[0] if isinstance(out, tuple) else out)

            block.register_forward_hook(note, with_kwargs=True)
    model(**batch)
    rms = lambda x, norm: x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt() * norm.weight
    linear = lambda x, layer: x @ layer.weight.T + layer.bias
    for stack, ladder in sides.ladders.items():
        state = linear(frozen[stack, 0][0], ladder.entry)
        for number in range(len(ladder.blocks)):
            mu = torch.sigmoid(ladder.alpha[number] / 0.1)
            mixed = mu * state + (1 - mu) * linear(frozen[stack, number][1], ladder.steps[number])
            read, kwargs, state = calls[stack, number]
            torch.testing.assert_close(read, mixed, rtol=1e-6, atol=1e-6)
            if stack == "decoder":
                encoder = sides.ladders["encoder"]
                given = rms(calls["encoder", len(encoder.blocks) - 1][2], encoder.norm)
                torch.testing.assert_close(kwargs["encoder_hidden_states"], given, rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------------------------- where it starts


def top(score, n):
    return score.argsort(descending=True)[:n].sort().values


def expected_cut(scores, prefix="bert.encoder.layer"):
    """Kept coordinates of BERT's stream, of each block's inner width, and of its heads, by hand from scores."""
    stream = torch.zeros(48, dtype=torch.float64)
    inner, heads = [], []
    for i in range(3):
        of = lambda short, i=i: scores[f"{prefix}.{i}.{short}.weight"].double()
        q, k, v, o = (of(f"attention.{n}") for n in ("self.query", "self.key", "self.value", "output.dense"))
        up, down = of("intermediate.dense"), of("output.dense")
        stream += q.sum(0) + k.sum(0) + v.sum(0) + up.sum(0) + o.sum(1) + down.sum(1)
        inner.append(top(up.sum(1) * down.sum(0), 80 // 3))
        by_head = lambda total: total.view(4, 12).sum(0)
        heads.append((top(by_head(q.sum(1)) * by_head(k.sum(1)), 4), top(by_head(v.sum(1)) * by_head(o.sum(0)), 4)))
    return top(stream, 16), inner, heads


def check_cut(tuned, scores):
    (sides,) = tuned.modules(Sides).values()
    stream, inner, heads = expected_cut(scores)
    for block, frozen, kept, (qk, vo) in zip(
        sides.ladders["self"].blocks, tuned.model.bert.encoder.layer, inner, heads, strict=True
    ):
        in_heads = lambda one: (torch.arange(4)[:, None] * 12 + one[None]).flatten()
        assert torch.equal(block.output.LayerNorm.weight, frozen.output.LayerNorm.weight[stream])
        assert torch.equal(block.intermediate.dense.weight, frozen.intermediate.dense.weight[kept][:, stream])
        query, value = frozen.attention.self.query, frozen.attention.self.value
        assert torch.equal(block.attention.self.query.weight, query.weight[in_heads(qk)][:, stream])
        assert torch.equal(block.attention.self.value.weight, value.weight[in_heads(vo)][:, stream])


def test_by_size_the_largest_weights_stay():
    tuned = attach(tiny("bert"), "lst", reduction=3)
    check_cut(tuned, {n: p.detach() ** 2 for n, p in tiny("bert").named_parameters()})


def test_by_fisher_the_weights_with_the_largest_squared_gradients_stay():
    model = tiny("bert")
    batches = [inputs(model, batch=2, seed=seed) for seed in range(4)]
    scores = {}
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for n, p in model.named_parameters():
            if p.grad is not None:
                scores[n] = scores.get(n, 0.0) + p.grad**2
    fresh = tiny("bert")
    tuned = attach(fresh, "lst", reduction=3, importance="fisher")
    tuned.tuning().method.prepare(tuned, [lambda batch=batch: fresh(**batch).loss for batch in batches])
    check_cut(tuned, scores)
    by_size = expected_cut({n: p.detach() ** 2 for n, p in fresh.named_parameters() if ".layer." in n})
    assert not torch.equal(by_size[0], expected_cut(scores)[0]), "the two starts differ here"
