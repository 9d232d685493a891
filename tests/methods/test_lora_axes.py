"""What LoRA can be set to, and the methods that are LoRA so set: a frozen A, a start from the weight."""

from pathlib import Path

import peft
import pytest
import torch
from methods.checks import attach_double, logits, stir, train
from tiny import inputs, tiny

from luthier import kernels
from luthier.core import ConfigError
from luthier.kernels import low_rank_linear
from luthier.kernels.codes import FORMATS
from luthier.methods.parts.low_rank import MovedUpdate, ThinUpdate
from luthier.methods.parts.starts import thin_start
from luthier.surgery import attach, from_peft, load, method, to_peft

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# --- lora_fa, l_lora


def kept(d_in: int, train_a: bool, p: float = 0.0) -> int:
    """Numbers that one call keeps for its backward pass, the layer's own aside."""
    a = torch.randn(4, d_in, requires_grad=train_a)
    b = torch.randn(24, 4, requires_grad=True)
    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        low_rank_linear(torch.randn(10, d_in), torch.randn(24, d_in), None, a, b, 1.0, p, 5 if p else None)
    return sum(t.numel() for t in held if t is not a and t is not b)


@pytest.mark.acid("lora_fa", 1)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_with_a_frozen_what_is_kept_does_not_grow_with_the_input(p: float) -> None:
    assert kept(48, False, p) == kept(96, False, p) == 10 * 4
    assert kept(96, True, p) == kept(48, True, p) + 10 * 48


@pytest.mark.acid("lora_fa", 2, 3)
@pytest.mark.acid("l_lora", 2)
@pytest.mark.parametrize("name", ["lora_fa", "l_lora"])
def test_a_stays_as_drawn_has_no_gradient_and_the_update_lies_in_its_rows(name: str) -> None:
    tuned = attach(tiny("llama"), name, rank=3)
    start = {k: m.a.detach().clone() for k, m in tuned.modules(ThinUpdate).items()}
    train(tuned, 4)
    for key, module in tuned.modules(ThinUpdate).items():
        assert module.a.grad is None
        assert torch.equal(module.a, start[key])
        rows = torch.linalg.qr(start[key].T)[0]
        update = module.merged(torch.zeros(len(module.b), 48), None)[0]
        assert update.any()
        torch.testing.assert_close(update @ rows @ rows.T, update, rtol=0, atol=1e-6)
    assert not any(n.endswith(".a") for n in tuned.trained())
    assert tuned.n_trained() == sum(m.b.numel() for m in tuned.modules(ThinUpdate).values())


@pytest.mark.acid("lora_fa", 4)
def test_with_a_frozen_the_moments_are_those_of_b() -> None:
    tuned = attach(tiny("llama"), "lora_fa", rank=3)
    moments = torch.optim.AdamW(tuned.trained().values())
    tuned.model(**inputs(tuned.model)).loss.backward()
    moments.step()
    held = sum(t.numel() for state in moments.state.values() for n, t in state.items() if n != "step")
    assert held == 2 * sum(m.b.numel() for m in tuned.modules(ThinUpdate).values())


@pytest.mark.acid("l_lora", 3)
def test_by_layer_l_lora_is_lora_fa_with_the_same_a() -> None:
    found = []
    for name in ("lora_fa", "l_lora"):
        tuned = attach(tiny("llama"), name, rank=3, alpha=8.0, sites=("attn.q", "attn.v"))
        draw = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for module in tuned.modules(ThinUpdate).values():
                module.a.copy_(torch.randn(module.a.shape, generator=draw))
        found.append((train(tuned, 4), logits(tuned.model)))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("settings", [{"train_a": False, "dropout": 0.25}, {"start": "svd", "dropout": 0.25}])
def test_fused_plain_and_merged_agree_in_float64(settings: dict[str, object]) -> None:
    results = []
    for plain in (False, True):
        tuned = attach_double("gpt2", "lora", rank=3, sites=("attn.o", "attn.q", "ffn.up"), **settings)
        stir(tuned, 0.1)
        tuned.model.luthier.train()
        torch.manual_seed(3)
        with kernels.plain(plain):
            out = tuned.model(**inputs(tuned.model))
            out.loss.backward()
        results.append([out.logits, *(p.grad for p in tuned.trained().values())])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    apart = logits(tuned.model)
    tuned.merging.fold()
    torch.testing.assert_close(logits(tuned.model), apart, rtol=1e-5, atol=1e-6)  # it is computed in fp32


# --- starts


@pytest.mark.acid("pissa", 1)
@pytest.mark.parametrize("start", ["svd", "minor"])
def test_what_is_taken_and_what_is_left_make_up_the_weight(start: str) -> None:
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    a, b = thin_start(weight, 4, start, 0.25)
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(torch.linalg.svdvals(0.25 * b @ a)[:4], values[:4] if start == "svd" else values[-4:])
    left = torch.linalg.svdvals(weight - 0.25 * b @ a)
    wanted = torch.cat([values[4:] if start == "svd" else values[:-4], torch.zeros(4)])
    torch.testing.assert_close(left, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.acid("pissa", 2)
def test_what_svd_leaves_of_a_weight_errs_less_in_codes_than_the_weight_and_what_minor_leaves_does_not() -> None:
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 64, generator=draw))[0] for n in (96, 64))
    weight = left * (0.2 + 4 * 0.7 ** torch.arange(64)) @ right.T  # few directions are large, as in trained layers
    errors = {"alone": coded_error(weight, torch.zeros_like(weight))}
    for start in ("svd", "minor"):
        a, b = thin_start(weight, 8, start, 0.5)
        errors[start] = coded_error(weight, 0.5 * b @ a)
    assert errors["svd"] < 0.5 * errors["alone"]
    assert errors["minor"] > 0.9 * errors["alone"]


def coded_error(weight: torch.Tensor, taken: torch.Tensor) -> float:
    """How far the codes of what is left, and what was taken, lie from the weight."""
    coded = FORMATS["nf4"]
    left = coded.decode(coded.encode(weight - taken), tuple(weight.shape))
    return float(torch.linalg.matrix_norm(left + taken - weight))


def test_random_projections_find_the_same_part_as_an_exact_decomposition() -> None:
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 24, generator=draw))[0] for n in (1040, 1030))
    weight = left * 0.7 ** torch.arange(24) @ right.T + 1e-4 * torch.randn(1040, 1030, generator=draw)
    torch.manual_seed(1)
    a, b = thin_start(weight, 8, "svd", 2.0)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(2.0 * b @ a, u[:, :8] * s[:8] @ vt[:8], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "theirs"), [("pissa", "pissa"), ("olora", "olora")])
def test_it_starts_where_peft_starts_and_takes_the_same_first_step(name: str, theirs: str) -> None:
    tuned = attach(tiny("llama"), name, rank=3, alpha=7.0, sites=("attn.k", "ffn.down"), train_head=False)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["k_proj", "down_proj"], init_lora_weights=theirs)
    other = peft.get_peft_model(tiny("llama"), config)
    batch = inputs(tuned.model)
    layers = dict(other.base_model.model.named_modules())
    paths = {s.key: s.path for s in tuned.anatomy.all_sites}
    pairs = [(m, layers[paths[k]]) for k, m in tuned.modules(MovedUpdate).items()]
    for mine, layer in pairs:  # singular vectors are found up to their sign
        their_product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(mine.b @ mine.a, their_product, rtol=1e-4, atol=1e-5)
    ours, found = tuned.model.eval()(**batch), other.eval()(**batch)
    torch.testing.assert_close(ours.logits, found.logits, rtol=1e-5, atol=1e-5)
    ours.loss.backward()
    found.loss.backward()
    for mine, layer in pairs:
        theirs_a, theirs_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        sign = torch.sign((mine.b.detach() * theirs_b.detach()).sum(0))
        torch.testing.assert_close(mine.a.grad, theirs_a.grad * sign[:, None], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(mine.b.grad, theirs_b.grad * sign, rtol=1e-3, atol=1e-5)


@pytest.mark.acid("pissa", 3)
@pytest.mark.parametrize("settings", [{}, {"scaling": "root"}, {"rank": "4, attn.q@0: 5", "train_a": False}])
def test_it_is_a_lora_of_twice_the_rank_for_peft(settings: dict[str, object], tmp_path: Path) -> None:
    tuned = attach(tiny("llama"), method("pissa", {"rank": 3, **settings}))
    stir(tuned, 0.05)
    to_peft(tuned, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "out")).eval()
    batch = inputs(tuned.model)
    torch.testing.assert_close(logits(theirs, batch), logits(tuned.model, batch), rtol=1e-5, atol=1e-5)
    again = tiny("llama")
    back = from_peft(again, tmp_path / "out")
    assert {len(m.a) for m in back.modules(ThinUpdate).values()} <= {6, 8, 10}
    torch.testing.assert_close(logits(again, batch), logits(tuned.model, batch), rtol=1e-5, atol=1e-5)


def test_all_axes_go_together_and_are_saved(tmp_path: Path) -> None:
    made = method("lora", {"rank": 3, "scaling": "root", "start": "qr", "b_rate": 4.0, "dropout": 0.1})
    tuned = attach(tiny("bert"), made)
    train(tuned, 3)
    tuned.save(tmp_path / "tuning")
    other = tiny("bert")
    load(other, tmp_path / "tuning")
    assert torch.equal(logits(other), logits(tuned.model))


def test_a_rank_that_the_weight_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"pissa.rank: 60 is above the 48 that the weight of attn.q@0 has"):
        attach(tiny("bert"), "pissa", rank=60)
    attach(tiny("bert"), "lora", rank=60)
