"""AdaMSS: what peft computes of the same numbers, its groups, and that they are kept."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import pytest
import torch
from little import little_spec
from methods.checks import attach_double, counted, logits, stir, train
from tiny import inputs, tiny
from torch.testing import assert_close

from luthier import kernels
from luthier import train as run
from luthier.core import CannotMerge, ConfigError
from luthier.methods.parts.masks import top_k as adamss_top_k
from luthier.methods.reparameterised.subspace import adamss
from luthier.methods.reparameterised.subspace.adamss import Grouped, grouped, leading
from luthier.surgery import attach, load, to_peft
from luthier.workflow import resume
from luthier.workflow.resume_proof import run_digests

SIZES = {"directions": 12, "subspaces": 4, "rank": 3}
pytestmark = pytest.mark.filterwarnings("ignore")  # peft speaks of many things


@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_peft_computes_the_same_of_the_same_numbers(arch: str) -> None:
    tuned = attach(tiny(arch), "adamss", sites=("attn.v", "ffn.up"), train_head=False, **SIZES)
    names = ["v_proj", "up_proj"] if arch == "llama" else ["value", "intermediate.dense"]
    config = peft.AdamssConfig(r=12, num_subspaces=4, subspace_rank=3, target_modules=names)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(tiny(arch), config).eval()
    layers = dict(theirs.base_model.model.named_modules())
    paths = {site.key: site.path for site in tuned.anatomy.all_sites}
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
        for key, mine in tuned.modules(Grouped).items():
            other = layers[paths[key]]
            whole = other.adamss_newB["default"]
            mine.v.copy_(whole[:, : mine.v.shape[1]])
            assert (mine.shift is None) == (whole.shape[1] == mine.v.shape[1])
            if mine.shift is not None:
                mine.shift.copy_(whole[:, -1])
            mine.a.zero_()
            mine.b.zero_()
            for k, rows in other.seg_result["default"].items():
                a, b = other.adamss_A["default"][k], other.adamss_B["default"][k]
                mine.group[rows] = k
                mine.a[k, : len(a)] = a
                mine.b[rows, : len(a)] = b
    batch = inputs(tuned.model)
    wanted = logits(theirs, batch)
    assert_close(logits(tuned.model, batch), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(tiny(arch), batch), wanted, atol=1e-2)
    tuned.merging.fold()
    assert_close(logits(tuned.model, batch), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_fused_plain_and_still_agree(arch: str) -> None:
    results = []
    for plain in (False, True):
        tuned = attach_double(arch, "adamss", sites=("attn.q", "ffn.up"), **SIZES)
        stir(tuned, 0.1)
        with kernels.plain(plain):
            out = tuned.model.eval()(**inputs(tuned.model))
            out.loss.backward()
        results.append([out.logits, *(p.grad for p in tuned.trained().values())])
    for fast, slow in zip(*results, strict=True):
        assert_close(fast, slow, rtol=1e-9, atol=1e-11)
    with tuned.serving():
        assert_close(logits(tuned.model), results[0][0].detach())


def test_rows_that_lie_together_are_one_group_and_none_is_empty() -> None:
    draw = torch.Generator().manual_seed(0)
    centres = 9 * torch.eye(4)
    belongs = torch.arange(40) % 4
    rows = centres[belongs] + 0.1 * torch.randn(40, 4, generator=draw)
    found = [grouped(rows, 4) for _ in range(20)]
    parts = [[rows[group == k] for k in range(4)] for group in found]
    spread = [sum(float((part - part.mean(0)).square().sum()) for part in each) for each in parts]
    best = found[min(range(20), key=spread.__getitem__)]
    assert all(len(best[belongs == k].unique()) == 1 for k in range(4))
    assert all(len(group.unique()) == 4 for group in found)
    assert len(grouped(torch.ones(6, 3), 5).unique()) == 5  # rows that are all alike


def test_each_group_begins_at_the_directions_of_its_own_rows() -> None:
    tuned = attach(tiny("llama"), "adamss", sites=("ffn.up@0",), **SIZES)
    (module,) = tuned.modules(Grouped).values()
    weight = tuned.tensor("model.layers.0.mlp.up_proj.weight").detach()
    bias = tuned.tensor("model.layers.0.mlp.up_proj.bias").detach()
    u = torch.linalg.svd(torch.cat([weight, bias[:, None]], 1), full_matrices=False).U[:, :12]
    for k in range(4):
        rows = u[module.group == k]
        n = min(3, len(rows))
        held = torch.linalg.matrix_norm(rows @ module.a[k, :n].detach().T)
        assert_close(held, torch.linalg.svdvals(rows)[:n].norm(), rtol=1e-4, atol=1e-5)


def test_the_groups_are_the_tunings_own_and_not_found_again(tmp_path: Path) -> None:
    tuned = attach(tiny("bert"), "adamss", **SIZES)
    stir(tuned, 0.2)
    tuned.save(tmp_path / "tuning")
    again = tiny("bert")

    def other(rows: Any, groups: int) -> Any:
        return torch.arange(len(rows)) % groups

    with patch.object(adamss, "grouped", other):
        held = load(again, tmp_path / "tuning")
    assert torch.equal(logits(again), logits(tuned.model))
    for mine, theirs in zip(tuned.modules(Grouped).values(), held.modules(Grouped).values(), strict=True):
        assert torch.equal(mine.group, theirs.group)


def test_counts_of_bert_base() -> None:
    assert counted("adamss") == 24 * (768 + 5 * 100)
    assert counted("adamss", rank=3, subspaces=10) == 24 * 3 * (768 + 10 * 100)


def test_sizes_that_do_not_fit_and_files_of_peft_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adamss\.directions: 100 is above the 48"):
        attach(tiny("bert"), "adamss")
    with pytest.raises(ConfigError, match=r"adamss\.subspaces: 60"):
        attach(tiny("bert"), "adamss", directions=4, subspaces=60)
    with pytest.raises(ConfigError, match="9 of 4 directions"):
        attach(tiny("bert"), "adamss", directions=4, rank=9)
    with pytest.raises(CannotMerge, match="no form in peft's files"):
        to_peft(attach(tiny("bert"), "adamss", **SIZES), tmp_path / "out")


def test_a_group_has_as_many_directions_as_peft_gives_it_by_their_singular_values() -> None:
    config = peft.AdamssConfig(
        r=48, num_subspaces=5, subspace_rank=6, target_modules=["v_proj", "up_proj"], use_dynamic_rank=True,
        svd_threshold=0.55,
    )  # fmt: skip
    theirs = peft.get_peft_model(tiny("llama"), config)
    counts = set()
    for layer in (m for m in theirs.modules() if hasattr(m, "seg_result")):
        base = layer.get_base_layer()
        whole = base.weight if base.bias is None else torch.cat([base.weight, base.bias[:, None]], 1)
        u = torch.linalg.svd(whole.detach(), full_matrices=False).U[:, : min(48, *whole.shape)]
        for k, rows in layer.seg_result["default"].items():
            mine = leading(u[rows], 6, 0.55)
            counts.add(int(mine.any(1).sum()))
            assert int(mine.any(1).sum()) == len(layer.adamss_A["default"][k])
    assert len(counts) > 1


def test_the_importance_of_groups_is_peft_s_and_so_is_who_goes_on() -> None:
    tuned = attach(tiny("llama"), "adamss", sites=("attn.v", "ffn.up"), train_head=False, **SIZES)
    config = peft.AdamssConfig(
        r=12, num_subspaces=4, subspace_rank=3, target_modules=["v_proj", "up_proj"], use_asa=True,
        asa_target_subspaces=7, init_warmup=2, final_warmup=10, mask_interval=4,
    )  # fmt: skip
    theirs = peft.get_peft_model(tiny("llama"), config)
    layers = dict(theirs.base_model.model.named_modules())
    paths = {site.key: site.path for site in tuned.anatomy.all_sites}
    pairs = [(m, layers[paths[key]]) for key, m in tuned.modules(Grouped).items()]
    pairs = [(m, o) for m, o in pairs if min(len(r) for r in o.seg_result["default"].values()) >= 3]
    draw, notes = torch.Generator().manual_seed(3), {}
    with torch.no_grad():
        for mine, other in pairs:
            for k, rows in other.seg_result["default"].items():
                mine.group[rows] = k
                for held in (other.adamss_A["default"][k], other.adamss_B["default"][k]):
                    held.copy_(torch.randn(held.shape, generator=draw))
                mine.a[k] = other.adamss_A["default"][k]
                mine.b[rows] = other.adamss_B["default"][k]
    for step in (2, 3, 4):
        for number, (mine, other) in enumerate(pairs):
            mine.a.grad, mine.b.grad = torch.randn_like(mine.a), torch.randn_like(mine.b)
            for k, rows in other.seg_result["default"].items():
                other.adamss_A["default"][k].grad = mine.a.grad[k].clone()
                other.adamss_B["default"][k].grad = mine.b.grad[rows].clone()
            mine.follow(notes, f"{number}.", 0.85, 0.85)
        theirs.base_model.update_and_allocate(step)
    scores = torch.cat([mine.importance(notes, f"{n}.") for n, (mine, _) in enumerate(pairs)])
    on = torch.tensor([other.adamss_A["default"][k].requires_grad for _, other in pairs for k in range(4)])
    assert 0 < int(on.sum()) < len(on)
    assert scores[on].min() > scores[~on].max()


def test_exactly_so_many_groups_go_on_and_the_others_stay_where_they_are() -> None:
    sizes = {**SIZES, "active": 9, "warmup": 0.1, "settled": 0.4, "every": 2}
    tuned = attach(tiny("llama"), "adamss", sites=("attn.v", "ffn.up"), **sizes)
    (method,) = tuned.tuning().method.parts()
    modules = list(tuned.modules(Grouped).values())
    seen = []
    with patch.object(adamss, "top_k", lambda scores, k: seen.append(k) or adamss_top_k(scores, k)):
        train(tuned, 12, total=20)
    assert [int(m.awake.sum()) for m in modules] != [4] * 6 and sum(int(m.awake.sum()) for m in modules) == 9
    assert seen == [method.budget(step, 20, 24) for step in (2, 4, 6, 8, 10, 12)] and seen[-1] == 9
    before = [(m.a.detach().clone(), m.b.detach().clone()) for m in modules]
    asleep = [~m.awake for m in modules]
    train(tuned, 3, total=20, decay=0.5)
    moved = 0
    for module, (a, b), off in zip(modules, before, asleep, strict=True):
        rows = off[module.group.long()]
        assert torch.equal(module.a[off], a[off]) and torch.equal(module.b[rows], b[rows])
        moved += int(not torch.equal(module.b, b))
    assert moved


@pytest.mark.parametrize("stop", [3, 5])
def test_a_run_stopped_between_or_after_choices_goes_on_to_the_bit(tmp_path: Path, stop: int) -> None:
    sizes = {"directions": 12, "subspaces": 3, "rank": 2, "active": 3, "warmup": 0.1, "settled": 0.4, "every": 2}
    spec = replace(little_spec(tmp_path, "lora"), method="adamss", settings=sizes, steps=8)
    run(replace(spec, out=str(tmp_path / "whole")))
    run(replace(spec, out=str(tmp_path / "cut")), stop_at=stop)
    resume(tmp_path / "cut")
    assert run_digests(tmp_path / "cut") == run_digests(tmp_path / "whole")


def test_settings_by_which_groups_could_not_stop_are_refused() -> None:
    with pytest.raises(ConfigError, match="24 of 24 groups"):
        attach(tiny("bert"), "adamss", **SIZES, active=24)
    with pytest.raises(ConfigError, match="below 1"):
        attach(tiny("bert"), "adamss", **SIZES, active=3, warmup=0.6, settled=0.5)
