"""Vectors beside the patches of a picture: they join where the first block reads, and leave behind the last one.

Positions are in the patches by then, so vectors have none and stand behind the last patch: what reads the first place,
a pooler or a head, finds there what it always did.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy
from luthier.core import ModelError
from luthier.surgery.context import Context
from luthier.surgery.prompts import text_stack

__all__ = ["PicturePrompts", "reads_pictures"]


def reads_pictures(modules: dict[str, nn.Module], anatomy: Anatomy) -> bool:
    """Whether the stack is given pixels, and words are nowhere."""
    if anatomy.is_encoder_decoder or any(s.kind == "embed" for s in anatomy.all_sites):
        return False
    return "pixel_values" in inspect.signature(text_stack(modules, anatomy).forward).parameters


class PicturePrompts:
    """Puts the rows of `sources` (in order) behind the patches, while this object is installed."""

    def __init__(self, modules: dict[str, nn.Module], anatomy: Anatomy, context: Context) -> None:
        self.sources: list[Any] = []
        self.context = context
        self._inserted = 0
        stack, first = text_stack(modules, anatomy), modules[anatomy.blocks[0].path]
        self._handles = [
            first.register_forward_pre_hook(self._before, with_kwargs=True),
            stack.register_forward_hook(self._after),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._inserted = 0
        if not self.sources:
            return None
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        if any(
            isinstance(other, Tensor) for other in (*args[1:], *(v for n, v in kwargs.items() if n != "hidden_states"))
        ):
            raise ModelError(
                f"{type(block).__name__} is given more than states, such as a mask, which vectors beside the patches "
                "would not fit. Give whole pictures without a mask, or use prefix_tuning."
            )
        made = [
            s.rows(self.context, x, None) if hasattr(s, "rows") else s().expand(len(x), -1, -1) for s in self.sources
        ]
        vectors = torch.cat(made, dim=1).to(x.dtype)  # (rows, P, d)
        self._inserted = vectors.shape[1]
        x = torch.cat([x, vectors], dim=1)  # (rows, 1 + patches + P, d)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    def _after(self, stack: nn.Module, args: Any, out: Any) -> Any:
        n, self._inserted = self._inserted, 0
        if n == 0:
            return out
        if isinstance(out, tuple):
            return (out[0][:, :-n], *out[1:])
        out.last_hidden_state = out.last_hidden_state[:, :-n]
        if getattr(out, "hidden_states", None) is not None:
            # The first of them may have been noted before the vectors joined, or behind that.
            patches = out.last_hidden_state.shape[1]
            out.hidden_states = tuple(h[:, :patches] for h in out.hidden_states)
        return out
