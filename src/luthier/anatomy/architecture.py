"""What no inference can know about an architecture: the order inside fused layers, and exceptions.

A file on the shelf `architectures/` registers one class. The facts name the `model_type`s it speaks for:

    @ARCHITECTURES.register("gpt2", model_types=("gpt2",))
    class GPT2(Architecture):
        fused = {"c_attn": Fused(("attn.q", "attn.k", "attn.v"))}

A third party adds a folder of such files with `ARCHITECTURES.add_shelf(folder)`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from luthier.core import Catalogue

__all__ = ["ARCHITECTURES", "Architecture", "Fused", "architecture_of"]


@dataclass(frozen=True)
class Fused:
    """How one layer holds several projections.

    Args:
        parts: the kinds, in the order of the rows.
        layout: "contiguous": all rows of the first part, then all of the second;
            "per_head": for each head its rows of the first part, then of the second (heads, parts, d_head);
            "alternating": row by row, one of each part in turn.
    """

    parts: tuple[str, ...]
    layout: Literal["contiguous", "per_head", "alternating"] = "contiguous"


class Architecture:
    """Facts about one family of models; everything left empty is inferred.

    Paths are relative to a block.
    """

    name: ClassVar[str] = ""
    facts: ClassVar[Mapping[str, Any]] = {}

    fused: ClassVar[Mapping[str, Fused]] = {}  # name of the module or 3-D parameter -> its parts
    inputs: ClassVar[Mapping[str, str]] = {}  # "attn", "cross", "ffn" -> module whose first input the sublayer reads
    beside: ClassVar[tuple[str, ...]] = ()  # names of linear layers of a block that are of neither sublayer
    outside_norms: ClassVar[Mapping[str, str]] = {}  # end of a norm's path outside the blocks -> its part

    @classmethod
    def pre_norm(cls, config: Any) -> bool | None:
        """Whether norms come before the sublayers; None leaves it to the order of calls."""
        return None

    @classmethod
    def residual_is_input(cls, config: Any) -> bool:
        """Whether the residual sum takes the normed input although the norm comes first."""
        return False


ARCHITECTURES: Catalogue[Architecture] = Catalogue("luthier.anatomy.architectures", "architecture")


def architecture_of(model_type: str) -> type[Architecture]:
    """The shelf's class for a `model_type`; plain `Architecture` where no file speaks for it."""
    for card in ARCHITECTURES.cards():
        types = card.facts.get("model_types")
        if isinstance(types, tuple) and model_type in types:
            return ARCHITECTURES.get(card.name)
    return Architecture
