"""What a language model does to the products of its output matrix before they are logits, by its configuration.

logits = bound tanh(factor W h / (divisor bound))          without a bound: factor W h / divisor
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["finished_logits", "scale_of", "soft_capped", "softcap_of"]

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


def scale_of(model: Any) -> float:
    """What the model's configuration multiplies the products by before the bound."""
    config = model.config.get_text_config()
    factors = math.prod(float(getattr(config, name, None) or 1.0) for name in FACTORS)
    return factors / float(getattr(config, DIVISOR, None) or 1.0)


def finished_logits(model: Any, products: Tensor) -> Tensor:
    """Logits of the output matrix's products: by a factor, a divisor or a soft bound, whichever the model has.

    Names of settings do not tell all: whoever needs certainty compares with the model's own logits.
    """
    return soft_capped(products * scale_of(model), softcap_of(model))
