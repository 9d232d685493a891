"""LongLoRA: the acid tests of its paper, beside those that every method passes."""

import pytest
import torch
from methods.checks import logits, stir
from tiny import inputs, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from luthier.core import AnatomyError, ConfigError
from luthier.methods.reparameterised.longlora import Grouped
from luthier.surgery import attach

DECODERS = ["llama", "gpt2"]


def tuned_with(arch: str = "llama", **settings: object):
    """A decoder whose groups act: it is in training mode, without dropout."""
    tuned = attach(tiny(arch, "lm"), "longlora", rank=3, train_head=False, **settings)
    stir(tuned, 0.1)
    for module in tuned.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return tuned


def text(tokens: int, rows: int = 2) -> Tensor:
    return torch.randint(5, 120, (rows, tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def training_logits(tuned, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    tuned.model.train()
    return tuned.model(input_ids=ids, attention_mask=mask).logits


@pytest.mark.acid("longlora", 1)
@pytest.mark.parametrize("arch", DECODERS)
@pytest.mark.parametrize("tokens", [16, 19])
def test_a_later_token_changes_nothing_before_it(arch: str, tokens: int) -> None:
    tuned = tuned_with(arch, pieces=4)
    ids = text(tokens)
    before = training_logits(tuned, ids)
    for place in (tokens - 1, tokens // 2, 1):
        other = ids.clone()
        other[:, place] = 4
        after = training_logits(tuned, other)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place:], before[:, place:])


@pytest.mark.acid("longlora", 2)
@pytest.mark.parametrize("arch", DECODERS)
def test_one_group_is_full_attention_and_four_are_not(arch: str) -> None:
    ids = text(16)
    tuned = tuned_with(arch, pieces=1)
    full = logits(tuned.model, {"input_ids": ids})
    torch.testing.assert_close(training_logits(tuned, ids), full)
    other = tuned_with(arch, pieces=4)
    assert not torch.allclose(training_logits(other, ids), logits(other.model, {"input_ids": ids}), atol=1e-3)


def seen_by(group: int, tokens: int, heads: int = 4, mask: Tensor | None = None) -> Tensor:
    """(heads, T, T): which tokens each token reads, from the values that an attention gives back."""
    module = Grouped(1, group)
    module.context = type("Pass", (), {"packed": False, "generating": False, "mask_for": lambda self, s: mask})()

    def inner(query, key, value, *, of_text, seen, causal):
        assert not of_text and causal
        assert (seen is None) == (mask is None or bool(mask[0, 0]))  # without a pad before the text no mask is made
        if seen is None:
            seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        weights = seen.float() / seen.float().sum(-1, keepdim=True)
        return (weights @ value).transpose(1, 2)

    one = torch.eye(tokens).expand(1, heads, -1, -1)
    found = module.attend(inner, torch.zeros(1, heads, tokens, 2), one, one)  # (1, T, heads, T)
    return found[0].transpose(0, 1) > 0


@pytest.mark.acid("longlora", 3)
@pytest.mark.parametrize("tokens", [16, 22])
def test_every_token_has_half_a_group_before_it_in_one_of_the_halves(tokens: int) -> None:
    seen = seen_by(8, tokens)
    assert torch.equal(seen, seen.tril())
    assert seen.diagonal(dim1=1, dim2=2).all()
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3]) and not torch.equal(seen[0], seen[2])
    before = seen.sum(-1).amax(0) - 1
    assert all(before[t] >= min(t, 4 - 1) for t in range(tokens))
    # The plain half is blocks of eight, the shifted one begins with four.
    assert [int(n) for n in seen[0].sum(-1)[:10]] == [1, 2, 3, 4, 5, 6, 7, 8, 1, 2]
    assert [int(n) for n in seen[2].sum(-1)[:10]] == [1, 2, 3, 4, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("pads", [1, 5])
def test_pads_behind_a_text_need_no_mask_and_those_before_it_are_not_read(pads: int) -> None:
    bare = seen_by(8, 22)
    behind = torch.ones(1, 22, dtype=torch.long)
    behind[:, -pads:] = 0
    assert torch.equal(seen_by(8, 22, mask=behind), bare)
    before = behind.flip(1)
    seen = seen_by(8, 22, mask=before)
    assert not seen[:, pads:, :pads].any()
    assert torch.equal(seen[:, pads:, pads:], bare[:, pads:, pads:])


@pytest.mark.acid("longlora", 4)
@pytest.mark.parametrize("arch", DECODERS)
def test_in_evaluation_it_starts_as_the_base(arch: str) -> None:
    base = tiny(arch, "lm")
    batch = inputs(base)
    wanted = logits(base, batch)
    attach(base, "longlora", pieces=2)
    torch.testing.assert_close(logits(base, batch), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.acid("longlora", 5)
def test_the_work_of_attention_grows_linearly_at_a_fixed_group(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = []
    tuned = tuned_with(group=8)
    real = Grouped._in_groups

    def counting(self, inner, query, *rest):
        def counted(q, k, v, **more):
            scores.append(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
            return inner(q, k, v, **more)

        return real(self, counted, query, *rest)

    monkeypatch.setattr(Grouped, "_in_groups", counting)
    work = {}
    for tokens in (32, 64, 128):
        scores.clear()
        training_logits(tuned, text(tokens))
        work[tokens] = sum(scores)
    assert work[128] - work[64] == 2 * (work[64] - work[32])


class Largest(TorchDispatchMode):
    """The most numbers that any result has."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, Tensor):
                self.most = max(self.most, one.numel())
        return result


def test_no_tensor_of_a_step_is_as_large_as_the_square_of_the_length() -> None:
    def most(method: str, tokens: int) -> int:
        torch.manual_seed(0)
        tuned = attach(tiny("llama", "lm"), method, **({"group": 16} if method == "longlora" else {}))
        tuned.model.train()
        ids = text(tokens, rows=1)
        with Largest() as seen:
            tuned.model.base_model(input_ids=ids, use_cache=False)[0].sum().backward()
        return seen.most

    assert most("longlora", 2048) == 2 * most("longlora", 1024)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logit_of_the_text_where_the_group_is_fixed(side: str) -> None:
    tuned = tuned_with("llama", group=8)
    ids, pad = text(16), torch.zeros(2, 8, dtype=torch.long)
    alone = training_logits(tuned, ids)
    padded = torch.cat([pad, ids] if side == "left" else [ids, pad], 1)
    mask = (padded != 0).long()
    found = training_logits(tuned, padded, mask)
    found = found[:, 8:] if side == "left" else found[:, :16]
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_odd_groups_and_models_that_read_both_ways_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"longlora.group: 7 is odd.*Use 8"):
        attach(tiny("llama", "lm"), "longlora", group=7)
    with pytest.raises(AnatomyError, match="also reads what comes after"):
        attach(tiny("bert"), "longlora")
