"""Every site is proven by what it does in a forward pass, on a tiny random model of every architecture we promise."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from luthier.anatomy import Anatomy, Attention, Site

torch.set_num_threads(1)

close = torch.testing.assert_close
linear = torch.nn.functional.linear


def named(*absent: str) -> list[Any]:
    """All tiny models but those named; the ones that only share a table are slow tests."""
    also = [pytest.param(n, marks=pytest.mark.slow) for n in tiny.ALSO if n not in absent]
    return [n for n in tiny.TINY if n not in absent] + also


EVERY = named()
WITH_INTERFACE = named("mpnet", "deberta-v2", "bloom", "openai-gpt")
EXPERTS_ONLY = ("mixtral", "olmoe", "qwen3-moe", "gpt-oss")
NOT_ROTARY = (
    "bert",
    "roberta",
    "distilbert",
    "albert",
    "electra",
    "gpt2",
    "opt",
    "t5",
    "t5-v1.1",
    "bart",
    "mbart",
    "vit",
)

# What each attention was handed: [(module, query, key, value), ...] of the last recorded forward pass.
_HANDED: list[tuple[nn.Module, Tensor, Tensor, Tensor]] = []


def _plain_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """Records what it was handed. What it returns need not be the model's own attention: only its inputs count."""
    _HANDED.append((module, query.clone(), key.clone(), value.clone()))
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register("luthier_probe", _plain_attention)
AttentionMaskInterface.register("luthier_probe", sdpa_mask)


def make(name: str, **changes: Any) -> tuple[nn.Module, Anatomy, dict[str, Tensor]]:
    model = tiny.tiny(name, **changes)
    return model, Anatomy.read(model), tiny.inputs(model, padded=False)


@contextmanager
def watching(model: nn.Module) -> Iterator[tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]]:
    """Record, for every module, the first positional input and the first output of each of its calls."""
    ins: dict[str, list[Tensor]] = defaultdict(list)
    outs: dict[str, list[Tensor]] = defaultdict(list)
    hooks = []
    for path, module in model.named_modules():

        def see(_: nn.Module, args: tuple[Any, ...], output: Any, path: str = path) -> None:
            if args and isinstance(args[0], Tensor):
                ins[path].append(args[0].detach().clone())
            first = output[0] if isinstance(output, tuple | list) else output
            if isinstance(first, Tensor):
                outs[path].append(first.detach().clone())

        hooks.append(module.register_forward_hook(see))
    try:
        yield ins, outs
    finally:
        for hook in hooks:
            hook.remove()


def probe(model: nn.Module) -> None:
    """Let every attention of the model go through the recording function; T5's stacks have their own settings."""
    for module in model.modules():
        if (config := getattr(module, "config", None)) is not None:
            config._attn_implementation = "luthier_probe"


def run(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    with torch.no_grad():
        return model(**batch)


def weight_of(model: nn.Module, site: Site) -> tuple[Tensor, Tensor | None]:
    """(d_out, d_in) and (d_out,), as the site claims them."""
    module = model.get_submodule(site.path)
    weight = getattr(module, site.param)
    weight = weight if site.expert is None else weight[site.expert]
    weight = weight.T if site.transposed else weight
    bias = getattr(module, site.bias) if site.bias else None
    if site.rows is not None:
        rows = torch.tensor(site.rows.indices())
        weight, bias = weight[rows], bias if bias is None else bias[rows]
    return weight, bias


@contextmanager
def moved(model: nn.Module, site: Site, delta: Tensor) -> Iterator[None]:
    """Add `delta` (d_out, d_in) to the site's share of the weight, for a while."""
    module = model.get_submodule(site.path)
    weight = getattr(module, site.param)
    before = weight.detach().clone()
    with torch.no_grad():
        view = weight if site.expert is None else weight[site.expert]
        view = view.T if site.transposed else view
        rows = torch.tensor(site.rows.indices()) if site.rows else torch.arange(site.d_out)
        view[rows] += delta
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


def a_delta(site: Site, scale: float = 0.3) -> Tensor:
    return scale * torch.randn(site.d_out, site.d_in, generator=torch.Generator().manual_seed(7))


def sites_of(anatomy: Anatomy, attention: Attention) -> dict[str, Site]:
    prefix = "cross" if attention.cross else "attn"
    return {
        letter: anatomy.sites(f"{prefix}.{letter}", layers=[attention.layer], stack=attention.stack)[0]
        for letter in "qkvo"
    }


# -- projections -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_the_rows_of_a_projection_are_its_weight_times_the_input(name: str) -> None:
    model, anatomy, batch = make(name)
    with watching(model) as (ins, outs):
        run(model, batch)
    checked = 0
    for site in anatomy.all_sites:
        if site.n_experts or not site.kind.startswith(("attn.", "cross.", "ffn.", "head")):
            continue
        weight, bias = weight_of(model, site)
        assert weight.shape == (site.d_out, site.d_in)
        rows = list(site.rows.indices()) if site.rows else slice(None)
        for x, y in zip(ins[site.path], outs[site.path], strict=True):
            close(y[..., rows], linear(x, weight, bias), rtol=1e-4, atol=1e-5)
            checked += 1
    assert checked >= 4 * anatomy.n_layers


@pytest.mark.parametrize("name", WITH_INTERFACE)
def test_query_key_and_value_rows_reach_attention_as_such_and_as_nothing_else(name: str) -> None:
    model, anatomy, batch = make(name)
    probe(model)

    def handed(attention: Attention) -> dict[str, Tensor]:
        _HANDED.clear()
        run(model, batch)
        module = model.get_submodule(attention.path)
        return next({"q": q, "k": k, "v": v} for m, q, k, v in _HANDED if m is module)

    for attention in anatomy.attentions:
        assert attention.interface
        base = handed(attention)
        own = sites_of(anatomy, attention)
        assert base["q"].shape[1] == attention.n_heads and base["q"].shape[3] == attention.d_head
        assert base["k"].shape[1] == base["v"].shape[1] == attention.n_kv_heads
        for letter in "qkv":
            with moved(model, own[letter], a_delta(own[letter])):
                now = handed(attention)
            changed = {other for other in "qkv" if not torch.equal(base[other], now[other])}
            assert changed == {letter}, f"{own[letter].key} changed {changed}"


@pytest.mark.parametrize("name", WITH_INTERFACE)
def test_rows_keep_the_order_in_which_attention_reads_them(name: str) -> None:
    model, anatomy, batch = make(name)
    probe(model)
    _HANDED.clear()
    with watching(model) as (ins, _):
        run(model, batch)
    for attention in anatomy.attentions:
        module = model.get_submodule(attention.path)
        _, query, key, value = next(h for h in _HANDED if h[0] is module)
        own = sites_of(anatomy, attention)
        for letter, seen in (("q", query), ("k", key), ("v", value)):
            x = ins[own[letter].path][0]
            norm = getattr(module, f"{letter}_norm", nn.Identity())
            whole = norm(linear(x, *weight_of(model, own[letter]))) if name in ("olmo2", "olmoe") else None
            heads = linear(x, *weight_of(model, own[letter])).unflatten(-1, (-1, attention.d_head))
            heads = norm(heads) if whole is None else whole.unflatten(-1, (-1, attention.d_head))
            heads = heads.transpose(1, 2)
            if letter != "v" and name not in NOT_ROTARY:
                heads, seen = heads[:, :, :1], seen[:, :, :1]  # position 0 is turned by no angle
            if letter == "q":
                heads = heads * (module.scaling if name == "opt" else 1.0)  # OPT scales before it asks the interface
            close(heads, seen, rtol=1e-4, atol=1e-5)


def test_rotary_models_number_positions_from_zero() -> None:
    """The test above leans on it: at position 0 a rotation turns nothing."""
    model, _, _ = make("llama")
    cos, sin = model.get_submodule("model.rotary_emb")(torch.zeros(1, 7, 48), torch.arange(7)[None])
    assert torch.equal(cos[0, 0], torch.ones(12)) and torch.equal(sin[0, 0], torch.zeros(12))


@pytest.mark.parametrize("name", EVERY)
def test_context_is_linear_in_the_value_rows_and_in_no_other(name: str) -> None:
    model, anatomy, batch = make(name)
    for attention in anatomy.attentions[:1] + anatomy.attentions[-1:]:
        own = sites_of(anatomy, attention)

        def context(times: float, site: Site, reader: Site) -> Tensor:
            with moved(model, site, times * a_delta(site)), watching(model) as (ins, _):
                run(model, batch)
            return ins[reader.path][0]

        for letter in "qkv":
            zero, one, two = (context(t, own[letter], own["o"]) for t in (0.0, 1.0, 2.0))
            is_linear = torch.allclose(two - zero, 2 * (one - zero), rtol=1e-3, atol=1e-4)
            assert is_linear == (letter == "v"), f"{own[letter].key}: linear is {is_linear}"


@pytest.mark.parametrize(
    ("name", "changes"),
    [("mpnet", {}), ("bloom", {}), ("openai-gpt", {}), ("deberta-v2", {"relative_attention": False})],
)
def test_without_an_interface_a_shift_of_all_keys_is_what_leaves_attention_alone(
    name: str, changes: dict[str, Any]
) -> None:
    """Softmax forgets what is added to all scores of a query; a key bias adds just that, a query bias does not."""
    model, anatomy, batch = make(name, **changes)
    for attention in anatomy.attentions:
        assert not attention.interface
        own = sites_of(anatomy, attention)
        seen: dict[str, float] = {}
        with watching(model) as (ins, _):
            run(model, batch)
        base = ins[own["o"].path][0]
        for letter in "qk":
            site = own[letter]
            bias = model.get_submodule(site.path).bias
            rows = list(site.rows.indices()) if site.rows else slice(None)
            before = bias.detach().clone()
            with torch.no_grad():
                bias[rows] += torch.linspace(-1, 1, site.d_out)
            with watching(model) as (ins, _):
                run(model, batch)
            seen[letter] = float((ins[own["o"].path][0] - base).abs().max())
            with torch.no_grad():
                bias.copy_(before)
        assert seen["k"] < 1e-5 < 1e-3 < seen["q"]


@pytest.mark.parametrize("name", named(*EXPERTS_ONLY))
def test_up_gate_and_down_do_their_parts(name: str) -> None:
    """One row of `up` or `gate` reaches one column of `down`'s input; linearly so from `up`, if there is a gate."""
    model, anatomy, batch = make(name)
    gated = "ffn.gate" in anatomy.kinds()
    down = anatomy.sites("ffn.down")[-1]
    where = {"layers": [down.layer], "stack": down.stack}
    row = 5

    def inner(site: Site, times: float) -> Tensor:
        delta = torch.zeros(site.d_out, site.d_in)
        delta[row] = times * a_delta(site)[row]
        with moved(model, site, delta), watching(model) as (ins, _):
            run(model, batch)
        return ins[down.path][0]

    for kind in ("ffn.up", "ffn.gate") if gated else ("ffn.up",):
        site = anatomy.sites(kind, **where)[0]
        assert (site.d_in, site.d_out) == (anatomy.d, down.d_in)
        zero, one, two = (inner(site, t) for t in (0.0, 1.0, 2.0))
        columns = (one != zero).flatten(0, -2).any(0).nonzero().flatten().tolist()
        assert columns == [row], f"{site.key} reaches columns {columns}"
        is_linear = torch.allclose(two - zero, 2 * (one - zero), rtol=1e-3, atol=1e-5)
        assert is_linear == (gated and kind == "ffn.up"), f"{site.key}: linear is {is_linear}"


@pytest.mark.parametrize("name", [*EXPERTS_ONLY, "qwen2-moe"])
def test_experts_compute_what_their_sites_say(name: str) -> None:
    model, anatomy, _ = make(name)
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(11, tiny.HIDDEN, generator=draw)
    share = torch.rand(11, 2, generator=draw)
    which = torch.stack([torch.randperm(tiny.EXPERTS, generator=draw)[:2] for _ in range(11)])
    for block in anatomy.blocks:
        sites = {(s.kind, s.expert): s for s in anatomy.sites("experts", layers=[block.layer])}
        assert len(sites) == 3 * tiny.EXPERTS and {s.n_experts for s in sites.values()} == {tiny.EXPERTS}
        module = model.get_submodule(sites["experts.up", 0].path)
        with torch.no_grad():
            found = module(x, which, share)
            wanted = torch.zeros_like(x)
            for expert in range(tiny.EXPERTS):
                gate, up = (linear(x, *expert_weights(model, sites[f"experts.{k}", expert])) for k in ("gate", "up"))
                if name == "gpt-oss":
                    inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
                else:
                    inner = torch.nn.functional.silu(gate) * up
                y = linear(inner, *expert_weights(model, sites["experts.down", expert]))
                wanted += (share * (which == expert)).sum(-1, keepdim=True) * y
        close(found, wanted, rtol=1e-4, atol=1e-5)
        assert anatomy.sites("ffn_out", layers=[block.layer])[0].path == f"{block.path}.mlp"


def expert_weights(model: nn.Module, site: Site) -> tuple[Tensor, Tensor | None]:
    """As `weight_of`; a bias of experts has a row for each."""
    module = model.get_submodule(site.path)
    weight = getattr(module, site.param)[site.expert]
    weight = weight.T if site.transposed else weight
    bias = getattr(module, site.bias)[site.expert] if site.bias else None
    rows = list(site.rows.indices()) if site.rows else slice(None)
    assert weight[rows].shape == (site.d_out, site.d_in)
    return weight[rows], bias if bias is None else bias[rows]


# -- sublayers -------------------------------------------------------------------------------------------------------

# Norm sites (by number) that the outputs of attention and feed-forward layer pass before the residual sum.
NORMED_OUTPUT = {"gemma2": (1, 3), "gemma3": (3, 5), "glm4": (1, 3), "olmo2": (2, 3)}
PARALLEL = ("gpt-neox", "phi")


def _norm(model: nn.Module, anatomy: Anatomy, block: Any, index: int) -> nn.Module:
    part = [s for s in anatomy.sites("norm", layers=[block.layer], stack=block.stack) if s.part == str(index)]
    return model.get_submodule(part[0].path)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_sublayer_outputs_lie_before_the_residual_sum_and_the_norm(name: str, scale: float) -> None:
    """Each sublayer's output, scaled, goes through a reference block written here; the model must agree.

    Pre-norm: next = r + s. Post-norm: next = norm(r + s). Gemma and OLMo-2: next = r + norm(s).
    GPT-NeoX and Phi sum both sublayers at once.
    """
    model, anatomy, batch = make(name)
    places = [s for s in anatomy.all_sites if s.kind in ("attn_out", "cross_out", "ffn_out")]

    def stretch(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return (output[0] * scale, *output[1:]) if isinstance(output, tuple) else output * scale

    hooks = [model.get_submodule(s.path).register_forward_hook(stretch) for s in places]
    with watching(model) as (ins, outs):
        run(model, batch)
    for hook in hooks:
        hook.remove()
    for block in anatomy.blocks:
        own = [s for s in places if (s.layer, s.stack) == (block.layer, block.stack)]
        assert [s.kind for s in own] in (["attn_out", "ffn_out"], ["attn_out", "cross_out", "ffn_out"])
        calls = len(outs[block.path])
        assert calls == own[0].shared
        for call in range(calls):
            n_norms = 0
            streams = [ins[s.residual_path or ""][call] for s in own]
            streams.append(outs[block.path][call].reshape(streams[-1].shape))
            for i, site in enumerate(own):
                s = outs[site.path][call].reshape(streams[i].shape)
                r, following = streams[i], streams[i + 1].reshape(streams[i].shape)
                if name in PARALLEL:
                    if site.kind == "attn_out":
                        assert torch.equal(r, streams[1])
                        continue
                    s = s + outs[own[0].path][call]
                if name in NORMED_OUTPUT:
                    s = _norm(model, anatomy, block, NORMED_OUTPUT[name][i])(s)
                with torch.no_grad():
                    if anatomy.pre_norm or name in NORMED_OUTPUT:
                        wanted = r + s
                    else:
                        wanted = _norm(model, anatomy, block, n_norms)(r + s)
                        n_norms += 1
                close(following, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_a_sublayer_reads_its_input_path_and_the_stream_lies_at_its_residual_path(name: str) -> None:
    model, anatomy, batch = make(name)
    with watching(model) as (ins, _):
        run(model, batch)
    for site in anatomy.all_sites:
        if site.kind not in ("attn_out", "cross_out", "ffn_out"):
            continue
        assert site.input_path and site.residual_path
        reads, stream = ins[site.input_path][0], ins[site.residual_path][0]
        first = {"attn_out": "attn.q", "cross_out": "cross.q", "ffn_out": "ffn.up"}[site.kind]
        if first in anatomy.kinds():
            projection = anatomy.sites(first, layers=[site.layer or 0], stack=site.stack)[0]
            assert torch.equal(ins[projection.path][0].reshape(reads.shape), reads)
        if anatomy.pre_norm:
            norm = model.get_submodule(site.residual_path)
            with torch.no_grad():
                close(norm(stream).reshape(reads.shape), reads)
            named = {s.path for s in anatomy.sites("norm")}
            assert site.residual_path in named or isinstance(norm, nn.Identity)
        else:
            assert torch.equal(stream, reads)
    first_block = next(b for b in anatomy.blocks)
    site = anatomy.sites("attn_out", layers=[first_block.layer], stack=first_block.stack or None)[0]
    assert torch.equal(ins[site.residual_path or ""][0], ins[first_block.path][0])


@pytest.mark.parametrize("name", EVERY)
def test_blocks_hand_the_stream_on_in_order(name: str) -> None:
    model, anatomy, batch = make(name)
    with watching(model) as (ins, outs):
        run(model, batch)
    for stack in {b.stack for b in anatomy.blocks}:
        paths = [s.path for s in anatomy.sites("block_out", stack=stack)]
        assert paths == [b.path for b in anatomy.blocks if b.stack == stack]
        for here, following in pairwise(paths):
            assert torch.equal(outs[here][0], ins[following][0])
        final = [s for s in anatomy.sites("norm", stack=stack) if s.part == "final"]
        if final and anatomy.pre_norm:
            assert torch.equal(outs[paths[-1]][-1], ins[final[0].path][-1])


# Where the model drops out through a function, or through one module for two sublayers, the place lies before it.
DROPOUT_BEHIND_THE_PLACE = {
    "distilbert": {"attn_out"},  # has none there at all
    "albert": {"ffn_out"},  # the same
    "modernbert": {"ffn_out"},  # the same
    "opt": {"attn_out", "ffn_out"},
    "bloom": {"attn_out", "ffn_out"},
    "bart": {"attn_out", "cross_out", "ffn_out"},
    "vit": {"attn_out", "ffn_out"},
    "mbart": {"attn_out", "cross_out", "ffn_out"},
    "modernbert-decoder": {"ffn_out"},
    "persimmon": {"attn_out"},
    "phi": {"attn_out", "ffn_out"},
    **{n: {"attn_out", "ffn_out"} for n in ("olmoe", "qwen2-moe", "qwen3-moe", "gpt-oss", "glm", "glm4", "olmo2")},
    **{n: {"attn_out", "ffn_out"} for n in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "mixtral")},
}


@pytest.mark.parametrize("name", EVERY)
def test_where_a_dropout_module_ends_a_sublayer_the_place_is_behind_it(name: str) -> None:
    model, anatomy, batch = make(name)
    model.train()
    torch.manual_seed(0)
    with watching(model) as (_, outs):
        run(model, batch)
    behind = DROPOUT_BEHIND_THE_PLACE.get(name, set())
    for site in anatomy.all_sites:
        if site.kind in ("attn_out", "cross_out", "ffn_out"):
            dropped = bool((outs[site.path][0] == 0).any())
            assert dropped == (site.kind not in behind), f"{site.key}: zeros are {dropped}"


# -- ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", named("vit"))
def test_embed_looks_words_up_for_its_stack(name: str) -> None:
    model, anatomy, batch = make(name)
    with watching(model) as (ins, outs):
        run(model, batch)
    for site in anatomy.sites("embed"):
        table = model.get_submodule(site.path)
        ids = ins[site.path][0]
        assert ids.dtype == torch.long and outs[site.path][0].shape == (*ids.shape, site.d_out)
        scale = float(getattr(table, "embed_scale", 1.0))
        with torch.no_grad():
            close(outs[site.path][0], table.weight[ids] * scale, rtol=1e-4, atol=1e-5)
        if site.stack != "decoder":
            assert torch.equal(ids, batch["input_ids"])


@pytest.mark.parametrize(("name", "task"), [(n, t) for n in tiny.TINY for t in tiny.tasks(n) if t != "base"])
def test_the_head_gives_the_logits(name: str, task: str) -> None:
    model = tiny.tiny(name, task)
    anatomy, batch = Anatomy.read(model), tiny.inputs(model, padded=False)
    (head,) = anatomy.sites("head")
    before = run(model, batch).logits

    def raise_one_column(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + torch.eye(head.d_out)[3]

    handle = model.get_submodule(head.path).register_forward_hook(raise_one_column)
    difference = run(model, batch).logits - before
    handle.remove()
    assert head.d_out == before.shape[-1]
    columns = (difference != 0).flatten(0, -2).any(0).nonzero().flatten().tolist()
    assert columns == [3] and bool((difference[..., 3] > 0.5).all())
