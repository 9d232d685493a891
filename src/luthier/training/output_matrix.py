"""Whether a language model's logits are its trunk's states times one matrix, so that its loss can be cut in chunks.

Names of settings do not tell: models put a transform, a factor or a cut between trunk and output, or after it, and new
ones will. So a tiny batch is tried, by both ways.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.anatomy.word_logits import soft_capped, softcap_of
from luthier.surgery import Tuned
from luthier.surgery.context import facts_left_out
from luthier.training.out_of_memory import is_out_of_memory

__all__ = ["trunk_states", "why_all_logits", "word_head_of"]

# How far apart the two may lie, as a share of the logits' spread: rounding, and nothing that a model does on purpose.
_CLOSE, _CLOSE_IN_HALVES = 1e-4, 1e-2


def trunk_states(tuned: Tuned, inputs: dict[str, Any]) -> Tensor:
    """The states that come out of the trunk, (batch, tokens, width)."""
    uncached = {"use_cache": False} if tuned.anatomy.is_decoder else {}
    states: Tensor = tuned.model.base_model(**inputs, **uncached)[0]
    return states


def why_all_logits(tuned: Tuned) -> str:
    """Why the loss needs the model's own logits, in words; empty where the trunk's states and one matrix give them.

    A tiny random batch is answered both ways, in evaluation mode, and leaves no trace.
    """
    model = tuned.model
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):  # a socket on the head computes more than one product
        return "its output is more than one matrix"
    if model.base_model is model:
        return "it has no trunk apart from its output"

    def both(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        states = trunk_states(tuned, inputs)
        ours = F.linear(states.to(head.weight.dtype), head.weight, head.bias).float()
        return soft_capped(ours, softcap_of(model)), model(**inputs).logits.float()

    return _why_apart(tuned, both)


def word_head_of(tuned: Tuned) -> tuple[nn.Module | None, str]:
    """The module that makes words of an encoder's states, position by position, or why there is none, in words."""
    model = tuned.model
    ours = "luthier"  # what the tunings bring stands there
    beside = [child for name, child in model.named_children() if child is not model.base_model and name != ours]
    if model.base_model is model or len(beside) != 1:
        return None, f"what makes words of its states is {len(beside)} modules, not one"
    (head,) = beside

    def both(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        chosen = inputs["attention_mask"].bool() & (torch.arange(6, device=inputs["input_ids"].device) % 2 == 0)
        return head(trunk_states(tuned, inputs)[chosen][None])[0].float(), model(**inputs).logits[chosen].float()

    reason = _why_apart(tuned, both)
    return (None if reason else head), reason


def _why_apart(tuned: Tuned, both: Callable[[dict[str, Any]], tuple[Tensor, Tensor]]) -> str:
    """Why logits that are computed in two ways differ, in words; empty where they do not.

    Args:
        both: our way's logits of a batch, and the model's own.
    """
    model = tuned.model
    table = model.get_input_embeddings().weight
    device, width = table.device, int(table.shape[0])
    ids = torch.randint(min(width, 1000), (2, 6), generator=torch.Generator().manual_seed(0)).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    types = {p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() > 1}
    halves = types & {torch.bfloat16, torch.float16}
    # Masters in fp32 beside a base in halves meet under autocast, in training as here.
    casts = torch.autocast(device.type, dtype=next(iter(halves), None), enabled=len(types) > 1 and bool(halves))
    cuda = [device] if device.type == "cuda" else []
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(cuda), casts, facts_left_out():
            ours, own = both(inputs)
    except Exception as error:  # whatever a model's code raises, its own forward pass is the way that is left
        if is_out_of_memory(error):
            raise
        return f"its trunk cannot be followed by its output alone ({type(error).__name__})"
    finally:
        for module, mode in modes:
            module.training = mode
    if ours.shape != own.shape:
        return f"it gives logits of shape {list(own.shape)} where its output matrix gives {list(ours.shape)}"
    spread = float((own - own.mean(-1, keepdim=True)).square().mean().sqrt())
    apart = float((ours - own).square().mean().sqrt())
    if apart <= (_CLOSE_IN_HALVES if halves else _CLOSE) * spread:
        return ""
    return f"it does more than its output matrix does (logits off by {apart / max(spread, 1e-30):.2g} of their spread)"
