"""S4: four groups of layers, each with strategies of its own, and the same number of trained numbers in every layer.

    group      1                2                 3                         4
    layers     few              more              more                      few
    holds      adapter, LoRA    adapter, prefix   adapter, prefix, biases   prefix, biases, LoRA

In each layer the biases take what they take, and what is left is shared equally, rounded down to whole sizes. Prefixes
take attention from the text, so the model starts elsewhere than the base.

Chen, Zhang, Shi, Li, Smola, Yang 2023, "Parameter-Efficient Fine-Tuning Design Spaces", arXiv:2301.01821. How large the
groups are, and how a layer's share is split, the paper does not say: outer groups of a sixth of the layers, and equal
shares, are ours. The search by which it was found is not offered; of an encoder-decoder each stack has its own groups.

Count: at most share * numbers below the head, the same in every layer but for rounding.
Claims: found on T5-base, it beats its parts on GLUE at half a percent, and carries over to other models.
Cost: in each layer two or three methods: a step costs about what unipelt's does.
Use it when: it is not known which of adapters, LoRA and prefixes suits, and one budget must hold them.
Not when: a tuning must merge; or the model has no biases: two groups then hold one strategy less.
Pitfalls: sizes that are the same in all groups break the equal share once biases are among them.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from luthier.anatomy import Anatomy
from luthier.core import ConfigError, between
from luthier.methods.parts.layer_plan import InLayer, Layer, Planned, cost_of, layers_of
from luthier.surgery import METHODS

HOLDS = (("adapter", "lora"), ("adapter", "prefix"), ("adapter", "prefix", "biases"), ("prefix", "biases", "lora"))


@METHODS.register("s4", family="hybrid", paper="arXiv:2301.01821")
@dataclass(frozen=True, kw_only=True)
class S4(Planned):
    """Settings of S4."""

    share: Annotated[float, "trained numbers, as a share of those below the head", between(0, 1)] = 0.005

    default_lr: ClassVar[float] = 2e-3
    trains_base: ClassVar[bool] = True
    tiny: ClassVar[dict[str, float]] = {"share": 0.1, "lr": 1e-2}

    def plan(self, anatomy: Anatomy) -> dict[Layer, InLayer]:
        """What stands in each layer.

        Raises:
            ConfigError: the share is too small for one of each strategy.
            AnatomyError: a layer has no place for one.
        """
        head = sum(math.prod(anatomy.tensors[n]) for n in anatomy.head_tensors)
        layers = layers_of(anatomy)
        budget = math.floor(self.share * (anatomy.n_params - head)) // len(layers)
        found: dict[Layer, InLayer] = {}
        for stack in dict.fromkeys(stack for stack, _ in layers):
            own = [layer for layer in layers if layer[0] == stack]
            groups = [n for n, size in enumerate(sizes(len(own))) for _ in range(size)]
            found |= {
                layer: self._layer(anatomy, layer, HOLDS[n], budget) for layer, n in zip(own, groups, strict=True)
            }
        return found

    def _layer(self, anatomy: Anatomy, layer: Layer, holds: tuple[str, ...], budget: int) -> InLayer:
        fixed = cost_of(anatomy, layer, "biases", 1) if "biases" in holds else 0
        sized = [kind for kind in holds if kind != "biases"]
        each = (budget - fixed) // len(sized)
        chosen = {"biases": 1} if fixed else {}
        for kind in sized:
            one, two = (cost_of(anatomy, layer, kind, size, self.name) for size in (1, 2))
            chosen[kind] = 1 + (each - one) // (two - one)
            if chosen[kind] < 1:
                raise ConfigError(
                    f"s4.share: {self.share:g} leaves {max(each, 0)} numbers for the {kind} of layer {layer[1]}, and "
                    f"the smallest one has {one}. Set a larger share."
                )
        return InLayer(**chosen)


def sizes(layers: int) -> tuple[int, int, int, int]:
    """How many layers each group has: few, more, more, few.

    >>> sizes(12), sizes(24), sizes(32)
    ((2, 4, 4, 2), (4, 8, 8, 4), (5, 11, 11, 5))
    """
    outer = max(1, round(layers / 6))
    inner = max(0, layers - 2 * outer)
    return outer, inner // 2, inner - inner // 2, layers - outer - inner
