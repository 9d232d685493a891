"""Merging: computed in fp32, cast once, all or nothing, and never a silent no-op."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from cells import Trainer, shake
from kinds import KINDS, logits, make, prepared
from tiny import inputs, tiny

from luthier.anatomy import Site
from luthier.core import CannotMerge
from luthier.surgery import Attachment, PerSite, attach
from luthier.surgery.base import Base

MERGEABLE = ["lora", "ia3", "bitfit", "child_tuning_d", "intrinsic_said", "lora+ia3", "intrinsic_said+lora"]


def trained(words: str, arch: str = "bert", dtype: torch.dtype = torch.float32) -> Any:
    model = tiny(arch, "classification").to(dtype)
    batch = inputs(model)
    tuned = attach(model, make(words) if words in KINDS else words)
    prepared(tuned, batch)
    shake(tuned)
    model.eval()
    return tuned, model, batch


@pytest.mark.parametrize("words", MERGEABLE)
def test_a_hundred_folds_and_unfolds_change_no_bit(words: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tuned, model, batch = trained(words, dtype=dtype)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        apart = logits(model, batch)
        for _ in range(100 if words == "lora" else 5):
            tuned.merging.fold()
            tuned.merging.unfold()
        after = model.state_dict()
        assert all(torch.equal(after[n], t) for n, t in before.items())
        assert torch.equal(logits(model, batch), apart)


@pytest.mark.parametrize("arch", ["bert", "gpt2", "llama"])
def test_a_bf16_merge_is_nearer_than_one_done_in_bf16(arch: str) -> None:
    ours = naive = 0.0
    for seed in range(6):
        model = tiny(arch, "classification", seed=seed).to(torch.bfloat16)
        batch = inputs(model, seed=seed)
        tuned = attach(model, "lora", rank=4, seed=seed)
        shake(tuned)
        sites = {s.key: s for s in tuned.anatomy.sites("attn.q", "attn.v")}
        modules = dict(model.named_modules())
        low, high = [], []
        for key, site in sites.items():
            thin = tuned.modules()[key].requires_grad_(False)
            weight = Base(modules[site.path], site).weight()
            exact = weight.double() + thin.b.double() @ thin.a.double() * thin.scale
            update = (thin.b.bfloat16() @ thin.a.bfloat16()) * thin.scale
            low.append(float((weight + update).double().sub(exact).square().sum()))
            high.append((site, exact))
        apart = logits(model, batch).float()
        merged = tuned.merge(check={k: v for k, v in batch.items() if k != "labels"}, tolerance=1.0)
        held = dict(merged.named_modules())
        naive += sum(low)
        ours += sum(float(Base(held[s.path], s).weight().double().sub(e).square().sum()) for s, e in high)
        assert float((logits(merged, batch).float() - apart).abs().max()) < 0.1
        assert all(p.dtype == torch.bfloat16 for p in merged.parameters())
    assert ours < naive


@pytest.mark.parametrize("arch", ["gpt2", "qwen2"])
def test_a_head_tied_to_the_embedding_is_not_merged(arch: str) -> None:
    model = tiny(arch, "lm", tie_word_embeddings=True)
    tuned = attach(model, "lora", sites=("head",), rank=2)
    shake(tuned)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(CannotMerge, match=r"head: its weight is another layer's too"):
        tuned.merge()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_an_untied_head_is_merged() -> None:
    model = tiny("llama", "lm")
    batch = inputs(model)
    tuned = attach(model, "lora", sites=("head",), rank=2)
    shake(tuned)
    apart = logits(model, batch)
    torch.testing.assert_close(logits(tuned.merge(), batch), apart, atol=1e-5, rtol=1e-5)


@pytest.mark.fault("F63", "all or nothing")
def test_numbers_that_are_not_finite_are_not_merged() -> None:
    tuned, model, _ = trained("lora")
    with torch.no_grad():
        tuned.modules()["attn.v@2"].b[0, 0] = float("nan")
    before = {n: t.clone() for n, t in model.named_parameters()}
    with pytest.raises(CannotMerge, match=r"attn.v@2: the merged weight is not finite"):
        tuned.merge()
    assert all(torch.equal(p.nan_to_num(), before[n].nan_to_num()) for n, p in model.named_parameters())


def test_the_part_that_cannot_be_merged_is_named() -> None:
    tuned, model, batch = trained("lora+prompt_tuning")
    before = logits(model, batch)
    with pytest.raises(CannotMerge, match=r"^prompt_tuning cannot be merged"):
        tuned.merge()
    assert torch.equal(logits(model, batch), before)


def test_a_merge_that_would_change_nothing_is_refused() -> None:
    model = tiny("bert", "classification")
    tuned = attach(model, "lora")
    with pytest.raises(CannotMerge, match="equal the base's: the tunings are untrained"):
        tuned.merge()
    small = tiny("bert", "classification").to(torch.bfloat16)
    tuned = attach(small, "lora", rank=2, train_head=False)
    with torch.no_grad():
        for p in tuned.trained().values():
            p.fill_(1e-5)
    with pytest.raises(CannotMerge, match="lost in the rounding"):
        tuned.merge()
    assert tuned.modules()["attn.q@0"] is not None


@pytest.mark.fault("F63", "all or nothing")
def test_the_merged_model_is_compared_where_a_batch_is_given() -> None:
    tuned, model, batch = trained("lora")
    given = {k: v for k, v in batch.items() if k != "labels"}
    apart = logits(model, batch)
    model.train()
    with pytest.raises(CannotMerge, match="above the tolerance of 0"):
        tuned.merge(check=given, tolerance=0.0)
    assert model.training and tuned.tunings  # as it was
    model.eval()
    assert torch.equal(logits(model, batch), apart)
    merged = tuned.merge(check=given)
    torch.testing.assert_close(logits(merged, batch), apart, atol=1e-5, rtol=1e-5)


def test_sleeping_tunings_are_dropped_by_a_merge_and_touch_nothing() -> None:
    model = tiny("bert", "classification")
    batch = inputs(model)
    tuned = attach(model, "bitfit", name="a")
    shake(tuned, 0.3)
    tuned.add("bitfit", name="b", seed=1)
    Trainer(tuned, model, batch, total=3).run()
    apart = logits(model, batch)
    merged = tuned.merge()
    assert torch.equal(logits(merged, batch), apart)
    assert list(merged.state_dict()) == list(tiny("bert", "classification").state_dict())


def test_several_active_tunings_merge_into_one_model() -> None:
    model = tiny("gpt2", "lm")
    batch = inputs(model)
    tuned = attach(model, "lora", name="a", rank=2)
    tuned.add("dora", name="b", seed=1)
    tuned.add("ia3", name="c", seed=2)
    tuned.add("bitfit", name="d", seed=3)
    shake(tuned)
    apart = logits(model, batch)
    torch.testing.assert_close(logits(tuned.merge(), batch), apart, atol=2e-5, rtol=1e-4)


class Shift(Attachment):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(d))

    def after(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y + self.shift


@dataclass(frozen=True, kw_only=True)
class Shifted(PerSite):
    """A method of one's own, at places that are no products."""

    sites: tuple[str, ...] = ()
    name: ClassVar[str] = "shifted"
    mergeable: ClassVar[bool] = True

    def params_at(self, site: Site) -> int:
        return site.d_out

    def build(self, site: Site, base: Base) -> Attachment:
        return Shift(site.d_out)


@pytest.mark.parametrize("kind", ["norm", "embed"])
def test_a_norm_that_nothing_can_be_merged_into_is_not_called_quantised(kind: str) -> None:
    tuned = attach(tiny("bert", "classification"), Shifted(sites=(kind,)))
    shake(tuned)
    with pytest.raises(CannotMerge, match=rf"^{kind}.*: no product of a weight, so nothing can be merged into it"):
        tuned.merge()
