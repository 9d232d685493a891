"""LoRA-XS, TinyLoRA, VB-LoRA, Uni-LoRA, PSOFT, DEFT and PEANuT: peft computes the same, and what is their own."""

from typing import Any

import peft
import pytest
import torch
from methods.checks import attach_double, logits, stir
from tiny import inputs, tiny

from luthier.core import ConfigError
from luthier.methods.parts.principal import FrozenFrame
from luthier.methods.reparameterised.subspace.unilora import places_of
from luthier.surgery import attach

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Specified to not save"),
]
SITES, LAYERS = ("attn.k", "ffn.down"), ["k_proj", "down_proj"]


def both(method: str, config: Any, **settings: Any) -> tuple[Any, Any, dict[Any, Any], dict[str, torch.Tensor]]:
    """Our tuning with numbers that are nowhere zero, peft's model, our modules with peft's layers, peft's numbers."""
    tuned = attach(tiny("llama"), method, sites=SITES, train_head=False, **settings)
    stir(tuned, 0.3)
    other = peft.get_peft_model(tiny("llama"), config)
    layers = dict(other.base_model.model.named_modules())
    paths = {s.key: s.path for s in tuned.anatomy.sites(*SITES)}
    pairs = {m: layers[paths[k]] for k, m in tuned.modules().items() if k in paths}
    return tuned, other, pairs, dict(other.named_parameters())


def check(tuned: Any, other: Any, compared: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """The same logits, and gradients once one of each pair's numbers has been copied into the other."""
    with torch.no_grad():
        for mine, theirs in compared:
            theirs.copy_(mine.view_as(theirs))
    batch = inputs(tuned.model)
    ours, theirs = tuned.model.eval()(**batch), other.eval()(**batch)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(tiny("llama"), batch), ours.logits, atol=1e-4)
    ours.loss.backward()
    theirs.loss.backward()
    assert {id(p) for p in tuned.trained().values()} == {id(mine) for mine, _ in compared}
    for mine, theirs in compared:
        torch.testing.assert_close(mine.grad, theirs.grad.view_as(mine), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tying", [0.0, 0.5, 1.0])
def test_peft_s_tinylora_is_ours(tying: float) -> None:
    config = peft.TinyLoraConfig(r=3, u=5, weight_tying=tying, target_modules=LAYERS)
    tuned, other, _, theirs = both("tinylora", config, rank=3, size=5, tying=tying)
    values = [(p, n.removeprefix("(parts).")) for n, p in tuned.trained().items()]
    assert len(values) == {0.0: 6, 0.5: 3, 1.0: 1}[tying]
    found = [p for n, p in theirs.items() if "tinylora_v" in n]
    check(tuned, other, [(mine, v) for (mine, _), v in zip(values, found, strict=True)])


def test_peft_s_vblora_is_ours() -> None:
    config = peft.VBLoRAConfig(r=2, num_vectors=10, vector_length=8, topk=3, target_modules=LAYERS)
    tuned, other, pairs, theirs = both("vblora", config, rank=2, vectors=10, length=8, top=3)
    logits = [(m.a, p.vblora_logits_A["default"]) for m, p in pairs.items()]
    logits += [(m.b, p.vblora_logits_B["default"]) for m, p in pairs.items()]
    bank = next(p for n, p in theirs.items() if "vector_bank" in n)
    check(tuned, other, [*logits, (next(iter(pairs)).__dict__["bank"].vectors, bank)])


def test_peft_s_unilora_is_ours_and_its_map_keeps_lengths() -> None:
    config = peft.UniLoraConfig(r=3, theta_d_length=70, proj_seed=4, target_modules=LAYERS)
    tuned, other, pairs, theirs = both("unilora", config, rank=3, size=70, draw=4)
    numbers = next(iter(pairs)).__dict__["numbers"].t
    check(tuned, other, [(numbers, next(p for n, p in theirs.items() if "theta" in n))])
    whole = torch.cat([n.flatten() for m in pairs for n in m.thin()])
    assert whole.detach().norm().item() == pytest.approx(numbers.detach().norm().item(), rel=1e-5)


def test_every_number_of_unilora_stands_in_equally_many_places_up_to_one() -> None:
    counts = torch.from_numpy(places_of(103, 10, 1)).bincount()
    assert sorted(counts.tolist()) == [10] * 7 + [11] * 3


@pytest.mark.parametrize("depth", [0, 2])
def test_peft_s_peanut_is_ours(depth: int) -> None:
    config = peft.PeanutConfig(r=4, depth=depth, scaling=3.0, act_fn="gelu", target_modules=LAYERS)
    tuned, other, pairs, _ = both("peanut", config, rank=4, depth=depth, scale=3.0, function="gelu")
    same = []
    for mine, theirs in pairs.items():
        same += [(mine.a, theirs.peanut_A["default"].weight), (mine.b, theirs.peanut_B["default"].weight)]
        for ours, name in ((mine.down, "peanut_encoders"), (mine.up, "peanut_decoders")):
            same += [(p, layer.weight) for p, layer in zip(ours, getattr(theirs, name)["default"], strict=True)]
    check(tuned, other, same)


def test_lora_xs_moves_the_weight_in_its_own_leading_directions_alone() -> None:
    tuned = attach_double("llama", "lora_xs", sites=("ffn.up",), rank=4, train_head=False)
    stir(tuned, 0.3)
    module = next(m for m in tuned.modules().values() if isinstance(m, FrozenFrame))
    weight = tuned.model.get_submodule(tuned.anatomy.sites("ffn.up")[0].path).weight
    u, s, vt = torch.linalg.svd(weight.detach(), full_matrices=False)
    update = (module.merged(weight, None)[0] - weight).detach()
    inside = u[:, :4].T @ update @ vt[:4].T
    torch.testing.assert_close(inside, s[:4, None].sqrt() * module.r.detach() * s[:4].sqrt())
    torch.testing.assert_close(u[:, :4] @ inside @ vt[:4], update)


def test_psoft_keeps_the_angles_of_the_main_directions_without_stretch_and_not_with_it() -> None:
    for stretch in (False, True):
        tuned = attach_double("llama", "psoft", sites=("ffn.up",), rank=6, stretch=stretch, train_head=False)
        stir(tuned, 0.3)
        module = next(m for k, m in tuned.modules().items() if "@" in k)
        a, b = module.thin()
        moved = module.b + b  # what the main part of the weight has become, in the frame of A
        kept = torch.allclose(moved @ moved.T, module.b @ module.b.T, atol=1e-9)
        assert kept is not stretch
        torch.testing.assert_close(a @ a.T, torch.eye(6).double())


@pytest.mark.parametrize("basis", ["relu", "qr"])
def test_deft_takes_out_what_its_basis_says_and_puts_in_what_it_learnt(basis: str) -> None:
    tuned = attach_double("llama", "deft", sites=("ffn.up",), rank=3, basis=basis, train_head=False)
    stir(tuned, 0.3)
    module = next(m for k, m in tuned.modules().items() if "@" in k)
    weight = tuned.model.get_submodule(tuned.anatomy.sites("ffn.up")[0].path).weight.detach()
    p = torch.linalg.qr(module.p)[0] if basis == "qr" else module.p
    taken = p @ (p if basis == "qr" else p.relu()).T
    wanted = weight - taken @ weight + p @ module.r
    torch.testing.assert_close(module.merged(weight, None)[0], wanted)
    if basis == "qr":
        torch.testing.assert_close(taken @ taken, taken)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("psoft", {"rank": 50}, "psoft.rank: 50 is above the 48 directions of attn.q@0"),
        ("lora_xs", {"rank": 50}, "lora_xs.rank: 50 is above the 48 directions of attn.q@0"),
        ("tinylora", {"rank": 50}, "tinylora.rank: 50 is above the 48 directions of attn.q@0"),
        ("loftq", {"rank": 50}, "loftq.rank: 50 is above the 48 directions of attn.q@0. Set it to 48 or less"),
        ("vblora", {"length": 7}, "vblora.length: 7 does not divide the 48 and 48 of attn.q@0"),
        ("vblora", {"top": 300}, "vblora.top: 300 is above the 256 vectors of the bank"),
        ("unilora", {"size": 5000}, "unilora.size: 5000 numbers are more than the 2304 of the matrices"),
        ("deft", {"rank": 50}, "deft.rank: 50 is above the 48 outputs of attn.q@0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(method: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attach(tiny("bert"), method, **settings)
