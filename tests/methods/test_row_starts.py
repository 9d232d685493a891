"""LoRA's starts that look at rows, and those beside: held to peft's on the same rows."""

import dataclasses
import sys
import types
import warnings

import pytest
import torch
from little import little_spec
from methods.checks import logits
from tiny import inputs, tiny

from luthier import train as run
from luthier.core import ConfigError
from luthier.methods.parts.low_rank import ThinUpdate
from luthier.surgery import attach, from_peft, load, method
from luthier.workflow import resume
from luthier.workflow.resume_proof import run_digests

SITES = ("attn.q", "ffn.down")
STILL = {"attention_dropout": 0.0}
PAPERS = {"eva": "2410.07170", "corda": "2406.05223", "lora_ga": "2407.05000"}


def row(seed):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 130, (1, 17), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def started(start, rows, rank=4, **settings):
    tuned = attach(
        tiny("llama", **STILL), method("lora", {"start": start, "rank": rank, "sites": SITES, "data": 1.0, **settings})
    )
    tuned.model.eval()
    part = tuned.tuning().method
    part.prepare(tuned, [lambda one=one: tuned.model(**one).loss for one in rows])
    return tuned


def modules(tuned):
    sites = {site.key: site.path for site in tuned.anatomy.all_sites}
    return {sites[k]: m for k, m in tuned.modules().items() if isinstance(m, ThinUpdate)}


def peft_modules(model):
    found = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and "lora" not in n}
    return {n.removeprefix("base_model.model."): m for n, m in found.items()}


def config(**more):
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], **more)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("start", ["eva", "corda", "lora_ga", "mica", "orthogonal", "svd", "minor", "qr"])
def test_it_starts_as_the_base(start):
    tuned = started(start, [row(1), row(2)])
    batch = inputs(tuned.model)
    with tuned.base_only() as base:
        wanted = logits(base, batch)
    assert torch.allclose(logits(tuned.model, batch), wanted, atol=1e-6)
    assert all(m.a.any() or m.b.any() for m in modules(tuned).values())


def test_corda_is_pefts_on_the_same_rows(monkeypatch):
    # Of attrs, which may not be installed, peft's module takes one name, for a plain class of three fields.
    monkeypatch.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))
    from peft import get_peft_model
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    rows = [row(seed) for seed in range(12)]
    theirs, settings = tiny("llama", **STILL), config(init_lora_weights="corda", corda_config=CordaConfig())

    def look():
        for one in rows:
            theirs(**one)

    preprocess_corda(theirs, settings, run_model=look)
    wanted = peft_modules(get_peft_model(theirs, settings))
    compare_products(modules(started("corda", rows)), wanted)


def compare_products(ours, wanted):
    assert len(ours) == len(wanted) == 6
    for name, module in ours.items():
        product = (module.b @ module.a).detach()
        expected = (wanted[name].lora_B["default"].weight @ wanted[name].lora_A["default"].weight).detach()
        assert torch.allclose(product, expected, atol=2e-3 * float(expected.abs().max())), name


def test_corda_is_its_formula():
    """The leading part of W C, weighed back, for one place and by hand."""
    rows = [row(seed) for seed in range(12)]
    model = tiny("llama", **STILL).eval()
    read = []
    layer = model.model.layers[1].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda m, args: read.append(args[0].detach()[0].double()))
    for one in rows:
        model(**one)
    handle.remove()
    c = sum((x / x.max().abs()).T @ (x / x.max().abs()) for x in read) / len(read)
    c = c + 0.01 * c.diagonal().mean() * torch.eye(len(c), dtype=torch.float64)
    u, s, vt = torch.linalg.svd(layer.weight.detach().double() @ c, full_matrices=False)
    wanted = (u[:, :4] * s[:4]) @ vt[:4] @ torch.linalg.inv(c)
    module = modules(started("corda", rows))["model.layers.1.mlp.down_proj"]
    assert torch.allclose(module.scale * (module.b @ module.a).detach().double(), wanted, atol=1e-5)


def test_eva_is_pefts_on_the_same_rows():
    from peft import EvaConfig, get_peft_model, initialize_lora_eva_weights

    batch = {n: torch.cat([row(seed)[n] for seed in range(8)]) for n in ("input_ids", "attention_mask")}
    theirs = get_peft_model(
        tiny("llama", **STILL), config(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0, use_label_mask=False))
    )
    initialize_lora_eva_weights(theirs, dataloader=[batch, batch], show_progress_bar=False)
    wanted = peft_modules(theirs)
    ours = modules(started("eva", [row(seed) for seed in range(8)]))
    assert len(ours) == len(wanted) == 6
    for name, module in ours.items():
        a = wanted[name].lora_A["default"].weight.detach()
        near = torch.nn.functional.cosine_similarity(module.a.detach(), a, dim=1).abs()
        assert float(near.min()) > 0.95, (name, near)  # theirs grow bit by bit, cut to the rank, and have any sign
        assert not module.b.any() and torch.allclose(module.a.norm(dim=1), torch.ones(4), atol=1e-5)


def test_eva_is_the_principal_components_of_what_is_read():
    rows = [row(seed) for seed in range(8)]
    model = tiny("llama", **STILL).eval()
    read = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, args: read.append(args[0][0]))
    for one in rows:
        model(**one)
    handle.remove()
    x = torch.cat(read).detach().double()
    wanted = torch.linalg.svd(x - x.mean(0)).Vh[:4].float()
    found = modules(started("eva", rows))["model.layers.1.mlp.down_proj"].a.detach()
    assert torch.allclose((found * wanted).sum(1).abs(), torch.ones(4), atol=1e-4)


@pytest.mark.parametrize("start", ["eva", "corda"])
def test_what_several_places_read_is_summed_once_and_what_they_do_not_is_not(start, monkeypatch):
    from luthier.methods.parts import row_starts

    held = []
    whole = row_starts._inputs
    monkeypatch.setattr(row_starts, "_inputs", lambda *a, **k: held.append(whole(*a, **k)) or held[-1])
    together = started(start, [row(1), row(2)], sites=("attn.q", "attn.v", "ffn.up"))
    assert len(held[0]) == 9 and len({id(one) for one in held[0]}) == 6  # attention, and feed-forward, of each layer
    for kind in ("attn.q", "attn.v"):
        for name, module in modules(started(start, [row(1), row(2)], sites=(kind,))).items():
            assert torch.equal(modules(together)[name].a0, module.a0)


def test_a_row_of_zeros_says_nothing_to_corda_and_spoils_nothing():
    from luthier.methods.parts.posterior import Call
    from luthier.methods.parts.row_starts import _summed

    x = torch.randn(1, 5, 3)
    one = _summed(None, [Call(x, x)], scaled=True)
    both = _summed(one, [Call(torch.zeros(1, 5, 3), x)], scaled=True)
    assert torch.equal(both.squares, one.squares) and both.passes == 2


def test_lora_ga_is_pefts_on_the_same_rows():
    from peft import LoraGAConfig, get_peft_model
    from peft.tuners.lora.loraga import preprocess_loraga

    rows = [row(seed) for seed in range(4)]
    theirs, settings = tiny("llama", **STILL), config(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

    def step():
        for one in rows:
            theirs(**one).loss.backward()

    preprocess_loraga(theirs, settings, step)
    wanted = peft_modules(get_peft_model(theirs, settings))
    ours = modules(started("lora_ga", rows))
    assert len(ours) == len(wanted) == 6
    for name, module in ours.items():
        for mine, other in ((module.a, wanted[name].lora_A), (module.b.T, wanted[name].lora_B)):
            given = other["default"].weight.detach()
            given = given if mine is module.a else given.T
            mine = mine.detach()
            near = torch.nn.functional.cosine_similarity(mine, given, dim=1).abs()
            assert float(near.min()) > 0.99, (name, near)
            assert torch.allclose(mine.norm(dim=1), given.norm(dim=1), rtol=1e-2)


def test_mica_is_pefts():
    from peft import get_peft_model

    wanted = peft_modules(get_peft_model(tiny("llama", **STILL), config(init_lora_weights="mica")))
    tuned = attach(tiny("llama", **STILL), method("mica", {"rank": 4, "sites": SITES}))
    for name, module in modules(tuned).items():
        theirs = wanted[name].lora_B["default"].weight.detach()
        near = torch.nn.functional.cosine_similarity(module.b.detach(), theirs, dim=0).abs()
        assert float(near.min()) > 0.9999 and not module.a.any()
        assert module.a.requires_grad and not module.b.requires_grad
    assert tuned.n_trained() == tuned.tuning().method.n_params(tuned.anatomy) == 3 * 4 * (48 + 80)


def test_orthogonal_halves_have_nothing_in_common():
    tuned = attach(tiny("llama"), method("lora", {"rank": 4, "start": "orthogonal", "sites": SITES}))
    for module in modules(tuned).values():
        assert float((module.b @ module.a).abs().max()) < 1e-6
        assert float(module.a.std()) > 0.01 and float(module.b.std()) > 0.01


@pytest.mark.parametrize("name", list(PAPERS))
def test_presets_are_found_and_a_run_looks_saves_and_loads(name, tmp_path):
    assert method(name).settings()["start"] == name and method(name).looks_at_data
    spec = little_spec(tmp_path, name, out=str(tmp_path / "run"))
    result = run(spec)
    held = [m for m in result.tuned.modules().values() if isinstance(m, ThinUpdate)]
    assert held and all(m.a0.any() and not torch.equal(m.b, m.b0) for m in held)
    again = load(result.tuned.detach(), tmp_path / "run" / "tuning")
    for one, other in zip(held, again.modules().values(), strict=False):
        assert all(torch.equal(t, other.state_dict()[n]) for n, t in one.state_dict().items())


@pytest.mark.parametrize("name", ["corda"])
def test_stopped_and_resumed_it_ends_in_the_same_bits(name, tmp_path):
    whole = run(little_spec(tmp_path, name, out=str(tmp_path / "whole")))
    from luthier.training import Listener
    from luthier.workflow.run import train_run

    train_run(little_spec(tmp_path, name, out=str(tmp_path / "cut")), Listener(), stop_at=4)
    resume(tmp_path / "cut")
    assert run_digests(whole.path) == run_digests(tmp_path / "cut")


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"no rows to look at.*start=svd"):
        started("corda", [])
    with pytest.raises(ConfigError, match="Call prepare"):
        tuned = attach(tiny("llama"), method("lora", {"start": "lora_ga", "rank": 2}))
        tuned.model.train()
        tuned.model(**row(0))
    with pytest.raises(ConfigError, match="odd"):
        attach(tiny("llama"), method("lora", {"start": "orthogonal", "rank": 3}))
    with pytest.raises(ConfigError, match="above the 24"):
        attach(tiny("llama"), method("lora", {"start": "lora_ga", "rank": 30}))
    for stuck in ({"train_b": False}, {"train_b": False, "start": "eva"}, {"train_a": False, "start": "mica"}):
        with pytest.raises(ConfigError, match="nothing would be learnt"):
            method("lora", stuck)
    with pytest.raises(ConfigError, match=r"mica\.train_a: false, and A stays zero.*Leave it out"):
        method("mica", {"train_a": False})
    with pytest.raises(ConfigError, match="say too little"):
        started("eva", [row(0)], rank=20)


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal", "mica", "eva", "pissa", "olora"])
def test_pefts_starts_come_in_as_what_they_computed_or_are_refused(start, tmp_path):
    from peft import EvaConfig, get_peft_model, initialize_lora_eva_weights

    more = {"eva_config": EvaConfig(rho=1.0, use_label_mask=False)} if start == "eva" else {}
    theirs = get_peft_model(tiny("llama", **STILL), config(init_lora_weights=start, **more))
    if start == "eva":
        batch = {n: torch.cat([row(seed)[n] for seed in range(8)]) for n in ("input_ids", "attention_mask")}
        initialize_lora_eva_weights(theirs, dataloader=[batch, batch], show_progress_bar=False)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.add_(0.05 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "theirs")
    if start in ("pissa", "olora"):
        with pytest.raises(ConfigError, match="path_initial_model_for_weight_conversion"):
            from_peft(tiny("llama", **STILL), tmp_path / "theirs")
        return
    batch = inputs(theirs)
    wanted = logits(theirs, batch)
    torch.testing.assert_close(logits(from_peft(tiny("llama", **STILL), tmp_path / "theirs").model, batch), wanted)
