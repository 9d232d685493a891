"""rsLoRA, LoRA+, the linear probe and P-tuning v2: what their papers change of another method, and nothing else."""

import json
from pathlib import Path

import peft
import pytest
import torch
from methods.checks import logits, stir
from tiny import inputs, tiny

from luthier.methods.parts.low_rank import ThinUpdate
from luthier.runs.spec import OptimSpec
from luthier.surgery import METHODS, attach, from_peft, load, method, to_peft
from luthier.training.optimiser import optimiser_of

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# --- rslora


def branch(name: str, rank: int) -> tuple[float, float]:
    """How large the branch's output and the gradient of B are, at numbers that do not know the rank."""
    tuned = attach(tiny("llama"), name, rank=rank, sites=("ffn.up",))
    module = next(iter(tuned.modules(ThinUpdate).values()))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        module.a.copy_(torch.randn(module.a.shape, generator=draw))
        module.b.copy_(torch.randn(module.b.shape, generator=draw))
    x = torch.randn(64, module.a.shape[1], generator=draw)
    out = module.after(x, torch.zeros(64, module.b.shape[0]))
    out.backward(torch.randn(out.shape, generator=draw))
    # Each entry of B's gradient, seen by the branch: |dB| per row of B.
    return float(out.detach().norm()), float(module.b.grad.norm())


@pytest.mark.acid("rslora", 1)
@pytest.mark.parametrize("rank", [16, 64, 256, 512])
def test_the_branch_is_as_large_at_every_rank_and_loras_falls_with_its_root(rank: int) -> None:
    small, large = branch("rslora", 4), branch("rslora", rank)
    for before, after in zip(small, large, strict=True):
        assert after / before == pytest.approx(1, abs=0.2)
    small, large = branch("lora", 4), branch("lora", rank)
    for before, after in zip(small, large, strict=True):
        assert after / before == pytest.approx((4 / rank) ** 0.5, rel=0.2)


def test_its_scale_is_alpha_over_the_root_of_each_places_rank() -> None:
    tuned = attach(tiny("bert"), method("rslora", {"rank": "4, attn.q@0: 9", "alpha": 6.0}))
    scales = {key: module.scale for key, module in tuned.modules(ThinUpdate).items()}
    assert {round(s, 12) for s in scales.values()} == {2.0, 3.0}
    assert [key for key, s in scales.items() if s == 2.0] == ["attn.q@0"]
    assert attach(tiny("bert"), method("rslora", {})).tuning().method.settings()["rank"] == 64


@pytest.mark.acid("rslora", 2)
def test_a_saved_tuning_carries_the_kind_of_scaling(tmp_path: Path) -> None:
    tuned = attach(tiny("bert"), "rslora", rank=9)
    stir(tuned, 0.1)
    expected = logits(tuned.model)
    tuned.save(tmp_path / "tuning")
    other = tiny("bert")
    again = load(other, tmp_path / "tuning")
    assert torch.equal(logits(other), expected)
    assert next(iter(again.modules(ThinUpdate).values())).scale == 16 / 3


@pytest.mark.parametrize("settings", [{"rank": 9}, {"rank": "4, attn.q: 9"}])
def test_peft_computes_the_same_from_our_file_and_we_from_its(settings: dict[str, object], tmp_path: Path) -> None:
    tuned = attach(tiny("llama"), method("rslora", settings))
    stir(tuned, 0.1)
    to_peft(tuned, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["use_rslora"] is True
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "ours")).eval()
    batch = inputs(tuned.model)
    torch.testing.assert_close(logits(theirs, batch), logits(tuned.model, batch), rtol=1e-5, atol=1e-5)
    if isinstance(settings["rank"], int):
        model = tiny("llama")
        back = from_peft(model, tmp_path / "ours")
        assert back.tuning().method.settings()["scaling"] == "root"
        assert torch.equal(logits(model, batch), logits(tuned.model, batch))


# --- lora_plus


def one_step(name: str, **settings: object) -> dict[str, tuple[float, float]]:
    """Kind of matrix -> how far it moved in one step of plain descent, and its gradient's norm."""
    tuned = attach(tiny("bert", "classification"), name, rank=3, **settings)
    stir(tuned, 0.1)
    spec = OptimSpec(name="sgd", lr=0.1, weight_decay=0.0, clip=0.0)
    optimiser = optimiser_of(spec, tuned.trained(), tuned.groups(), 0.1)
    before = {n: p.detach().clone() for n, p in tuned.trained().items()}
    tuned.model(**inputs(tuned.model)).loss.backward()
    gradients = {n: p.grad.clone() for n, p in tuned.trained().items()}
    optimiser.step(1.0)
    moved = {}
    for end in (".a", ".b"):
        names = [n for n in before if n.endswith(end)]
        apart = torch.cat([(tuned.trained()[n].detach() - before[n]).flatten() for n in names])
        moved[end] = (float(apart.norm()), float(torch.cat([gradients[n].flatten() for n in names]).norm()))
    return moved


@pytest.mark.acid("lora_plus", 1)
def test_in_one_step_b_moves_sixteen_times_as_far_by_its_gradient_as_a() -> None:
    moved = one_step("lora_plus")
    of_a, of_b = (moved[end][0] / moved[end][1] for end in (".a", ".b"))
    assert of_a == pytest.approx(0.1, rel=1e-4)
    assert of_b / of_a == pytest.approx(16, rel=1e-4)
    moved = one_step("lora_plus", b_rate=4.0)
    assert moved[".b"][0] / moved[".b"][1] == pytest.approx(0.4, rel=1e-4)


@pytest.mark.acid("lora_plus", 2)
def test_at_a_ratio_of_one_it_is_lora_to_the_bit() -> None:
    assert one_step("lora_plus", b_rate=1.0) == one_step("lora")
    assert attach(tiny("bert"), "lora").groups() == []


def test_beside_another_lora_each_keeps_its_own_ratio() -> None:
    tuned = attach(tiny("bert"), "lora_plus", rank=3)
    tuned.add(method("lora", {"rank": 2, "b_rate": 2.0, "sites": "ffn.up"}), name="other", train_head=False)
    paces = {n: g.lr_factor for g in tuned.groups() for n in g.names}
    assert {n.partition(":")[0]: pace for n, pace in paces.items()} == {"default": 16.0, "other": 2.0}
    assert set(paces) == {n for n in tuned.trained() if n.endswith(".b")}


# --- linear_probe


@pytest.mark.acid("linear_probe", 2)
def test_the_probe_is_head_only_to_the_bit_and_no_state_of_the_trunk_has_a_graph() -> None:
    found = []
    for name in ("head_only", "linear_probe"):
        tuned = attach(tiny("bert", "classification"), name)
        out = tuned.model(**inputs(tuned.model), output_hidden_states=True)
        assert all(state.grad_fn is None for state in out.hidden_states)
        out.loss.backward()
        found.append({n: p.grad.clone() for n, p in tuned.trained().items()})
    assert found[0].keys() == found[1].keys() == {"head/classifier.weight", "head/classifier.bias"}
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


@pytest.mark.acid("linear_probe", 3)
def test_of_the_probe_nothing_is_drawn_but_its_head() -> None:
    found = []
    for seed, start in ((0, 1), (5, 1), (0, 2)):
        tuned = attach(tiny("bert", "classification"), "linear_probe", seed=seed)
        draw = torch.Generator().manual_seed(start)
        with torch.no_grad():
            for p in tuned.trained().values():
                p.copy_(0.1 * torch.randn(p.shape, generator=draw))
        tuned.model.luthier.train()
        for _ in range(2):
            tuned.model(**inputs(tuned.model)).loss.backward()
            for p in tuned.trained().values():
                p.data -= 0.1 * p.grad
        found.append({n: p.detach().clone() for n, p in tuned.trained().items()})
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    assert not any(torch.equal(found[0][n], found[2][n]) for n in found[0])


# --- p_tuning_v2


def test_prefixes_are_trained_as_they_are_and_stored_as_they_are_trained() -> None:
    made = METHODS.get("p_tuning_v2")(length=4)
    tuned = attach(tiny("bert", "classification"), made)
    assert tuned.n_trained() == made.n_stored(tuned.anatomy) == 2 * 3 * 4 * 48
    assert not any("network" in n for n in tuned.trained())
    tuned.model(**inputs(tuned.model)).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in tuned.trained().values())


@pytest.mark.acid("p_tuning_v2", 1, 2)
def test_with_the_same_rows_it_is_prefix_tuning_without_a_network() -> None:
    found = []
    for words, settings in (("prefix_tuning", {"mlp_width": 0}), ("p_tuning_v2", {})):
        tuned = attach(tiny("llama"), words, length=4, **settings)
        draw = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for rows in tuned.trained().values():
                rows.copy_(torch.randn(rows.shape, generator=draw))
        found.append(logits(tuned.model))
    assert torch.equal(*found)
    base = logits(tiny("llama"))
    assert (found[0] - base).abs().max() > 1e-3
    torch.testing.assert_close(logits(attach(tiny("llama"), "p_tuning_v2", length=0).model), base, rtol=1e-5, atol=1e-5)


@pytest.mark.acid("p_tuning_v2", 5)
def test_a_head_for_every_token_sees_the_tokens_of_the_text_alone() -> None:
    tuned = attach(tiny("bert", "tokens"), "p_tuning_v2", length=4)
    batch = inputs(tuned.model)
    assert tuned.model(**batch).logits.shape[:2] == batch["input_ids"].shape
