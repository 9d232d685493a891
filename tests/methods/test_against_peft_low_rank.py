"""LoRA, DoRA, IA3 and AdaLoRA against the peft library: the same weights copied in, the same outputs and gradients."""

import peft
import pytest
import torch
from methods.checks import stir
from peft.tuners.adalora.layer import RankAllocator
from tiny import inputs, tiny

from luthier.methods.reparameterised.adalora import AdaLoRA, Triplets
from luthier.surgery import attach

# peft asks transformers a question by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# model -> (our sites, what peft calls their layers)
PLACES = {
    "bert": (("attn.q", "attn.v", "ffn.up"), ["query", "value", "intermediate.dense"]),
    "llama": (("attn.k", "ffn.down", "ffn.gate"), ["k_proj", "down_proj", "gate_proj"]),
    "t5": (("attn.q", "ffn.down"), ["SelfAttention.q", "wo"]),
}


def _pair(name, method, config, **settings):
    """Our tuning and peft's, and for each of our modules peft's layer."""
    tuned = attach(tiny(name), method, sites=PLACES[name][0], train_head=False, **settings)
    other = peft.get_peft_model(tiny(name), config)
    layers = dict(other.base_model.model.named_modules())
    paths = {s.key: s.path for s in tuned.anatomy.sites(*PLACES[name][0])}
    return tuned, other, {k: (m, layers[paths[k]]) for k, m in tuned.modules().items()}


def _same_outputs(tuned, other):
    batch = inputs(tuned.model)
    ours, theirs = tuned.model.eval()(**batch), other.eval()(**batch)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)
    ours.loss.backward()
    theirs.loss.backward()


def _same(mine, theirs):
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", list(PLACES))
@torch.no_grad()
def test_lora_and_dora(name, dora):
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=PLACES[name][1], use_dora=dora)
    tuned, other, pairs = _pair(name, "dora" if dora else "lora", config, rank=3, alpha=7.0)
    stir(tuned, 0.05)
    for mine, layer in pairs.values():
        layer.lora_A["default"].weight.copy_(mine.a)
        layer.lora_B["default"].weight.copy_(mine.b)
        if dora:
            layer.lora_magnitude_vector["default"].weight.copy_(mine.magnitude)
    with torch.enable_grad():
        _same_outputs(tuned, other)
    for mine, layer in pairs.values():
        _same(mine.a.grad, layer.lora_A["default"].weight.grad)
        _same(mine.b.grad, layer.lora_B["default"].weight.grad)
        if dora:
            _same(mine.magnitude.grad, layer.lora_magnitude_vector["default"].weight.grad)
    tuned.merging.fold()
    weights = dict(other.merge_and_unload().named_parameters())
    for key in pairs:
        path = next(s.path for s in tuned.anatomy.all_sites if s.key == key)
        _same(tuned.model.get_submodule(path).weight, weights[f"{path}.weight"])


@pytest.mark.parametrize(
    ("name", "targets", "feedforward"),
    [
        # "output.dense" alone would match the attention output too, and train L (3 d + m) numbers.
        ("bert", r".*(key|value|layer\.\d+\.output\.dense)", r".*layer\.\d+\.output\.dense"),
        ("llama", ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    ],
)
@torch.no_grad()
def test_ia3(name, targets, feedforward):
    tuned = attach(tiny(name), "ia3", train_head=False)
    other = peft.get_peft_model(tiny(name), peft.IA3Config(target_modules=targets, feedforward_modules=feedforward))
    assert other.get_nb_trainable_parameters()[0] == tuned.n_trained()
    stir(tuned)
    layers = dict(other.base_model.model.named_modules())
    paths = {s.key: s.path for s in tuned.anatomy.all_sites}
    for key, mine in tuned.modules().items():
        held = layers[paths[key]].ia3_l["default"]
        held.copy_(mine.scale.view_as(held))
    with torch.enable_grad():
        _same_outputs(tuned, other)
    for key, mine in tuned.modules().items():
        _same(mine.scale.grad, layers[paths[key]].ia3_l["default"].grad.flatten())


@pytest.mark.parametrize("name", ["bert", "llama"])
@torch.no_grad()
def test_adalora_update_penalty_and_importance(name):
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=8, target_modules=PLACES[name][1], total_step=100, tinit=10, tfinal=40,
        deltaT=10, orth_reg_weight=0.3,
    )  # fmt: skip
    method = AdaLoRA(sites=PLACES[name][0], rank=4, target_rank=2, alpha=8.0, orthogonality=0.3)
    tuned = attach(tiny(name), method, train_head=False)
    other = peft.get_peft_model(tiny(name), config)
    stir(tuned, 0.1)
    layers = dict(other.base_model.model.named_modules())
    paths = {s.key: s.path for s in tuned.anatomy.all_sites}
    pairs = [(mine, layers[paths[key]]) for key, mine in tuned.modules(Triplets).items()]
    for mine, layer in pairs:
        layer.lora_A["default"].copy_(mine.q)
        layer.lora_E["default"].copy_(mine.l[:, None])
        layer.lora_B["default"].copy_(mine.p)
    batch = inputs(tuned.model)
    with torch.enable_grad():
        ours, theirs = tuned.model.eval()(**batch), other.eval().base_model(**batch)
        penalised = ours.loss + method.extra_loss(tuned)
        penalised.backward()
        theirs.loss.backward()
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(penalised, theirs.loss, rtol=1e-5, atol=1e-5)

    allocator = RankAllocator(other.base_model.model, config, "default")
    for _ in range(3):
        allocator.update_ipt(other.base_model.model)
        method.after_backward(tuned, 5, 100)
        for mine, _layer in pairs:
            mine.remember(method.beta1, method.beta2)
    for key, mine in tuned.modules(Triplets).items():
        for short, name_ in (("q", "lora_A"), ("l", "lora_E"), ("p", "lora_B")):
            full = f"{paths[key]}.{name_}.default"
            theirs_e = allocator._element_score(full)
            ours_e = mine.get_buffer(f"mean_{short}") * mine.get_buffer(f"spread_{short}")
            torch.testing.assert_close(ours_e, theirs_e.view_as(ours_e), rtol=1e-3, atol=1e-9)

    # peft cuts at the k-th smallest score and drops all that tie with it. Without ties it keeps the same triplets.
    budget = 5
    allocator.mask_to_budget(other.base_model.model, budget)
    for mine, mask in zip((m for m, _ in pairs), _top(pairs, budget), strict=True):
        mine.keep.copy_(mask)
        mine.prune()
    for mine, layer in pairs:
        assert torch.equal(mine.l != 0, layer.lora_E["default"].flatten() != 0)
    for step in (5, 10, 20, 35, 50, 90):
        theirs_b = allocator.budget_schedule(step)[0]  # rounds down, where we round to the nearest
        assert abs(method.budget(step, 100, 4 * len(pairs), 2 * len(pairs)) - theirs_b) <= 1


def _top(pairs, budget):
    scores = torch.cat([m.importance() for m, _ in pairs])
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[scores.argsort(descending=True)[:budget]] = True
    return chosen.split([len(m.l) for m, _ in pairs])


def test_tied_scores_empty_peft_and_not_us():
    config = peft.AdaLoraConfig(init_r=4, target_r=2, target_modules=["query"], total_step=10)
    other = peft.get_peft_model(tiny("bert"), config)
    allocator = RankAllocator(other.base_model.model, config, "default")
    for parameter in other.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_E" in name:
                parameter.fill_(1.0)
    allocator.update_ipt(other.base_model.model)
    allocator.mask_to_budget(other.base_model.model, 6)
    left = sum(int((p != 0).sum()) for n, p in other.named_parameters() if "lora_E" in n)
    assert left == 0, "peft prunes the whole tie; ours keeps the budget (test_adalora)"
