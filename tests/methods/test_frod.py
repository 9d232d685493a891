"""FRoD: peft's result from the same basis, and what is its own."""

from typing import Any

import peft
import pytest
import torch
from methods.checks import logits, stir
from tiny import inputs, tiny

from luthier.methods.reparameterised.subspace.frod import FRoD, Turned, common_basis
from luthier.surgery import attach, load

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]


@pytest.mark.parametrize(
    ("kind", "layers", "sites"),
    [("llama", ["k_proj", "down_proj"], ("attn.k", "ffn.down")), ("gpt2", ["mlp.c_proj"], ("ffn.down",))],
)
def test_from_the_same_basis_it_is_peft_s(kind: str, layers: list[str], sites: Any) -> None:
    tuned = attach(tiny(kind), FRoD(sites=sites, share=0.05), train_head=False)
    stir(tuned, 0.3)
    config = peft.FrodConfig(target_modules=layers, sparse_rate=0.05, progressbar=False, fan_in_fan_out=kind == "gpt2")
    other = peft.get_peft_model(tiny(kind), config)
    found = dict(other.base_model.model.named_modules())
    paths = {s.key: s.path for s in tuned.anatomy.sites(*sites)}
    pairs = {module: found[paths[key]] for key, module in tuned.modules(Turned).items()}
    with torch.no_grad():
        for mine, theirs in pairs.items():
            mine.basis.v.copy_(theirs.frod_V["default"])
            mine.basis.places.copy_(theirs.frod_s_indices["default"])
        for mine, theirs in pairs.items():
            torch.testing.assert_close(mine.directions(), theirs.frod_U["default"], rtol=1e-3, atol=1e-3)
            theirs.frod_U["default"] = mine.directions()  # of the same V, which it has in fewer digits
            theirs.frod_lambda_l["default"].add_(mine.c)
            theirs.frod_lambda_s_values["default"].copy_(mine.s)
    batch = inputs(tuned.model)
    ours, theirs_out = tuned.model.eval()(**batch), other.eval()(**batch)
    torch.testing.assert_close(ours.logits, theirs_out.logits, rtol=1e-4, atol=1e-4)
    ours.loss.backward()
    theirs_out.loss.backward()
    for mine, theirs in pairs.items():
        assert mine.s.numel() == theirs.frod_lambda_s_values["default"].numel()
        torch.testing.assert_close(mine.s.grad, theirs.frod_lambda_s_values["default"].grad, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(mine.c.grad, theirs.frod_lambda_l["default"].grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("site", "rows"), [("attn.q", 3 * 48), ("ffn.down", 48)])
def test_every_weight_is_its_directions_times_their_lengths_in_the_common_basis(site: str, rows: int) -> None:
    sites = (site,) if rows > 48 else (f"{site}@0",)  # of one layer alone there are fewer rows than columns
    tuned = attach(tiny("llama"), FRoD(sites=sites))
    for module in tuned.modules(Turned).values():
        u, v, weight = module.directions().double(), module.basis.v.double(), module.base.weight().double()
        used = u.norm(dim=0) > 0
        torch.testing.assert_close(u.norm(dim=0)[used], torch.ones(int(used.sum())).double())
        lengths = torch.linalg.vector_norm(weight @ torch.linalg.inv(v).T, dim=0)
        torch.testing.assert_close((u * lengths) @ v.T, weight, rtol=1e-4, atol=1e-5)


def test_of_layers_that_are_one_rotated_basis_the_basis_is_found() -> None:
    draw = torch.Generator().manual_seed(0)
    v = torch.linalg.qr(torch.randn(6, 6, generator=draw, dtype=torch.float64)).Q
    layers = [torch.randn(9, 6, generator=draw, dtype=torch.float64) for _ in range(2)]
    weights = [torch.linalg.qr(w).Q * torch.rand(6, generator=draw, dtype=torch.float64).add(0.5) @ v.T for w in layers]
    found = common_basis(weights, 1e-3)
    shares = (found / found.norm(dim=0)).T @ v
    torch.testing.assert_close(shares.abs().max(1).values, torch.ones(6).double(), rtol=1e-6, atol=1e-6)


def test_no_place_of_s_is_on_the_diagonal_or_twice_and_the_draw_names_them() -> None:
    def places(draw: int) -> list[tuple[int, int]]:
        tuned = attach(tiny("bert"), FRoD(share=0.3, draw=draw))
        module = next(iter(tuned.modules(Turned).values()))
        return [tuple(pair) for pair in module.basis.places.T.tolist()]

    found = places(0)
    assert len(set(found)) == len(found) == int(48 * 48 * 0.3) and all(r != c for r, c in found)
    assert places(0) == found != places(1)
    assert len(attach(tiny("bert"), FRoD(share=1.0)).modules(Turned)["attn.q@0"].s) == 48 * 47
    assert len(attach(tiny("bert"), FRoD(share=0.0)).modules(Turned)["attn.q@0"].s) == 0


def test_a_saved_tuning_brings_its_basis_and_not_one_that_is_made_anew(tmp_path: Any) -> None:
    tuned = attach(tiny("bert"), FRoD())
    with torch.no_grad():
        for module in tuned.modules(Turned).values():
            module.basis.v.copy_(torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(3))).Q)
    stir(tuned, 0.3)
    before = logits(tuned.model)
    tuned.save(tmp_path / "tuning")
    again = tiny("bert")
    load(again, tmp_path / "tuning")
    assert torch.equal(logits(again), before)
