"""One short pass when a method is attached: what it cannot do on this model is said then, not in a run."""

import torch

from luthier.core import AnatomyError, LuthierError
from luthier.methods.parts.masks import no_trace
from luthier.surgery import TunedView

__all__ = ["try_pass"]


@torch.no_grad()
def try_pass(tuned: TunedView, asked_by: str) -> None:
    """Two words through the base, then through the tuned model.

    A model that reads no words, or whose weights are not here, is not tried; nor one that wants more than words.

    Raises:
        AnatomyError: the base runs, and the tuned model does not.
    """
    model, anatomy = tuned.model, tuned.anatomy
    if anatomy.vocab_size is None or any(p.device.type == "meta" for p in model.parameters()):
        return
    words = torch.full((1, 2), min(3, anatomy.vocab_size - 1), device=next(model.parameters()).device)
    given = {"input_ids": words, **({"decoder_input_ids": words} if anatomy.is_encoder_decoder else {})}
    with no_trace(tuned, training=False):
        with tuned.base_only():
            try:
                model(**given)
            except Exception:  # a model of another kind: it may want images, or a mask
                return
        try:
            model(**given)
        except LuthierError:
            raise
        except Exception as error:
            raise AnatomyError(
                f"{asked_by}: two words went through this {anatomy.model_type} model and not through what "
                f"{asked_by} puts beside it ({type(error).__name__}: {error}). Use another method, such as lora."
            ) from error
