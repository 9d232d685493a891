"""What the methods' own tests share: a model in float64, a few steps of AdamW, numbers that are nowhere zero."""

from functools import cache
from typing import Any

import pytest
import torch
from tiny import inputs, tiny
from torch import Tensor
from transformers import BertConfig, BertModel, DynamicCache, StaticCache

from luthier.anatomy import Anatomy
from luthier.core import ModelError
from luthier.surgery import Tuned, attach, method


def optimiser(tuned: Tuned, lr: float = 1e-2, decay: float = 0.01) -> torch.optim.Optimizer:
    """AdamW over everything that trains, for a loop that calls the methods' hooks."""
    tuned.calls_hooks = True
    return torch.optim.AdamW(tuned.trained().values(), lr=lr, weight_decay=decay)


def train(
    tuned: Tuned, steps: int, *, total: int = 0, lr: float = 1e-2, decay: float = 0.01, seed: int = 0
) -> list[float]:
    """Steps in the order of the training loop: gradients, extra loss, hooks, masks, clip, update, hooks."""
    step_with = optimiser(tuned, lr, decay)
    tuned.model.train()
    losses = []
    for step in range(1, steps + 1):
        torch.manual_seed(seed * 1000 + step)
        parts = [p for t in tuned.tunings.values() for p in t.method.parts()]
        for part in parts:
            part.before_step(tuned, step, total or steps)
        batch = inputs(tuned.model, seed=step % 2)
        result = tuned.model(**batch).loss
        result.backward()
        losses.append(float(result.detach()))
        for part in parts:
            extra = part.extra_loss(tuned)
            if extra is not None:
                extra.backward()
        for part in parts:
            part.after_backward(tuned, step, total or steps)
        tuned.state.mask_gradients()
        torch.nn.utils.clip_grad_norm_(tuned.trained().values(), 1.0)
        step_with.step()
        tuned.state.constrain()
        for part in parts:
            part.on_step(tuned, step, total or steps)
        step_with.zero_grad(set_to_none=True)
    tuned.model.eval()
    return losses


@torch.no_grad()
def stir(tuned: Tuned, size: float = 0.3, seed: int = 5) -> None:
    """Move every trained number, so that nothing is hidden by a zero."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in tuned.trained().values():
        parameter.add_(size * torch.randn(parameter.shape, generator=draw).to(parameter.dtype))


def logits(model: Any, batch: dict[str, Tensor] | None = None) -> Tensor:
    """What the model computes in evaluation mode, without a graph."""
    model.eval()
    with torch.no_grad():
        out: Tensor = model(**(inputs(model) if batch is None else batch)).logits
    return out


def double(name: str, task: str = "") -> Any:
    """A tiny model in float64."""
    return tiny(name, task).double()


def attach_double(name: str, words: str, task: str = "", **settings: Any) -> Tuned:
    """A tiny model in float64 and its tuning, built in float64 too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return attach(double(name, task), words, **settings)
    finally:
        torch.set_default_dtype(before)


def frozen_copy(tuned: Tuned) -> dict[str, Tensor]:
    """Copies of all tensors of the base that do not train."""
    trained = {id(p) for p in tuned.trained().values()}
    named = tuned.model.named_parameters()
    return {n: p.detach().clone() for n, p in named if id(p) not in trained and not n.startswith("luthier.")}


def same(now: dict[str, Tensor], before: dict[str, Tensor]) -> bool:
    """Whether the tensors of `before` are unchanged in `now`, bit for bit."""
    return all(torch.equal(now[n].detach(), t) for n, t in before.items())


def read_by(module, model):
    """What `module` reads first in a pass over one batch, in evaluation mode."""
    seen = []
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().clone()))
    logits(model)
    handle.remove()
    return seen[0]


def contribution(tuned, norm, key):
    """What the adapter at `key` adds to what `norm` reads, everything before it being equal."""
    whole = read_by(norm, tuned.model)
    module = tuned.modules()[key]
    up, bias = module.up.weight.detach().clone(), module.up.bias.detach().clone()
    torch.nn.init.zeros_(module.up.weight)
    torch.nn.init.zeros_(module.up.bias)
    without = read_by(norm, tuned.model)
    with torch.no_grad():
        module.up.weight.copy_(up)
        module.up.bias.copy_(bias)
    return whole - without


@cache
def _bert_base() -> Anatomy:
    with torch.device("meta"):
        return Anatomy.read(BertModel(BertConfig()))


def counted(words: str, **settings: Any) -> int:
    """Numbers that a method trains on BERT-base, on the meta device."""
    return method(words, settings).n_params(_bert_base())


def goes_on_from_its_cache_alone(tuned: Tuned, *, lazy: bool) -> None:
    """A text in three pieces answers as in one; a cache that another filled, and one of a fixed size, are refused.

    Args:
        lazy: begin with an empty cache of one's own, in place of the model's.
    """
    model, ids = tuned.model, torch.randint(3, 131, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :5], past_key_values=DynamicCache() if lazy else None, use_cache=True)
        second = model(ids[:, 5:8], past_key_values=first.past_key_values, use_cache=True)
        last = model(ids[:, 8:], past_key_values=second.past_key_values)
        pieces = torch.cat([first.logits, second.logits, last.logits], 1)
        torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-5)
        with tuned.base_only():
            strange = model(ids[:, :5], use_cache=True).past_key_values
        with pytest.raises(ModelError, match="filled without this tuning"):
            model(ids[:, 5:], past_key_values=strange)
        with pytest.raises(ModelError, match="has a fixed size"):
            model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=20))
        torch.testing.assert_close(model(ids).logits, whole)  # what was refused leaves nothing behind
