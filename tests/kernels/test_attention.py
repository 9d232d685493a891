import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from luthier.core import ConfigError
from luthier.kernels import attend, attention, attention_interface, attention_products, keep_mask, plain

B, H, K, T, D, DV = 2, 6, 3, 10, 4, 5
SCALE = 0.3


def _r(*shape: int, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) * 7 + len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad)


def _definition(
    q: Tensor, k: Tensor, v: Tensor, look: Tensor | None, added: Tensor | None = None, cap: float | None = None
) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    w = torch.einsum("bhtd,bhsd->bhts", q, k) * SCALE
    w = w if cap is None else cap * torch.tanh(w / cap)
    w = w if added is None else w + added
    if look is not None:
        look = look.expand(w.shape)
        e = torch.where(look, (w - w.amax(-1, keepdim=True).detach()).exp(), 0.0)
        p = e / e.sum(-1, keepdim=True).clamp_min(1e-300)
    else:
        p = torch.softmax(w, -1)
    return p @ v


@pytest.fixture(params=["products", "blocks", "recomputed", "sdpa", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every way of computing, forced."""
    kind = request.param
    monkeypatch.setattr(attention, "way", lambda *a: "sdpa" if kind == "sdpa" else "products")
    if kind == "blocks":
        monkeypatch.setattr(attention_products, "BLOCK_BYTES", 700)
    if kind == "recomputed":
        monkeypatch.setattr(attention_products, "KEEP_BYTES", 0)
        monkeypatch.setattr(attention_products, "BLOCK_BYTES", 5000)
    if kind == "plain":
        with plain():
            yield kind
    else:
        yield kind


def _padding(s: int) -> Tensor:
    look = torch.ones(B, 1, T, s, dtype=torch.bool)
    look[0, ..., -3:] = False
    return look


@pytest.mark.parametrize("heads", [K, H])
@pytest.mark.parametrize(
    "case", ["open", "padded", "causal", "causal padded", "added", "per head", "cross", "dead row"]
)
def test_every_way_equals_the_definition(path: str, case: str, heads: int) -> None:
    s = 7 if case == "cross" else 40 if path == "blocks" and case == "causal" else T
    t = s if case == "causal" else T
    q, k, v = _r(B, H, t, D), _r(B, heads, s, D), _r(B, heads, s, DV)
    causal = case.startswith("causal")
    mask: Tensor | None = None
    look = torch.ones(t, s, dtype=torch.bool).tril() if causal else None
    added = None
    if case in ("padded", "causal padded"):
        mask = _padding(s)
        look = mask if look is None else mask & look
    if case == "dead row":
        mask = _padding(s)
        mask[1, :, 2] = False
        look = mask
    if case in ("added", "per head"):
        mask = added = _r(B if case == "added" else 1, 1 if case == "added" else H, T, s, grad=False)
    got = attend(q, k, v, mask, scaling=SCALE, causal=causal)
    want = _definition(q, k, v, look, added)
    torch.testing.assert_close(got, want)
    g = _r(*want.shape, grad=False)
    for ours, theirs in zip(
        torch.autograd.grad(got, (q, k, v), g), torch.autograd.grad(want, (q, k, v), g), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_gradients_are_those_of_finite_differences(path: str) -> None:
    q, k, v = _r(1, 2, 3, 2), _r(1, 1, 3, 2), _r(1, 1, 3, 2)
    assert torch.autograd.gradcheck(lambda *a: attend(*a, scaling=SCALE, causal=True), (q, k, v))


def test_long_causal_attention_is_cut_and_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "way", lambda *a: "products")
    q, k, v = _r(1, 2, 600, 2), _r(1, 1, 600, 2), _r(1, 1, 600, 3)
    got = attend(q, k, v, scaling=SCALE, causal=True)
    want = _definition(q, k, v, torch.ones(600, 600, dtype=torch.bool).tril())
    torch.testing.assert_close(got, want)
    for ours, theirs in zip(
        torch.autograd.grad(got.sum(), (q, k, v)), torch.autograd.grad(want.sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_softcap_is_applied_before_the_mask(path: str) -> None:
    q, k, v = _r(B, H, T, D), _r(B, K, T, D), _r(B, K, T, DV)
    got = attend(q, k, v, _padding(T), scaling=SCALE, softcap=0.8)
    want = _definition(q, k, v, _padding(T), cap=0.8)
    torch.testing.assert_close(got, want)
    for ours, theirs in zip(
        torch.autograd.grad(got.sum(), (q, k, v)), torch.autograd.grad(want.sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [K, H])
def test_dropped_probabilities_are_those_of_the_key_in_every_way(path: str, causal: bool, heads: int) -> None:
    q, k, v = _r(B, H, T, D), _r(B, heads, T, D), _r(B, heads, T, DV)
    kept = keep_mask((B, H, T, T), 0.4, seed=21).double() * (32768 / (32768 - round(0.4 * 32768)))
    keys, values = (x.repeat_interleave(H // heads, 1) for x in (k, v))
    w = q @ keys.transpose(2, 3) * SCALE
    if causal:
        w = w.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -math.inf)
    want = (torch.softmax(w, -1) * kept) @ values
    got = attend(q, k, v, scaling=SCALE, causal=causal, dropout=0.4, key_seed=21)
    torch.testing.assert_close(got, want)
    for ours, theirs in zip(
        torch.autograd.grad(got.sum(), (q, k, v)), torch.autograd.grad(want.sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("case", ["open", "causal", "padded"])
def test_a_prefix_is_open_to_every_query_and_learns(path: str, case: str) -> None:
    q, k, v, pk, pv = _r(B, H, T, D), _r(B, K, T, D), _r(B, K, T, DV), _r(1, K, 3, D), _r(1, K, 3, DV)
    look = torch.ones(B, 1, T, T, dtype=torch.bool)
    look = look.tril() if case == "causal" else _padding(T) if case == "padded" else look
    mask = _padding(T) if case == "padded" else None
    got = attend(q, k, v, mask, scaling=SCALE, causal=case == "causal", prefix_k=pk, prefix_v=pv)
    keys, values = (torch.cat([p.expand(B, -1, -1, -1), x], 2) for p, x in ((pk, k), (pv, v)))
    want = _definition(q, keys, values, torch.cat([torch.ones(B, 1, T, 3, dtype=torch.bool), look], -1))
    torch.testing.assert_close(got, want)
    leaves = (q, k, v, pk, pv)
    for ours, theirs in zip(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_learned_bias_gets_its_gradient(path: str) -> None:
    q, k, v, bias = _r(B, H, T, D), _r(B, H, T, D), _r(B, H, T, DV), _r(1, H, T, T)
    got = torch.autograd.grad(attend(q, k, v, bias, scaling=SCALE).sum(), bias)
    want = torch.autograd.grad(_definition(q, k, v, None, bias).sum(), bias)
    torch.testing.assert_close(got, want)


def test_only_the_wanted_gradients_are_made(path: str) -> None:
    q, k, v = _r(B, H, T, D), _r(B, K, T, D, grad=False), _r(B, K, T, DV)
    got = torch.autograd.grad(attend(q, k, v, scaling=SCALE).sum(), (q, v))
    want = torch.autograd.grad(_definition(q, k, v, None).sum(), (q, v))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_same_inputs_give_the_same_bits() -> None:
    q, k, v = (x.bfloat16() for x in (_r(B, H, 64, D), _r(B, K, 64, D), _r(B, K, 64, DV)))
    first = torch.autograd.grad(attend(q, k, v, scaling=SCALE, causal=True).sum(), (q, k, v))
    again = torch.autograd.grad(attend(q, k, v, scaling=SCALE, causal=True).sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_bf16_stays_near_the_exact_result_in_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = _r(B, H, 64, D), _r(B, K, 64, D), _r(B, K, 64, DV)
    want = _definition(q, k, v, None)
    exact = torch.autograd.grad(want.sum(), (q, k, v))
    for choice in ("products", "sdpa"):
        monkeypatch.setattr(attention, "way", lambda *a, choice=choice: choice)
        low = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
        out = attend(*low, scaling=SCALE)
        assert (out - want).norm() < 0.02 * want.norm()
        for got, true in zip(torch.autograd.grad(out.sum(), low), exact, strict=True):
            assert (got - true).norm() < 0.03 * true.norm() + 0.02


@pytest.mark.parametrize("keys", [1, 5, 14, 31])
@pytest.mark.parametrize("masked", [False, True])
def test_short_rows_in_bf16_are_as_near_the_exact_result_as_long_ones(keys: int, masked: bool) -> None:
    q, k, v = _r(2, 4, keys, 8), _r(2, 4, keys, 8), _r(2, 4, keys, 8)
    mask = torch.ones(2, 1, keys, keys, dtype=torch.bool)
    if masked:
        mask[1, :, :, keys // 2 + 1 :] = False
        mask[0, :, 0] = False  # a query that may look at nothing
    low = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    exact = _definition(q, k, v, mask)
    out = attend(*low, mask, scaling=SCALE)
    g = _r(*exact.shape, grad=False)
    assert (out - exact).norm() < 0.02 * exact.norm()
    wanted = torch.autograd.grad(exact, (q, k, v), g)
    for got, want in zip(torch.autograd.grad(out, low, g.bfloat16()), wanted, strict=True):
        assert torch.isfinite(got).all()
        assert (got - want).norm() < 0.03 * want.norm() + 0.02


def test_probabilities_beyond_the_budget_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "way", lambda *a: "products")
    q, k, v = _r(1, 2, 64, D), _r(1, 2, 64, D), _r(1, 2, 64, D)
    for budget, largest in ((1 << 20, 2 * 64 * 64), (0, 2 * 64 * D)):
        monkeypatch.setattr(attention_products, "KEEP_BYTES", budget)
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.numel()) or t, lambda t: t):
            attend(q, k, v, scaling=SCALE)
        assert max(saved) == largest


def test_what_was_not_measured_goes_to_the_framework() -> None:
    assert attention.way("cuda", torch.bfloat16, 512, 512, True) == "sdpa"
    assert attention.way("cpu", torch.float64, 8, 8, True) == "sdpa"


def test_the_table_says_for_each_row_which_was_faster() -> None:
    text = (Path(attention.__file__).parent / "attention_table.json").read_text(encoding="utf-8")
    table = json.loads(text)
    assert table["command"].startswith("python benchmarks/kernels_attention.py")
    for row in table["rows"]:
        assert row["best"] == ("products" if row["sdpa_over_products"] >= 1 else "sdpa")
        assert attention.way(row["device"], getattr(torch, row["dtype"]), row["queries"], row["keys"], row["training"])


def test_a_forgotten_seed_or_half_a_prefix_is_refused() -> None:
    q = _r(1, 1, 2, 2)
    with pytest.raises(ConfigError, match="key_seed"):
        attend(q, q, q, scaling=1.0, dropout=0.1)
    with pytest.raises(ConfigError, match="together"):
        attend(q, q, q, scaling=1.0, prefix_k=q)


# --- the framework's interface ---------------------------------------------------------------------------------------


@pytest.fixture
def registered() -> Any:
    """Our attention under a name of its own, beside the framework's mask function."""
    ALL_ATTENTION_FUNCTIONS.register("luthier_under_test", attention_interface)
    ALL_MASK_ATTENTION_FUNCTIONS.register("luthier_under_test", sdpa_mask)
    yield "luthier_under_test"
    del ALL_ATTENTION_FUNCTIONS._global_mapping["luthier_under_test"]
    del ALL_MASK_ATTENTION_FUNCTIONS._global_mapping["luthier_under_test"]


SMALL = {"vocab_size": 31, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2}
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(
        **SMALL, num_attention_heads=4, num_key_value_heads=2, sliding_window=3
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        **SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=3, attn_logit_softcapping=0.5
    ),
    "bert": lambda: transformers.BertConfig(**SMALL, num_attention_heads=4),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=31, n_embd=24, n_layer=2, n_head=4, n_inner=36),
    "t5": lambda: transformers.T5Config(vocab_size=31, d_model=24, d_kv=6, d_ff=36, num_layers=2, num_heads=4),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("forced", ["products", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_models_give_what_their_eager_attention_gives(
    name: str, forced: str, side: str, registered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "way", lambda *a: forced)
    torch.manual_seed(0)
    config = MODELS[name]()
    make = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModel
    model = make.from_config(config, attn_implementation="eager").eval()
    ids = torch.randint(3, 31, (2, 9))
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :4] = 0
    if side == "right":
        mask[0, -4:] = 0
    extra = {"decoder_input_ids": ids[:, :5]} if name == "t5" else {}
    want = model(input_ids=ids, attention_mask=mask, **extra)[0]
    model.set_attn_implementation(registered)
    got = model(input_ids=ids, attention_mask=mask, **extra)[0]
    seen = torch.ones(2, 5, dtype=torch.bool) if name == "t5" else mask.bool()
    torch.testing.assert_close(got[seen], want[seen], rtol=1e-4, atol=1e-5)
    ours = torch.autograd.grad(got[seen].sum(), list(model.parameters()), allow_unused=True)
    model.set_attn_implementation("eager")
    theirs = torch.autograd.grad(want[seen].sum(), list(model.parameters()), allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("forced", ["products", "sdpa"])
def test_generation_with_a_cache_gives_the_eager_tokens(
    forced: str, registered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "way", lambda *a: forced)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS["llama"](), attn_implementation="eager").eval()
    ids = torch.randint(3, 31, (2, 5))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    want = model.generate(input_ids=ids, attention_mask=mask, **options)
    model.set_attn_implementation(registered)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **options), want)


class _Module(nn.Module):
    is_causal = False


def test_an_unknown_keyword_is_refused_and_not_ignored() -> None:
    q = _r(1, 1, 2, 2)
    with pytest.raises(ConfigError, match="alibi"):
        attention_interface(_Module(), q, q, q, None, alibi=torch.ones(1))
    attention_interface(_Module(), q, q, q, None, alibi=None, position_ids=torch.arange(2))


def test_a_sink_takes_its_share_of_the_probability() -> None:
    q, sink = _r(1, 2, 3, 4), torch.tensor([0.5, -1.0], dtype=torch.float64)
    out, _ = attention_interface(_Module(), q, q, q, None, scaling=SCALE, s_aux=sink)
    e = (q @ q.transpose(2, 3) * SCALE).exp()
    want = (e / (e.sum(-1, keepdim=True) + sink.exp().view(1, 2, 1, 1))) @ q
    torch.testing.assert_close(out, want.transpose(1, 2))


def test_probabilities_are_given_when_asked_for() -> None:
    q = _r(1, 2, 3, 4)
    out, p = attention_interface(_Module(), q, q, q, None, scaling=SCALE, output_attentions=True)
    assert p is not None
    torch.testing.assert_close(p.sum(-1), torch.ones(1, 2, 3, dtype=torch.float64))
    torch.testing.assert_close((p @ q).transpose(1, 2), out)


def test_a_module_that_does_not_say_is_causal_and_one_query_sees_all_keys() -> None:
    q, k = _r(1, 1, 4, 2), _r(1, 1, 6, 2)
    causal, _ = attention_interface(nn.Module(), q, k, k, None, scaling=SCALE)
    look = torch.ones(4, 4, dtype=torch.bool).tril()
    torch.testing.assert_close(causal, _definition(q, k[:, :, :4], k[:, :, :4], look).transpose(1, 2))
    one, _ = attention_interface(nn.Module(), q[:, :, :1], k, k, None, scaling=SCALE)
    torch.testing.assert_close(one, _definition(q[:, :, :1], k, k, None).transpose(1, 2))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_one_query_without_a_gradient_has_the_bits_of_the_usual_way(softcap: float | None) -> None:
    q, k = _r(2, 4, 1, 8).detach().float(), _r(2, 2, 9, 8).detach().float()
    options = {} if softcap is None else {"softcap": softcap}
    with torch.no_grad():
        want = attend(q, k, k, scaling=SCALE, softcap=softcap).transpose(1, 2)
        found, _ = attention_interface(_Module(), q, k, k, None, scaling=SCALE, **options)
    assert torch.equal(found, want) and found.is_contiguous()


def test_the_modules_seed_or_else_the_ambient_generator_decides_what_is_dropped() -> None:
    q, module = _r(1, 2, 8, 4), _Module()
    module.attention_seed = 5
    a, _ = attention_interface(module, q, q, q, None, dropout=0.5, scaling=SCALE)
    torch.testing.assert_close(
        a.transpose(1, 2), attend(q, q, q, scaling=SCALE, dropout=0.5, key_seed=5), rtol=0, atol=0
    )
    module.attention_seed = None
    torch.manual_seed(1)
    b, _ = attention_interface(module, q, q, q, None, dropout=0.5, scaling=SCALE)
    torch.manual_seed(1)
    c, _ = attention_interface(module, q, q, q, None, dropout=0.5, scaling=SCALE)
    assert torch.equal(b, c) and not torch.equal(a, b)


def test_a_mask_that_was_changed_in_place_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "way", lambda *a: "products")
    q, mask = _r(1, 2, 4, 3), torch.ones(1, 1, 4, 4, dtype=torch.bool)
    attend(q, q, q, mask, scaling=SCALE)
    mask[..., 2:] = False
    torch.testing.assert_close(attend(q, q, q, mask, scaling=SCALE), _definition(q, q, q, mask))


def test_inference_mode_leaves_nothing_behind_that_training_trips_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "way", lambda *a: "products")
    monkeypatch.setattr(attention, "FEW_SCORES", 0)
    q, mask = _r(1, 2, 4, 3), torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    with torch.inference_mode():
        quiet = attend(q, q, q, mask, scaling=SCALE)
        attend(q, q, q, mask.clone(), scaling=SCALE)
    loud = attend(q, q, q, mask, scaling=SCALE)
    torch.autograd.grad(loud.sum(), q)
    assert torch.equal(quiet, loud)


def test_no_query_is_answered_with_no_row_as_by_the_formula() -> None:
    q, k, v = _r(B, H, 0, D), _r(B, K, 5, D), _r(B, K, 5, DV)
    with plain():
        expected = attend(q, k, v, scaling=SCALE)
    assert attend(q, k, v, scaling=SCALE).shape == expected.shape == (B, H, 0, DV)
