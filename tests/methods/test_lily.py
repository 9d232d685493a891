"""Lily: peft's result for one row, and no row that sees another."""

from typing import Any

import peft
import pytest
import torch
from methods.checks import logits, stir
from tiny import inputs, tiny

from luthier.core import AnatomyError
from luthier.methods.reparameterised.lily import Lily, Routed
from luthier.surgery import attach

pytestmark = [pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")]


def rows(model: Any, n: int) -> dict[str, torch.Tensor]:
    return {k: v[:n] for k, v in inputs(model, padded=False).items()}


def both(kind: str, layers: list[str], sites: tuple[str, ...], **settings: Any) -> tuple[Any, Any]:
    """Our tuning with numbers that are nowhere zero, and peft's model with the same."""
    method = Lily(sites=sites, rank=3, stride=2, experts=4, scale=0.7, **settings)
    tuned = attach(tiny(kind), method, train_head=False)
    stir(tuned, 0.5)
    config = peft.LilyConfig(r=3, stride_A=2, num_B=4, scaling=0.7, target_modules=layers)
    other = peft.get_peft_model(tiny(kind), config)
    found = dict(other.base_model.model.named_modules())
    paths = {s.key: s.path for s in tuned.anatomy.sites(*sites)}
    with torch.no_grad():
        for key, module in tuned.modules(Routed).items():
            theirs = found[paths[key]]
            theirs.lily_A["default"].weight.copy_(module.__dict__["down"].a)
            theirs.lily_B["default"].weight.copy_(module.__dict__["pool"].b.flatten(0, 1))
            theirs.lily_router["default"].weight.copy_(module.router)
    n_theirs = sum(p.numel() for n, p in other.named_parameters() if "lily" in n)
    assert n_theirs == method.n_params(tuned.anatomy), "shared there as here"
    return tuned, other


@pytest.mark.parametrize(
    ("kind", "layers", "sites"),
    [("llama", ["k_proj", "down_proj"], ("attn.k", "ffn.down")), ("bert", ["query"], ("attn.q",))],
)
def test_for_one_row_it_is_peft_s_and_for_several_it_is_not(kind: str, layers: list[str], sites: Any) -> None:
    tuned, other = both(kind, layers, sites)
    one, three = rows(tuned.model, 1), rows(tuned.model, 3)
    ours, theirs = tuned.model.eval()(**one), other.eval()(**one)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)
    ours.loss.backward()
    theirs.loss.backward()
    named = {n: p.grad for n, p in other.named_parameters() if p.grad is not None}
    module = next(iter(tuned.modules(Routed).values()))
    routers = [g for n, g in named.items() if "router" in n]
    torch.testing.assert_close(module.router.grad, routers[0], rtol=1e-4, atol=1e-6)
    together = logits(tuned.model, three)
    torch.testing.assert_close(together[:1], ours.logits.detach(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(other, three), together, atol=1e-4), "there, neighbours change a row"


def test_by_token_a_mixture_is_that_of_the_token_and_looks_at_nothing_behind_it() -> None:
    tuned = attach(tiny("llama"), Lily(rank=3, route="token"), train_head=False)
    stir(tuned, 0.5)
    module = next(iter(tuned.modules(Routed).values()))
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1))
    found = module.after(x, torch.zeros(2, 5, 48))
    pool, down = module.__dict__["pool"], module.__dict__["down"]
    for b in range(2):
        for t in range(5):
            thin = down.a @ x[b, t]
            p = torch.softmax(module.router @ thin, 0)
            wanted = sum(p[e] * (thin @ pool.b[e]) for e in range(3))
            torch.testing.assert_close(found[b, t], wanted, rtol=1e-5, atol=1e-5)
    batch = rows(tuned.model, 2)
    before = logits(tuned.model, batch)
    batch["input_ids"][:, -1] = 7
    torch.testing.assert_close(logits(tuned.model, batch)[:, :-1], before[:, :-1], rtol=1e-5, atol=1e-5)
    by_row = attach(tiny("llama"), Lily(rank=3), train_head=False)
    stir(by_row, 0.5)
    first = logits(by_row.model, rows(by_row.model, 2))
    assert not torch.allclose(logits(by_row.model, batch)[:, :-1], first[:, :-1], atol=1e-5), "a row's mean does look"


@pytest.mark.parametrize("sites", [("cross.k",), ("attn", "cross", "ffn")])
def test_where_a_decoder_reads_the_encoder_the_mean_is_over_the_text_read(sites: tuple[str, ...]) -> None:
    tuned = attach(tiny("t5", "seq2seq"), Lily(sites=sites, rank=3))
    stir(tuned, 0.5)
    text = torch.randint(3, 131, (1, 7), generator=torch.Generator().manual_seed(0))
    written = text[:, :5].flip(1)
    padded = torch.cat([text, torch.zeros(1, 4, dtype=torch.long)], 1)
    tuned.model.eval()
    with torch.no_grad():
        alone, beside = (
            tuned.model(input_ids=ids, attention_mask=(ids > 0).long(), decoder_input_ids=written).logits
            for ids in (text, padded)
        )
    torch.testing.assert_close(alone, beside, rtol=1e-4, atol=1e-4)
    for beams in (1, 3):
        asked = {"input_ids": padded, "attention_mask": (padded > 0).long(), "num_beams": beams, "max_new_tokens": 5}
        with_cache, without = (tuned.model.generate(**asked, do_sample=False, use_cache=c) for c in (True, False))
        assert torch.equal(with_cache, without)


def test_an_expert_has_no_rows_and_is_refused() -> None:
    with pytest.raises(AnatomyError, match="is an expert"):
        attach(tiny("mixtral"), Lily(sites=("experts",)))
