"""What a language model does to the products of its output matrix before they are logits, by its configuration.

logits = bound tanh(factor W h / (divisor bound))          without a bound: factor W h / divisor
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["finished_logits", "soft_capped", "softcap_of"]

FACTORS = ("logit_scale", "lm_head_multiplier")  # Cohere, Falcon-H1
DIVISOR = "logits_scaling"  # Granite
BOUND = "final_logit_softcapping"  # Gemma


def softcap_of(model: Any) -> float | None:
    """The bound that the model's configuration puts on its logits."""
    found = getattr(model.config.get_text_config(), BOUND, None)
    return None if found is None else float(found)


def soft_capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits between -softcap and softcap; None leaves them as they are."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def finished_logits(model: Any, products: Tensor) -> Tensor:
    """Logits of the output matrix's products: by a factor, a divisor or a soft bound, whichever the model has.

    Names of settings do not tell all: whoever needs certainty compares with the model's own logits.
    """
    config = model.config.get_text_config()
    for name in FACTORS:
        products = products * float(getattr(config, name, None) or 1.0)
    products = products / float(getattr(config, DIVISOR, None) or 1.0)
    return soft_capped(products, softcap_of(model))
