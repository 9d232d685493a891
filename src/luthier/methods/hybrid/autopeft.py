"""AutoPEFT: adapters behind and beside the feed-forward layer and a prefix, on chosen layers; sizes are searched.

    ffn_out <- y + SA(y) + s PA(x)          Attn(q, [P_k ; K], [P_v ; V])          in the layers of `layers` alone

x is what the feed-forward layer reads, y what it gives. SA and PA are bottlenecks, W_u σ(W_d · + b_d) + b_u; P_k and
P_v are stored as they are, without a network. A size of 0 is nothing. The prefix takes attention from the text, so the
model starts elsewhere than the base.

Zhou, Wan, Vulić, Korhonen 2024, "AutoPEFT: Automatic Configuration Search for Parameter-Efficient Fine-Tuning",
arXiv:2301.12132. This is one configuration; `luthier compare --method autopeft --front N` searches for the best of each
size. As in the authors' search, half of its runs are drawn at random and batches of four follow, where a Gaussian
process expects the front to gain most. Ours is fitted to the highest posterior, where theirs averages over draws of it;
their 200 runs are yours to give; and nothing is carried over from another task, but that what was found there can be
named here. The scale s = 2 and the sizes set here are ours.

Count: of each chosen layer, 2 d r + r + d for each of the two adapters, and 2 l d for l keys and values.
Claims: on GLUE, with about 1 % of BERT's numbers, what is found beats single methods and comes near full fine-tuning.
Cost: one configuration costs a step like mam's; the search, a training for each of its runs.
Use it when: many trainings can be paid, and accuracy must be weighed against the size of a tuning.
Not when: one training is all there is, and nothing was found on a like task before; mam or s4 then; or it must merge.
Pitfalls: the rows that choose among many configurations flatter the best of them: judge it on others.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from luthier.anatomy import Anatomy
from luthier.core import ConfigError, at_least
from luthier.methods.parts.layer_plan import InLayer, Layer, Planned, cost_of, layers_named, layers_of
from luthier.surgery import METHODS


@METHODS.register("autopeft", family="hybrid", paper="arXiv:2301.12132")
@dataclass(frozen=True, kw_only=True)
class AutoPEFT(Planned):
    """Settings of one configuration."""

    layers: Annotated[str, "layers that hold them, from 0: all, or such as 0-2+5-5"] = "all"
    serial: Annotated[int, "width of the adapter behind the feed-forward layer; 0: none", at_least(0)] = 48
    parallel: Annotated[int, "width of the adapter beside the feed-forward layer; 0: none", at_least(0)] = 96
    prefix: Annotated[int, "keys and values before the text; 0: none", at_least(0)] = 12

    default_lr: ClassVar[float] = 1e-3
    tiny: ClassVar[dict[str, int]] = {"serial": 3, "parallel": 5, "prefix": 2}

    def __post_init__(self) -> None:
        if not (self.serial or self.parallel or self.prefix):
            raise ConfigError("autopeft: serial, parallel and prefix are all 0, so nothing trains. Give one a size.")
        if self.layers != "all":
            layers_named(self.layers, "autopeft.layers")

    def plan(self, anatomy: Anatomy) -> dict[Layer, InLayer]:
        """What stands in each layer.

        Raises:
            ConfigError: a layer that the model does not have.
        """
        found = layers_of(anatomy)
        chosen = range(len(found)) if self.layers == "all" else layers_named(self.layers, "autopeft.layers")
        if chosen[-1] >= len(found):
            raise ConfigError(
                f"autopeft.layers: {self.layers} names layer {chosen[-1]}, and this model has {len(found)}, counted "
                f"from 0. Name layers from 0 to {len(found) - 1}."
            )
        for number in chosen:  # a layer without attention has no place for keys, and says so
            cost_of(anatomy, found[number], "prefix", self.prefix, self.name)
        here = InLayer(adapter=self.serial, parallel=self.parallel, prefix=self.prefix)
        return {found[number]: here for number in chosen}
