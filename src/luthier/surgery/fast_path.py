"""The fast path of what does not train: frozen layers as faster functions, the last block for one token alone."""

from __future__ import annotations

from enum import Enum

from torch import nn

from luthier.surgery import frozen_layers
from luthier.surgery.edited_model import EditedModel
from luthier.surgery.first_token import FirstTokenCut, first_token_place, head_reads_first_token
from luthier.surgery.forward import Forward
from luthier.surgery.frozen_layers import FastLayer

__all__ = ["FastPath"]


class _HeadReads(Enum):
    """What of the last hidden states a model's head reads."""

    NOT_ASKED = "not asked"
    FIRST_TOKEN = "the first token alone"
    MORE = "more than that"


class FastPath:
    """Computes the same with less work, where nothing that trains is in the way."""

    def __init__(self, edited: EditedModel, forward: Forward) -> None:
        self.edited, self.forward = edited, forward
        self._head_reads = _HeadReads.NOT_ASKED
        self._cut: FirstTokenCut | None = None

    def accelerate(self, *, training: bool = True, dropout: bool = False) -> int:
        """Compute frozen layers by functions that equal them but are faster; returns how many.

        Linear layers are packed for the CPU as far as `frozen_layers.BUDGET_BYTES` goes. Weights, names and results to
        rounding stay what they are.

        Args:
            training: leave out what pays only where no gradient is wanted: narrow layers.
            dropout: the dropout of frozen blocks will be on, so draw it faster. It has other numbers then.
        """
        model = self.edited.model
        budget, count = frozen_layers.BUDGET_BYTES, 0
        done: set[int] = set()
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        for path, module in self.edited.modules.items():
            if id(module) in done or module is head:
                continue  # the loss reads an output matrix by itself
            done.add(id(module))
            drop = frozen_layers.fast_dropout(module) if dropout else None
            if drop is not None:
                self.edited.socket(path).fast = drop
                count += 1
                continue
            weight = module._parameters.get("weight")
            if weight is None or weight.requires_grad:
                continue
            if type(module) is nn.Linear and weight.numel() * weight.element_size() <= budget:
                fast = self._pack(path, module, frozen_layers.MIN_WIDTH if training else 1)
                budget -= weight.numel() * weight.element_size() if fast is not None else 0
            else:
                fast = frozen_layers.fast_norm(module)
            if fast is not None:
                self.edited.socket(path).fast = fast
                count += 1
        self.edited.refresh()
        return count

    def _pack(self, path: str, module: nn.Linear, min_width: int) -> FastLayer | None:
        found = frozen_layers.fast_linear(module, min_width)
        if found is None:
            return None
        fast, packed = found
        for plug in self.edited.socket(path).plugs:
            if plug.site.rows is None and plug.site.expert is None:
                plug.base.packed = packed
        return fast

    def first_token(self) -> FirstTokenCut | None:
        """Compute the last block for the first token alone where the head reads no other; None where it may not be.

        Not with prompts or a branch on the model, nor where something in the last block needs all tokens.
        """
        edited = self.edited
        place = first_token_place(edited.anatomy, edited.modules)
        if place is None or self.forward.prompts is not None or self.forward.branches or self.forward.looks:
            return None
        block = edited.anatomy.blocks[-1]
        for plug in (p for socket in edited.sockets_within(block.path) for p in socket.plugs):
            # What these read lies before the cut, and what they change behind it.
            across = plug.site.kind in ("attn_out", "block_out") and plug.attachment.needs_input
            if across or not plug.attachment.per_token:
                return None
        if self._head_reads is _HeadReads.NOT_ASKED:  # once: the head stays what it is, one hook serves all who ask
            alone = head_reads_first_token(edited.model, edited.modules[block.path], edited.anatomy.vocab_size or 2)
            self._head_reads = _HeadReads.FIRST_TOKEN if alone else _HeadReads.MORE
            self._cut = self.forward.cut = FirstTokenCut(place) if alone else None
        return self._cut

    def close(self) -> None:
        """Take the hook off."""
        if self._cut is not None:
            self._cut.handle.remove()
