"""The embedded text, changed on its way into the model: what a strategy that works on embeddings needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from luthier.core import AnatomyError
from luthier.surgery.view import TunedView

__all__ = ["changed_embeddings"]


@contextmanager
def changed_embeddings(tuned: TunedView, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within, the first embedding of the text in each forward pass goes through `change`: (rows, tokens, d).

    Prompts are put before it, and positions are added, after that. In models with an encoder it is the encoder's text.

    Raises:
        AnatomyError: the model has no embedding of tokens, or a pass inside embedded none.
    """
    modules = _embeddings(tuned)
    changed = False

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        nonlocal changed
        changed = True
        return change(out)

    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
        if not changed:
            raise AnatomyError(
                f"{type(tuned.model).__name__}: no embedding of the text was seen in the forward pass, so it cannot be "
                "changed. Use this strategy with a model that is called with input_ids."
            )
    finally:
        for handle in handles:
            handle.remove()


def _embeddings(tuned: TunedView) -> list[nn.Module]:
    """The modules that embed the text: the encoder's where there are two stacks."""
    model = tuned.model
    text = model.get_encoder() if tuned.anatomy.is_encoder_decoder else model
    # T5's and BART's encoders have an embedding of their own that shares the model's table.
    found = [m for m in (text.get_input_embeddings(),) if m is not None]
    if not found:
        raise AnatomyError(f"{type(model).__name__} has no embedding of tokens.")
    return found
