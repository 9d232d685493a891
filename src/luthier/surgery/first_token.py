"""The last block for the first token alone, where the head reads nothing else.

A classifier on BERT reads one position of the last hidden states. Behind the last attention everything is computed
token by token, so the other positions' output projection, norm and feed-forward layer are work for nobody: on 6 layers
an eighth of all products, in training and in inference. The results for the first token are what they were.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy
from luthier.core.protocols import Model
from luthier.surgery.context import facts_left_out
from luthier.surgery.stream import stream_of, with_stream

__all__ = ["FirstTokenCut", "first_token_place", "head_reads_first_token"]


class FirstTokenCut:
    """A hook behind the last attention. It cuts only inside `with cut.on():`, so a user's own calls see all states.

    Args:
        place: the module that is called with (what the attention gave, its residual), both (batch, tokens, d).
    """

    def __init__(self, place: nn.Module) -> None:
        self.active = False
        self.handle = place.register_forward_pre_hook(self._cut)

    @contextmanager
    def on(self, active: bool = True) -> Iterator[None]:
        """Within, the model's last hidden states are (batch, 1, d), or all of them where it is not active."""
        before, self.active = self.active, active
        try:
            yield
        finally:
            self.active = before

    def as_now(self) -> Callable[[], AbstractContextManager[None]]:
        """What makes it cut, or not, as it does now: for a block that is computed again later."""
        return partial(self.on, self.active)

    def _cut(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        # Contiguous: the framework's linear layer copies its weight for every row of a strided input.
        return tuple(x[:, :1].contiguous() for x in args) if self.active else None


def first_token_place(anatomy: Anatomy, modules: dict[str, nn.Module]) -> nn.Module | None:
    """Where the last block could be cut; None where the architecture has no such place.

    Asked for: an encoder whose last block has a module that adds the attention's output to its residual, as BERT and
    its family do; it is the first of the two of this form in a block, the other one ends the feed-forward layer.
    """
    if anatomy.is_decoder or anatomy.is_encoder_decoder or not anatomy.blocks:
        return None
    last = anatomy.blocks[-1]
    if sum(b.path == last.path for b in anatomy.blocks) > 1:
        return None  # ALBERT goes through one block many times
    inside = [(n, m) for n, m in modules.items() if n.startswith(f"{last.path}.") and _adds_residual(m)]
    owners = [a.path for a in anatomy.attentions if a.path.startswith(f"{last.path}.")]
    if len(inside) != 2 or len(owners) != 1:
        return None
    name, module = inside[0]
    # Beside the attention itself, as BertAttention.self and BertAttention.output are.
    return module if name.rpartition(".")[0] == owners[0].rpartition(".")[0] else None


def _adds_residual(module: nn.Module) -> bool:
    return list(inspect.signature(module.forward).parameters) == ["hidden_states", "input_tensor"]


def head_reads_first_token(model: Model, block: nn.Module, n_vocab: int) -> bool:
    """Whether the logits of a small random batch depend on the first token of the last hidden states and on no other.

    Read off the gradient: exactly zero behind the first position, and not zero at it in any row.

    Args:
        block: the last block.
    """
    seen: list[Tensor] = []

    def cut(module: nn.Module, args: Any, out: Any) -> Any:
        states = stream_of(out)
        seen.append(states.detach().requires_grad_())
        return with_stream(out, seen[0])

    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    ids = torch.randint(min(n_vocab, 1000), (3, 6), generator=generator).to(device)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    handle = block.register_forward_hook(cut)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            try:
                with facts_left_out():
                    out = model(input_ids=ids, attention_mask=mask)
            except (RuntimeError, TypeError, ValueError):
                return False  # it wants other inputs: nothing is known of its head
            logits = out.logits if hasattr(out, "logits") else out[0]
            if logits.dim() != 2 or len(seen) != 1 or seen[0].shape[:2] != ids.shape:
                return False
            # Weighted, since the sum of a classifier's columns could be nothing.
            weights = torch.randn(logits.shape, generator=generator).to(logits)
            (slope,) = torch.autograd.grad((logits * weights).sum(), seen, allow_unused=True)
    finally:
        handle.remove()
    return slope is not None and bool((slope[:, 1:] == 0).all()) and bool(slope[:, 0].abs().amax(-1).gt(0).all())
