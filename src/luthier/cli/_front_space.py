"""The space that `compare --front` searches, of one model."""

from typing import Any

import numpy as np

from luthier.anatomy import Anatomy
from luthier.comparison.front import Space
from luthier.methods.parts.layer_plan import cost_of, layers_of

__all__ = ["front_space"]


def front_space(model: Any) -> Space:
    """Widths of 0 and the d / 2^k of the model's stream, k from 9 to 0, in each layer, and what each trains there.

    Raises:
        AnatomyError: a layer has no place for one of the three.
    """
    anatomy = Anatomy.read(model)
    d = anatomy.sites("ffn_out", asked_by="autopeft")[0].d_out
    sizes = (0, *sorted({d >> k for k in range(10)} - {0}))
    kinds = ("adapter", "parallel", "prefix")
    layers = layers_of(anatomy)
    costs = [[[cost_of(anatomy, layer, k, s, "autopeft") for s in sizes] for k in kinds] for layer in layers]
    return Space(sizes, np.array(costs, dtype=np.int64))
