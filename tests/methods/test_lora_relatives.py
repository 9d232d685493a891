"""SoRA, DyLoRA, Delta-LoRA and Kernel-mix: their own tests, beside those that every method passes."""

from pathlib import Path

import pytest
import torch
from methods.checks import attach_double, logits, stir, train
from tiny import inputs, tiny

from luthier.core import AnatomyError, ConfigError
from luthier.methods.parts.low_rank import Thin, ThinUpdate
from luthier.surgery import attach, load


def update(module: Thin, d_out: int, d_in: int) -> torch.Tensor:
    """What it adds to the weight, (d_out, d_in)."""
    return module.merged(torch.zeros(d_out, d_in, dtype=module.b.dtype), None)[0].detach()


# --- sora


@pytest.mark.acid("sora", 2)
def test_the_proximal_step_has_its_closed_form_and_a_gate_at_the_threshold_closes() -> None:
    module = next(iter(attach(tiny("bert"), "sora", rank=5).modules(ThinUpdate).values()))
    with torch.no_grad():
        module.g.copy_(torch.tensor([1.0, -0.5, 0.25, -0.25, 0.1]))
    module.shrink(0.25)
    assert module.g.tolist() == [0.75, -0.25, 0.0, 0.0, 0.0]


def closed(threshold: float, folder: Path | None = None) -> int:
    tuned = attach(tiny("bert"), "sora", rank=6, threshold=threshold)
    train(tuned, 8, lr=1e-2)
    modules = list(tuned.modules(ThinUpdate).values())
    found = sum(int((m.g == 0).sum()) for m in modules)
    if folder is not None:
        before = logits(tuned.model)
        tuned.finish()
        assert sum(len(m.g) for m in modules) == 6 * 6 - found
        torch.testing.assert_close(logits(tuned.model), before, rtol=0, atol=1e-6)
        tuned.save(folder)
        other = tiny("bert")
        load(other, folder)
        assert torch.equal(logits(other), logits(tuned.model))
    return found


@pytest.mark.acid("sora", 1, 3, 4)
def test_gates_close_exactly_more_of_them_at_a_larger_threshold_and_leave_with_their_parts(tmp_path: Path) -> None:
    found = [closed(0.0), closed(0.05), closed(0.1, tmp_path / "tuning")]
    assert 0 == found[0] < found[1] < found[2] < 36


@pytest.mark.acid("sora", 1)
def test_without_the_step_a_penalty_closes_no_gate() -> None:
    tuned = attach(tiny("bert"), "sora", rank=6, threshold=0.0, train_head=False)
    tuned.calls_hooks = True
    gates = [m.g for m in tuned.modules(ThinUpdate).values()]
    optimiser = torch.optim.Adam(gates, lr=0.1)
    for _ in range(30):
        optimiser.zero_grad()
        sum(g.abs().sum() for g in gates).backward()
        optimiser.step()
    assert all(bool((g != 0).all()) for g in gates)


# --- dylora


@pytest.mark.acid("dylora", 1)
@pytest.mark.parametrize("r", [1, 2, 4])
def test_cut_to_a_width_it_is_the_lora_of_the_stored_prefix_to_the_bit(r: int) -> None:
    tuned = attach(tiny("bert"), "dylora", rank=4, alpha=8.0, use=r, train_head=False)
    lora = attach(tiny("bert"), "lora", rank=r, alpha=8.0, train_head=False)
    stir(tuned, 0.1)
    for key, module in tuned.modules(ThinUpdate).items():
        other = lora.modules()[key]
        with torch.no_grad():
            other.a.copy_(module.a[:r])
            other.b.copy_(module.b[:, :r] * (8.0 / r) / other.scale)
    torch.testing.assert_close(logits(tuned.model), logits(lora.model), rtol=0, atol=1e-6)
    module, other = (next(iter(t.modules(ThinUpdate).values())) for t in (tuned, lora))
    assert torch.equal(update(module, 48, 48), (module.b[:, :r] * (8.0 / r) @ module.a[:r]).detach())


@pytest.mark.acid("dylora", 2)
def test_with_only_the_last_a_step_moves_one_row_and_one_column() -> None:
    tuned = attach(tiny("bert"), "dylora", rank=4, only_last=True)
    method, tuned.calls_hooks = tuned.tuning().method, True
    stir(tuned, 0.1)
    optimiser = torch.optim.AdamW(tuned.trained().values(), lr=0.1, weight_decay=0.1)
    for step in (1, 2, 3):
        before = {k: (m.a.detach().clone(), m.b.detach().clone()) for k, m in tuned.modules(ThinUpdate).items()}
        torch.manual_seed(step)
        method.before_step(tuned, step, 3)
        tuned.model.luthier.train()
        tuned.model(**inputs(tuned.model)).loss.backward()
        optimiser.step()
        method.on_step(tuned, step, 3)
        optimiser.zero_grad()
        for key, module in tuned.modules(ThinUpdate).items():
            a, b = before[key]
            rows = (module.a != a).any(1).nonzero().flatten().tolist()
            columns = (module.b != b).any(0).nonzero().flatten().tolist()
            assert rows == columns == [module.drawn - 1]


def losses_when_cut(name: str, rank: int = 4) -> list[float]:
    """After some training on two batches, the loss with each prefix of the update's parts alone."""
    tuned = attach(tiny("bert", "classification"), name, rank=rank, alpha=4.0)
    train(tuned, 40, lr=2e-2, decay=0.0)
    found = []
    whole = {k: m.b.detach().clone() for k, m in tuned.modules(ThinUpdate).items()}
    for r in range(1, rank + 1):
        for key, module in tuned.modules(ThinUpdate).items():
            with torch.no_grad():
                module.b.copy_(whole[key] * (rank / r))  # the scale is alpha / the width
                module.b[:, r:] = 0
        with torch.no_grad():
            found.append(sum(float(tuned.model(**inputs(tuned.model, seed=seed)).loss) for seed in (0, 1)))
    return found


def test_trained_for_every_width_it_is_better_cut_than_lora_is() -> None:
    ours, plain = losses_when_cut("dylora"), losses_when_cut("lora")
    assert ours[0] < 0.5 * plain[0] and sum(ours) < sum(plain)


@pytest.mark.acid("dylora", 4)
def test_every_width_is_drawn_about_equally_often_and_all_sites_have_the_same() -> None:
    tuned = attach(tiny("bert"), "dylora", rank=5, smallest=2)
    modules = list(tuned.modules(ThinUpdate).values())
    drawn = []
    for step in range(400):
        torch.manual_seed(step)
        tuned.tuning().method.before_step(tuned, step, 400)
        assert len({m.drawn for m in modules}) == 1
        drawn.append(modules[0].drawn)
    counts = torch.tensor([drawn.count(r) for r in range(2, 6)]).double()
    assert float(((counts - 100) ** 2 / 100).sum()) < 16.3  # chi squared of 3 degrees, 0.1 %
    with pytest.raises(ConfigError, match=r"dylora.use: 9 is above the rank 5"):
        attach(tiny("bert"), "dylora", rank=5, use=9)


# --- delta_lora


def weights_by_the_paper(steps: int, wait: int, share: float) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Delta-LoRA as the paper has it, W moved in place by plain descent, and ours: the tuned weights of both."""
    results = []
    for paper in (True, False):
        name = "lora" if paper else "delta_lora"
        more = {} if paper else {"wait": wait, "share": share}
        tuned = attach_double("bert", name, rank=3, alpha=6.0, train_head=False, **more)
        tuned.calls_hooks = True
        modules = tuned.modules(ThinUpdate)
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for module in modules.values():
                module.a.copy_(torch.randn(module.a.shape, generator=draw))
        weights = {k: tuned.model.get_submodule(s.path).base.weight for k in modules for s in tuned.anatomy.all_sites
                   if s.key == k}  # fmt: skip
        optimiser = torch.optim.SGD(tuned.trained().values(), lr=0.5)
        tuned.model.eval()
        for step in range(1, steps + 1):
            tuned.model(**inputs(tuned.model)).loss.backward()
            assert all(w.grad is None for w in weights.values())
            old = {k: update(m, 48, 48) for k, m in modules.items()}
            optimiser.step()
            optimiser.zero_grad()
            if paper and step > wait:
                with torch.no_grad():
                    for key, module in modules.items():
                        weights[key].add_(share * (update(module, 48, 48) - old[key]))
            tuned.tuning().method.on_step(tuned, step, steps)
        results.append([weights[k].detach() + update(m, 48, 48) for k, m in modules.items()])
    return results[0], results[1]


@pytest.mark.acid("delta_lora", 1)
@pytest.mark.parametrize("wait", [1, 3])
def test_the_telescoped_pair_is_the_weight_moved_step_by_step(wait: int) -> None:
    paper, ours = weights_by_the_paper(6, wait, 2.0)
    for theirs, mine in zip(paper, ours, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.acid("delta_lora", 2, 3, 4, 5)
def test_the_weight_stays_the_change_has_twice_the_rank_and_with_no_share_it_is_lora() -> None:
    tuned = attach(tiny("bert"), "delta_lora", rank=3, wait=2)
    base = {n: p.detach().clone() for n, p in tuned.model.named_parameters() if not p.requires_grad}
    train(tuned, 2)
    assert all(float(m.begun) == 1 for m in tuned.modules(ThinUpdate).values())
    train(tuned, 3, seed=1)
    now = dict(tuned.model.named_parameters())
    assert all(torch.equal(now[n], p) and now[n].grad is None for n, p in base.items())
    in_optimiser = {id(p) for p in tuned.trained().values()}
    assert not any(id(now[n]) in in_optimiser for n in base)
    for module in tuned.modules(ThinUpdate).values():
        assert torch.linalg.matrix_rank(update(module, 48, 48)) <= 6
    found = []
    for name, more in (("lora", {}), ("delta_lora", {"share": 0.0, "wait": 1})):
        tuned = attach(tiny("bert"), name, rank=3, **more)
        train(tuned, 3)
        found.append(logits(tuned.model))
    assert torch.equal(*found)


# --- kernel_mix


@pytest.mark.acid("kernel_mix", 1)
def test_a_head_s_own_factors_change_its_own_outputs_and_of_o_its_own_inputs() -> None:
    tuned = attach_double("llama", "kernel_mix", sites=("attn.q", "attn.v", "attn.o"), shared=0, own=2)
    stir(tuned, 0.3)
    for key, heads in (("attn.q@0", 4), ("attn.v@0", 2), ("attn.o@0", 4)):
        module = tuned.modules()[key]
        d_out, d_in = (24 if "v" in key else 48), 48
        assert len(module.own_a) == heads
        before = update(module, d_out, d_in)
        with torch.no_grad():
            (module.own_a if "o@" in key else module.own_b)[1].mul_(2.0)
        changed = (update(module, d_out, d_in) != before).any(0 if "o@" in key else 1).nonzero().flatten()
        assert changed.tolist() == list(range(12, 24)), key


@pytest.mark.acid("kernel_mix", 2, 3)
def test_without_own_parts_it_is_lora_and_with_them_its_rank_is_above_what_lora_reaches() -> None:
    alone = attach(tiny("bert"), "kernel_mix", shared=3, own=0).modules()["attn.q@0"]
    lora = attach(tiny("bert"), "lora", rank=3, alpha=3.0).modules()["attn.q@0"]
    with torch.no_grad():
        alone.b.normal_()
        lora.a.copy_(alone.a)
        lora.b.copy_(alone.b)
    assert torch.equal(update(alone, 48, 48), update(lora, 48, 48))
    tuned = attach_double("bert", "kernel_mix", shared=2, own=1)
    stir(tuned, 0.3)
    module = tuned.modules()["attn.q@0"]
    assert torch.linalg.matrix_rank(update(module, 48, 48)) == 2 + 4
    assert sum(p.numel() for p in module.parameters()) < 6 * 96
    with pytest.raises(AnatomyError, match=r"ffn.up@0 is no projection of an attention"):
        attach(tiny("bert"), "kernel_mix", sites=("ffn.up",))
    with pytest.raises(ConfigError, match="shared and own are both 0"):
        attach(tiny("bert"), "kernel_mix", shared=0, own=0)
